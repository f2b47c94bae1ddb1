"""Clocks of what is awaited: for one thing, and for all of them together."""

from __future__ import annotations

from shoal.averaging.allreduce.part_clocks import PartClocks
from shoal.sansio.core import NEVER


def test_each_thing_starts_the_clock_anew():
    clocks: PartClocks[int] = PartClocks(10.0)
    for now in (0.0, 9.0, 18.0, 27.0):
        clocks.start(1, now)
        assert clocks.deadline == now + 10.0
    assert clocks.expired(36.9) == []
    assert clocks.expired(37.0) == [1]
    assert not clocks.is_spent(1)


def test_one_that_does_each_thing_in_time_may_take_too_long_in_all():
    clocks: PartClocks[int] = PartClocks(10.0, in_all=25.0)
    for now in (0.0, 9.0, 18.0):
        clocks.start(1, now)
    clocks.start(2, 18.0)
    assert clocks.deadline == 25.0
    assert clocks.expired(24.9) == []
    assert clocks.expired(25.0) == [1]
    assert clocks.is_spent(1)
    assert not clocks.is_spent(2)


def test_time_in_which_nothing_is_awaited_does_not_count():
    clocks: PartClocks[int] = PartClocks(10.0, in_all=25.0)
    clocks.start(1, 0.0)
    clocks.stop(1)
    assert clocks.deadline == NEVER
    clocks.start(1, 100.0)
    clocks.shift(5.0)  # this process was stopped
    assert clocks.deadline == 115.0
