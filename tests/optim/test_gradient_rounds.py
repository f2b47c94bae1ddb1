"""Under which bits gradient rounds look for groups, with an averager that only notes what it is asked for."""

from __future__ import annotations

from typing import Any, cast

from shoal.averaging.trainer.control import Steering, StepControl
from shoal.optim.epoch import group_bits
from shoal.optim.gradient_rounds import GradientRounds


class Noting:
    """An averager whose rounds never end by themselves."""

    def __init__(self) -> None:
        self.asked: list[str] = []

    def set_group_bits(self, bits: str) -> None:
        self.asked.append(bits)

    def schedule_step(self, scheduled_time: float, **options: Any) -> StepControl:
        self.asked.append("prepare")
        return self._control()

    def step(self, control: StepControl | None = None, **options: Any) -> StepControl:
        self.asked.append("step")
        return self._control() if control is None else control

    def _control(self) -> StepControl:
        steering = Steering(lambda: None, lambda time: None)
        return StepControl(
            scheduled_time=0.0, deadline=None, weight=1.0, needs_trigger=True, steering=steering
        )


def test_each_round_is_looked_for_among_peers_of_its_epoch():
    averager = Noting()
    rounds = GradientRounds(cast("Any", averager), 5.0, auxiliary=False)
    rounds.prepare(0.0, 3, None)
    rounds.prepare(0.0, 3, None)
    rounds.begin(3, lambda: None)
    assert averager.asked == [group_bits(3), "prepare", "step"]


def test_a_round_that_goes_on_is_not_moved_to_the_next_epoch():
    """With delays it may still look for its group when the next one could be prepared."""
    averager = Noting()
    rounds = GradientRounds(cast("Any", averager), 5.0, auxiliary=False)
    control = rounds.begin(3, lambda: None)
    rounds.prepare(0.0, 4, None)
    assert averager.asked == [group_bits(3), "step"]
    assert control.cancel()
    rounds.prepare(0.0, 4, None)
    assert averager.asked == [group_bits(3), "step", group_bits(4), "prepare"]
