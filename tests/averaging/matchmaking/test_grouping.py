"""Plans of groups: sizes, who leads, and when a full group may begin early."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shoal.averaging.matchmaking.candidate import Candidate
from shoal.averaging.matchmaking.grouping import (
    EarlyBegin,
    cut_groups,
    may_begin_early,
)
from shoal.averaging.matchmaking.sizes import plan_groups, plan_with_helpers, stays_full
from shoal.p2p.identity import Identity

PEERS = sorted(Identity.generate(bytes([number]) * 32).peer_id for number in range(14))
sizes = st.tuples(st.integers(1, 9), st.integers(1, 9)).map(sorted)


def candidates(modes: str) -> list[Candidate]:
    """One letter a peer: "F" can lead, "c" cannot, "a" can lead and only helps."""
    return [
        Candidate(1.0, PEERS[index], mode != "c", contributes=mode != "a") for index, mode in enumerate(modes)
    ]


@pytest.mark.parametrize(
    ("n", "target", "minimum", "expected"),
    [
        (9, 4, 2, (4, 3, 2)),
        (9, 4, 4, (4, 4)),
        (8, 4, 2, (4, 4)),
        (5, 4, 2, (3, 2)),
        (9, 4, 3, (3, 3, 3)),
        (3, 4, 2, (3,)),
        (1, 4, 2, ()),
        (12, None, 2, (12,)),
        (3, None, 4, ()),
    ],
)
def test_sizes(n, target, minimum, expected):
    assert plan_groups(n, target, minimum) == expected


@given(n=st.integers(0, 40), bounds=sizes, leaders=st.integers(0, 40))
def test_no_other_sizes_leave_over_fewer(n, bounds, leaders):
    minimum, target = bounds
    plan = plan_groups(n, target, minimum, leaders)
    assert all(minimum <= size <= target for size in plan)
    assert len(plan) <= leaders
    # every count of groups takes in any number of peers between its bounds
    possible = [min(n, count * target) for count in range(min(leaders, n) + 1) if count * minimum <= n]
    assert sum(plan) == max(possible)


def test_a_group_stays_full_if_no_later_plan_makes_it_smaller():
    for target, minimum, n, index in itertools.product(range(1, 6), range(1, 6), range(25), range(4)):
        if minimum > target:
            continue
        plans = [plan_groups(later, target, minimum) for later in range(n, n + 60)]
        expected = all(len(plan) > index and plan[index] == target for plan in plans)
        assert stays_full(index, n, target, minimum) == expected, (target, minimum, n, index)


@given(modes=st.text("Fc", max_size=14), bounds=sizes)
def test_every_group_is_led_by_its_first_peer_that_can(modes, bounds):
    minimum, target = bounds
    everybody = candidates(modes)
    cut = cut_groups(everybody, target, minimum)
    planned = [member for group in cut.groups for member in group.members]
    assert len(planned) == len(set(planned))
    assert set(planned) | set(cut.left_over) == set(everybody)
    for group in cut.groups:
        assert group.is_complete == (minimum <= len(group.members))
        assert len(group.members) <= target
        leader = group.members[0]
        assert leader.can_lead
        assert all(leader < follower for follower in group.members[1:] if follower.can_lead)
    complete = sum(len(group.members) for group in cut.groups if group.is_complete)
    assert complete == sum(plan_groups(len(modes), target, minimum, modes.count("F")))


def test_clients_that_come_first_are_led_too():
    cut = cut_groups(candidates("cccFcF"), 3, 2)
    assert [[PEERS.index(member.peer_id) for member in group.members] for group in cut.groups] == [
        [3, 0, 1],
        [5, 2, 4],
    ]


@pytest.mark.parametrize("modes", ["cc", "cccccF", "F"])
def test_where_some_cannot_lead_the_plan_says_who_they_are(modes):
    reason = cut_groups(candidates(modes), 2, 2).reason
    assert f"{len(modes)} in all, of which {modes.count('F')} can lead" in reason
    assert ("(clients never lead)" in reason) == ("c" in modes)


def verdict(modes: str, members: list[int], target: int, minimum: int) -> EarlyBegin:
    peers = [PEERS[number] for number in members]
    return may_begin_early(candidates(modes), peers, peers[0], target, minimum).verdict


def test_when_a_full_group_may_begin():
    assert verdict("FFF", [0, 1, 2], 4, 2) is EarlyBegin.NO  # not full
    assert verdict("FFFF", [0, 1, 2, 3], 4, 2) is EarlyBegin.IF_SETTLED  # a fifth would make it 3 + 2
    assert verdict("FFFFF", [0, 1, 2, 3], 4, 2) is EarlyBegin.NO  # the fifth is there
    assert verdict("FFFFFF", [0, 1, 2, 3], 4, 2) is EarlyBegin.YES  # 4 + 2, and any more change only the rest
    assert verdict("FFFFFF", [0, 1, 2, 5], 4, 2) is EarlyBegin.YES  # who it is does not matter
    assert verdict("FFFFF", [0, 1, 2, 3], 4, 4) is EarlyBegin.YES  # the fifth is left over in any case
    assert verdict("FFFFFFFFF", [4, 5, 6, 7], 4, 2) is EarlyBegin.NO  # the plan is 4 + 3 + 2


def test_a_group_may_not_take_away_the_leaders_that_others_need():
    assert verdict("FFcc", [0, 1], 2, 2) is EarlyBegin.NO
    assert verdict("FFcc", [0, 2], 2, 2) is EarlyBegin.YES
    # 4 + 4 + 2 with one leader to spare, which the first group gets: the second may not take one as well
    assert verdict("FcFccccFcF", [0, 2, 1, 3], 4, 2) is not EarlyBegin.NO
    assert verdict("FcFccccFcF", [7, 9, 4, 5], 4, 2) is EarlyBegin.NO


@pytest.mark.parametrize(
    ("kinds", "target", "minimum", "expected"),
    [
        ((0, 2, 2), 4, 2, (4,)),
        ((0, 1, 3), 4, 2, (4,)),
        ((0, 0, 4), 4, 2, ()),  # nothing to average
        ((0, 4, 0), 4, 2, ()),  # nobody leads
        ((2, 0, 2), 2, 2, (2,)),  # two helpers wait, rather than that each peer averages with itself
        ((3, 0, 1), 2, 2, (2, 2)),  # rather alone with a helper than left over
        ((0, 4, 1), 3, 2, (3,)),
        ((0, 4, 2), 3, 2, (3, 3)),
        ((1, 0, 2), None, 2, (3,)),
        ((0, 0, 2), None, 2, ()),
    ],
)
def test_sizes_where_some_only_help(kinds, target, minimum, expected):
    assert plan_with_helpers(*kinds, target, minimum) == expected


@given(modes=st.text("Fca", max_size=14), bounds=sizes)
def test_helpers_take_nobodys_place_and_make_no_group_alone(modes, bounds):
    minimum, target = bounds
    everybody = candidates(modes)
    cut = cut_groups(everybody, target, minimum)
    complete = [group.members for group in cut.groups if group.is_complete]
    planned = [member for members in complete for member in members]
    assert len(planned) == len(set(planned))
    assert set(planned) | set(cut.left_over) == set(everybody)
    for members in complete:
        assert minimum <= len(members) <= target
        assert members[0].can_lead
        assert all(members[0] < member for member in members[1:] if member.can_lead)
        assert any(member.contributes for member in members)
    if "a" not in modes:
        return
    contribute = sum(member.contributes for member in planned)
    # With every helper that can be had, and without any: helpers only add places.
    assert contribute >= sum(plan_groups(len(modes.replace("a", "")), target, minimum, modes.count("F")))
    alone = sum(sum(member.contributes for member in members) == 1 for members in complete)
    if target > 2 and minimum > 1 and modes.count("F") >= len(complete):
        assert alone <= max(1, 2 * len(complete) - contribute)


def test_a_leader_waits_for_the_contributor_that_is_planned_in_a_helpers_place():
    assert verdict("FFaa", [0, 2], 2, 2) is EarlyBegin.NO
    assert verdict("FFaa", [0, 1], 2, 2) is EarlyBegin.IF_SETTLED
    assert verdict("aaa", [0, 1], 2, 2) is EarlyBegin.NO
