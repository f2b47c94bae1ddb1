"""How many lanes a path gets: a table of what was measured, and what is chosen."""

from __future__ import annotations

import pytest

from shoal.p2p.lanes.count import FEW, Path, choose, first_choice
from shoal.p2p.lanes.memory import PathMemory

MB = 1e6


def path(
    rtt: float = 0.1,
    *,
    least: float = 0.1,
    lost: int = 0,
    rate: float = 1 * MB,
    full: bool = True,
    control: str = "cubic",
    highest: float = 0.0,
) -> Path:
    return Path(least, rtt, max(rtt, highest), 1000, lost, rate, full, control)


@pytest.mark.parametrize(
    ("count", "measured", "limit", "before", "expected", "why"),
    [
        (1, path(0.0002, least=0.0001), 64, None, 1, "short"),
        (8, path(0.0002, least=0.0001, lost=50), 64, None, 1, "short"),
        (1, path(lost=1), 64, None, 2, "0.1 % of the packets were lost without a queue"),
        (4, path(lost=3), 64, None, 8, "lost without a queue"),
        (48, path(lost=3), 64, None, 64, "lost without a queue"),
        (4, path(), 64, None, 4, "nothing was lost"),
        (16, path(0.2, lost=3), 64, None, 12, "queue is full: 200 ms of 100 ms"),
        (2, path(0.2), 64, None, 1, "queue is full"),
        (1, path(0.2, lost=9), 64, None, 1, "queue is full"),
        (4, path(lost=3, full=False), 64, None, 4, "less was sent"),
        (8, path(lost=3, rate=1.02 * MB), 64, (4, 1 * MB), 4, "carried no more"),
        (8, path(lost=3, rate=1.5 * MB), 64, (4, 1 * MB), 16, "lost without a queue"),
        (16, path(lost=3), 6, None, 6, "no more than 6"),
        (1, path(lost=3, control="bbr"), 64, None, 1, "bbr"),
        (8, path(0.3, lost=3, control="bbr"), 64, None, 6, "queue is full"),
    ],
)
def test_choices(
    count: int, measured: Path, limit: int, before: tuple[int, float] | None, expected: int, why: str
):
    choice = choose(count, measured, limit, before)
    assert choice.count == expected
    assert why in choice.reason


@pytest.mark.parametrize(
    ("measured", "best", "expected", "why"),
    [
        (path(rate=1 * MB), (4, 2 * MB), 4, "4 lanes carried more"),
        (path(rate=1 * MB), (64, 2 * MB), 16, "64 lanes carried more"),
        (path(rate=1.9 * MB), (4, 2 * MB), 1, "nothing was lost"),
        (path(0.2, rate=1 * MB), (4, 2 * MB), 1, "queue is full"),  # others use the path, too
        (path(rate=1 * MB, full=False), (4, 2 * MB), 1, "less was sent"),
    ],
)
def test_lanes_that_were_taken_away_come_back_if_they_carried_more(
    measured: Path, best: tuple[int, float], expected: int, why: str
):
    choice = choose(1, measured, 16, best=best)
    assert choice.count == expected
    assert why in choice.reason


@pytest.mark.parametrize(
    ("count", "measured", "best", "expected", "why"),
    [
        (4, path(lost=30, highest=0.2), None, 4, "the queue was full a moment ago"),
        (4, path(lost=30, highest=0.2), (4, 1 * MB), 4, "the queue was full a moment ago"),
        (3, path(lost=30, highest=0.2), (4, 1 * MB), 4, "lost without a queue"),
        (4, path(lost=30, highest=0.2), (16, 1.1 * MB), 8, "lost without a queue"),
        (12, path(lost=30, highest=0.2), (16, 1.1 * MB), 16, "lost without a queue"),
        (4, path(lost=30, highest=0.12), (4, 1 * MB), 8, "lost without a queue"),
        (4, path(highest=0.2), (4, 1 * MB), 4, "nothing was lost"),
    ],
)
def test_losses_after_a_full_queue_bring_no_more_than_carried_most(
    count: int, measured: Path, best: tuple[int, float] | None, expected: int, why: str
):
    choice = choose(count, measured, 64, best=best)
    assert choice.count == expected
    assert why in choice.reason


def test_what_was_carried_best_is_forgotten_in_time():
    memory = PathMemory()
    memory.note_rate(4, 2 * MB)
    memory.note_rate(1, 1 * MB)
    assert memory.best == (4, pytest.approx(0.98 * 2 * MB))
    for _ in range(40):
        memory.note_rate(1, 1 * MB)
    assert memory.best == (1, 1 * MB)


@pytest.mark.parametrize(
    ("count", "measured", "limit", "enough", "expected", "why"),
    [
        (32, path(lost=3), 64, 32, 32, "carried no more"),  # it was tried, and is not tried again for a while
        (8, path(lost=3), 64, 32, 16, "lost without a queue"),
        (24, path(lost=3), 64, 32, 32, "lost without a queue"),
        (32, path(lost=3), 16, 32, 16, "no more than 16"),
        (32, path(0.2, lost=3), 64, 32, 24, "queue is full"),
        (32, path(lost=3), 64, None, 64, "lost without a queue"),
    ],
)
def test_more_than_enough_are_not_tried_again(
    count: int, measured: Path, limit: int, enough: int | None, expected: int, why: str
):
    choice = choose(count, measured, limit, None, enough)
    assert choice.count == expected
    assert why in choice.reason
    assert not choice.is_tried


def test_it_is_said_that_more_were_tried():
    assert choose(8, path(lost=3, rate=1.02 * MB), 64, (4, 1 * MB)).is_tried


@pytest.mark.parametrize(
    ("rtt", "limit", "expected"), [(None, 64, 1), (0.001, 64, 1), (0.05, 64, FEW), (0.05, 2, 2)]
)
def test_first_choices(rtt: float | None, limit: int, expected: int):
    assert first_choice(rtt, limit).count == expected


@pytest.mark.parametrize(
    ("rate", "seconds", "expected"), [(1.0, 1.0, 8), (0.85, 29.0, 8), (0.7, 1.0, None), (1.0, 31.0, None)]
)
def test_what_was_enough_is_so_for_a_while_and_while_as_much_is_carried(
    rate: float, seconds: float, expected: int | None
):
    memory = PathMemory(enough=8, tried_rate=MB, tried_for=seconds)
    assert memory.enough_for(rate * MB) == expected
