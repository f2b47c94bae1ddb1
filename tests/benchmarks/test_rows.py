"""The table: each row can be done, is judged by what it shows, and can be chosen."""

from __future__ import annotations

import pytest

from benchmarks.launches import launches
from benchmarks.rows import ROWS, Row, among, choose, quick_rows
from benchmarks.work import Averaging


def test_names_are_unique():
    assert len({row.name for row in ROWS}) == len(ROWS)


@pytest.mark.parametrize("row", [*ROWS, *quick_rows()], ids=lambda row: row.title)
def test_every_side_can_do_its_work(row: Row):
    for side in row.sides:
        assert launches(row.work, side)


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
def test_what_is_required_is_shown_and_measured(row: Row):
    """A requirement on a figure that no line shows, or on a side that takes no part, could not be met."""
    for requirement in row.required:
        assert requirement.figure in row.figures
        assert requirement.of in {None, *(one for side in row.sides for one in (side.library, side.name))}


def test_quick_rows_are_small_and_judge_nothing():
    for row in quick_rows():
        assert isinstance(row.work, Averaging)
        assert row.work.megabytes <= 64
        assert not row.required


def test_rows_are_chosen_by_name_in_the_order_of_the_table():
    assert [row.name for row in choose(ROWS, ["tiny", "group"])] == ["group", "tiny"]
    assert choose(ROWS, []) == ROWS
    with pytest.raises(ValueError, match=r"row must be one of .*, got 'tinny'"):
        choose(ROWS, ["tinny"])


def test_rows_without_a_chosen_side_are_left_out():
    chosen = among(ROWS, ["gloo"])
    assert [row.name for row in chosen] == ["loopback-2", "loopback-4", "loopback-8"]
    assert {side.library for row in chosen for side in row.sides} == {"gloo"}
    with pytest.raises(ValueError, match=r"side must be one of .*, got 'nccl'"):
        among(ROWS, ["nccl"])
