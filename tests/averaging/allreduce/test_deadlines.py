"""Deadlines that follow recent rounds: a table of what was seen and what follows, and what must hold for any times."""

from __future__ import annotations

import math
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shoal.averaging.allreduce.deadlines import ENOUGH, ROUNDS, TIMES_SPREAD, Deadlines, load
from shoal.averaging.allreduce.events import AdaptedDeadlines, RoundTimeouts
from shoal.averaging.allreduce.lateness import FLOOR, Waits

NO_CEILINGS = RoundTimeouts()
CEILINGS = RoundTimeouts(sender=60.0, reducer=120.0)
PART = 1 << 19


def deadlines_after(
    *rounds: Waits, ceilings: RoundTimeouts = NO_CEILINGS, nbytes: int = PART
) -> AdaptedDeadlines:
    deadlines = Deadlines(ceilings)
    for waits in rounds:
        deadlines.learn(waits, PART)
    return deadlines.timeouts(nbytes).adapted


def parts(*seconds: float) -> Waits:
    return Waits(parts=list(seconds))


@pytest.mark.parametrize(
    ("seen", "deadline"),
    [
        (parts(), math.inf),
        (parts(*[9.0] * (ENOUGH - 1)), math.inf),
        (parts(8.0, 9.0, 10.0, 11.0, 12.0), 10.0 + TIMES_SPREAD * 2.0),  # a fifth of the median, at least
        (parts(5.0, 7.0, 10.0, 15.0, 20.0), 10.0 + TIMES_SPREAD * 5.0),
        (parts(5.0, 7.0, 10.0, 15.0, 1e6), 10.0 + TIMES_SPREAD * 5.0),  # one that is far off changes nothing
        (parts(*[0.01] * 9), FLOOR),
    ],
)
def test_a_deadline_is_the_median_and_some_deviations(seen: Waits, deadline: float):
    assert deadlines_after(seen).part == pytest.approx(deadline)


@pytest.mark.parametrize("few", [Waits(), parts(1.0, 1.0)])
def test_the_ceilings_hold_before_enough_was_seen(few: Waits):
    assert deadlines_after(few, ceilings=CEILINGS) == AdaptedDeadlines(60.0, 60.0)


def test_no_deadline_is_later_than_its_ceiling():
    slow = Waits([300.0] * 9, [400.0] * 9)
    assert deadlines_after(slow, ceilings=CEILINGS) == AdaptedDeadlines(60.0, 60.0)


def test_a_ceiling_below_the_floor_counts():
    low = RoundTimeouts(sender=0.5, reducer=1.0)
    assert deadlines_after(parts(*[0.1] * 9), ceilings=low).part == 0.5


def test_the_ceilings_stay_with_the_round():
    timeouts = Deadlines(RoundTimeouts(99.0, 60.0, 120.0)).timeouts(PART)
    assert (timeouts.allreduce, timeouts.sender, timeouts.reducer) == (99.0, 60.0, 120.0)


def test_offsets_have_a_deadline_of_their_own():
    """They are counted from the middle of the group, so that half of them are below 0."""
    seen = Waits([-10.0, -5.0, -1.0, 0.0, 1.0, 5.0, 10.0], [3.0] * 7)
    adapted = deadlines_after(seen)
    assert adapted.offset == TIMES_SPREAD * 5.0
    assert adapted.part == pytest.approx(3.0 + TIMES_SPREAD * 0.6)


@pytest.mark.parametrize("factor", [0.2, 1.0, 5.0])
def test_deadlines_of_parts_scale_with_their_bytes(factor: float):
    seen = Waits([-20.0, 0.0, 0.0, 20.0, 20.0], [20.0] * 9)
    usual, scaled = deadlines_after(seen), deadlines_after(seen, nbytes=round(PART * factor))
    assert scaled.part == pytest.approx(factor * usual.part, rel=1e-5)
    assert scaled.offset == usual.offset  # a user's program does not depend on the size of a part


def test_what_passes_an_owners_link_counts():
    assert load(PART, 8) == 7 * load(PART, 2) == 7 * PART
    assert load(0, 1) == 0


def test_a_change_is_followed_when_half_of_the_rounds_are_new():
    deadlines = Deadlines(NO_CEILINGS)
    limits = []
    for number in range(3 * ROUNDS):
        deadlines.learn(parts(*[10.0 if number < ROUNDS else 50.0] * 7), PART)
        adapted = deadlines.timeouts(PART).adapted
        limits.append(adapted.part)
    before, after = 10.0 + TIMES_SPREAD * 2.0, 50.0 + TIMES_SPREAD * 10.0
    assert limits[ROUNDS - 1] == pytest.approx(before)
    assert limits[ROUNDS + ROUNDS // 2] == pytest.approx(after)
    assert limits[-1] == pytest.approx(after)


@given(st.lists(st.floats(0.001, 1e4), min_size=ENOUGH, max_size=60))
def test_half_of_what_is_seen_is_never_late(times: list[float]):
    limit = deadlines_after(parts(*times)).part
    assert sum(time <= limit for time in times) * 2 >= len(times)


def test_usual_times_are_hardly_ever_late():
    rng = random.Random(1)
    late = trials = 0
    for _ in range(100):
        deadlines = Deadlines(NO_CEILINGS)
        for _ in range(ROUNDS):
            deadlines.learn(parts(*(5 * rng.lognormvariate(0, 0.5) for _ in range(7))), PART)
        adapted = deadlines.timeouts(PART).adapted
        for _ in range(100):
            late += 5 * rng.lognormvariate(0, 0.5) > adapted.part
            trials += 1
    assert late / trials < 0.02
