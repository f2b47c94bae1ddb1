"""How fast a peer works, on a clock that the test moves."""

from __future__ import annotations

import pytest

from shoal.errors import InvalidStateError, InvalidTypeError, InvalidValueError
from shoal.optim.performance_ema import PerformanceEMA


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


def test_a_steady_speed_is_exact_from_the_first_update():
    clock = Clock()
    speed = PerformanceEMA(clock=clock)
    for _ in range(5):
        clock.now += 4.0
        assert speed.update(8) == pytest.approx(2.0)
    assert speed.num_updates == 5
    assert speed.ema_seconds_per_sample == pytest.approx(0.5)


def test_newer_values_count_for_more():
    speed = PerformanceEMA(alpha=0.5)
    speed.update(1, interval=1.0)
    speed.update(1, interval=4.0)
    assert speed.ema_seconds_per_sample == pytest.approx((0.25 * 1 + 0.5 * 4) / 0.75)


def test_time_inside_a_pause_does_not_count_and_time_before_it_does():
    clock = Clock()
    speed = PerformanceEMA(clock=clock)
    clock.now += 1.0
    with speed.pause():
        clock.now += 50.0
        with pytest.raises(InvalidStateError, match="interval"):
            speed.update(1)
    clock.now += 1.0
    assert speed.update(2) == pytest.approx(1.0)


def test_a_reset_leaves_out_what_has_passed_and_ends_a_paused_beginning():
    clock = Clock()
    speed = PerformanceEMA(paused=True, clock=clock)
    clock.now += 10.0
    speed.reset_timer()
    clock.now += 1.0
    assert speed.update(1) == pytest.approx(1.0)


def test_a_block_on_a_thread_counts_its_own_time():
    clock = Clock()
    speed = PerformanceEMA(clock=clock)
    clock.now += 10.0
    with speed.update_threadsafe(4):
        clock.now += 2.0
    assert speed.samples_per_second == pytest.approx(2.0)


def test_a_speed_is_never_infinite():
    assert PerformanceEMA(eps=1e-3).update(5, interval=0.0) == pytest.approx(1000.0)


@pytest.mark.parametrize("wrong", [{"alpha": 0}, {"alpha": 1.5}, {"eps": 0}])
def test_values_out_of_range_are_named(wrong: dict[str, float]):
    with pytest.raises(InvalidValueError, match=next(iter(wrong))):
        PerformanceEMA(**wrong)
    with pytest.raises(InvalidTypeError, match="task_size"):
        PerformanceEMA().update("8")  # type: ignore[arg-type]
    with pytest.raises(InvalidValueError, match="task_size"):
        PerformanceEMA().update(0)
