"""The checks of the laboratory of faults find what they are there for, and the plan has what it should."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from lab_fault_checks import Ending, expected_values, find_late, find_splits, find_wrong_tensors
from lab_fault_plan import CELLS, FAST, all_trials, rotating

PARTS = 4
MEMBERS = ("a", "b", "c")
AVERAGE = (1.0 * 1 + 2.0 * 2 + 4.0 * 3) / 6


def report(**changed: Any) -> dict[str, Any]:
    plain: dict[str, Any] = {
        "group_id": "f00d",
        "members": list(MEMBERS),
        "weights": [1.0, 2.0, 3.0],
        "excluded": [],
        "partial": [],
        "parts": PARTS,
    }
    return {**plain, **changed}


def committed(number: int, **changed: Any) -> Ending:
    said = {
        "error": None,
        "kind": None,
        "report": report(),
        "digest": "new",
        "values": [AVERAGE],
        "time": 5.0,
    }
    return Ending(MEMBERS[number], float(2**number), 1.0 + number, "old", {**said, **changed})


def failed(number: int, kind: str = "AllreduceException", **changed: Any) -> Ending:
    said = {"error": "it failed", "kind": kind, "report": None, "digest": "old", "values": [1.0], "time": 5.0}
    return Ending(MEMBERS[number], float(2**number), 1.0 + number, "old", {**said, **changed})


ALL = [committed(number) for number in range(3)]


def test_a_group_that_ended_alike_is_fine():
    assert find_splits(ALL) == find_wrong_tensors(ALL) == find_late(ALL, deadline=6.0) == []


def test_who_was_in_another_group_or_in_none_was_apart_from_the_victim():
    with_attempts = report(attempts=1)
    assert not committed(0, report=with_attempts).was_apart_from("c")
    assert committed(0, report=with_attempts).was_apart_from("d")
    assert not committed(0, report=report(attempts=2)).was_apart_from("d")  # the victim was gone by then
    assert failed(0, report=report(group_id="", attempts=0)).was_apart_from("c")
    assert not failed(0, report=with_attempts).was_apart_from("c")


@pytest.mark.parametrize(
    ("other", "text"),
    [
        (failed(2), "failed: AllreduceException"),
        (replace(committed(2), said=None), "said nothing"),
        (committed(2, report=report(group_id="beef")), "committed another group, beef"),
        (committed(2, digest="another"), "different tensors"),
        (committed(2, report=report(weights=[1.0, 2.0, 2.0])), "report different averages"),
    ],
)
def test_a_member_that_ended_otherwise_is_a_split(other: Ending, text: str):
    (found, *_) = find_splits([*ALL[:2], other])
    assert text in found


@pytest.mark.parametrize("other", [failed(2, "InDoubt"), replace(failed(2), is_dead=True)])
def test_a_member_in_doubt_or_dead_is_no_split(other: Ending):
    assert find_splits([*ALL[:2], other]) == []


def test_a_member_that_was_excluded_may_fail():
    without = report(weights=[1.0, 2.0, 0.0], excluded=[{"member": "c"}])
    endings = [committed(number, report=without) for number in range(2)]
    assert find_splits([*endings, failed(2)]) == []


def test_a_member_may_have_committed_in_another_step():
    later = committed(2, report=report(group_id="beef", weights=[0.0, 0.0, 3.0]))
    assert find_splits([*ALL, later]) == []


def test_parts_of_excluded_members_count_where_the_report_says_so():
    partial = [{"member": "c", "first_part": 1, "end_part": 3}]
    said = report(weights=[1.0, 2.0, 0.0], partial=partial)
    assert expected_values(said, {one.peer: one for one in ALL}) == [5 / 3, AVERAGE, 5 / 3]


@pytest.mark.parametrize("values", [[AVERAGE * (1 + 1e-5)], [AVERAGE, 1.0], []])
def test_an_average_of_something_else_is_wrong(values: list[float]):
    assert find_wrong_tensors([*ALL[:2], committed(2, values=values)])


def test_tensors_must_stay_without_a_commit():
    changed = failed(2, digest="torn")
    assert find_wrong_tensors([*ALL[:2], changed])
    assert find_wrong_tensors([*ALL[:2], replace(changed, is_dead=True)])
    written = failed(2, digest="new")
    assert find_wrong_tensors([*ALL[:2], written])
    assert not find_wrong_tensors([*ALL[:2], replace(written, is_dead=True)])  # it died after it had written


def test_a_member_that_is_late_or_silent_is_found():
    assert find_late([committed(0, time=7.5)], deadline=6.0) == ["member 1 ended 1.5 s after its deadline"]
    assert find_late([replace(committed(0), said=None)], deadline=6.0)


def test_the_plan_has_each_fault_in_each_phase():
    trials = all_trials()
    assert len({trial.name for trial in trials}) == len(trials) >= 300
    for phase, roles in CELLS.items():
        own = {(trial.fault, trial.role) for trial in trials if trial.phase == phase}
        for role in roles:
            assert {
                (f"{what} {whom}", role) for what in ("kill", "term", "stop") for whom in ("user", "both")
            } <= own
    assert {trial.seconds for trial in trials} == {0.0, 3.0, 12.0, 28.0, 30.0, 60.0}
    assert len(FAST) == 20


def test_other_commits_run_other_faults_of_all_phases():
    trials = all_trials()
    one, other = (rotating(trials, 60, seed) for seed in ("1", "2"))
    assert len(set(one)) == len(set(other)) == 60
    assert set(one) != set(other)
    assert rotating(trials, 60, "1") == one
    assert {trial.phase for trial in one} == set(CELLS)
