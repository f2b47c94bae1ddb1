"""Which groups gradient rounds look for, and how long, with an averager that only notes what it is asked for."""

from __future__ import annotations

from typing import Any, cast

import pytest

from shoal.averaging.commands import AveragingStage
from shoal.averaging.trainer.control import Steering, StepControl
from shoal.errors import MatchmakingException
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

    def load_accumulators_into_averager_(self) -> None:
        self.asked.append("own mean")

    def notify_used_averaged_gradients(self) -> None:
        self.asked.append("used")

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


@pytest.mark.parametrize("found", [False, True])
def test_a_peer_that_all_have_left_alone_looks_for_no_group(found: bool):
    """Two peers an epoch apart would each wait for the whole time in each epoch. A group that stands is waited for."""
    averager = Noting()
    rounds = GradientRounds(cast("Any", averager), 0.5, auxiliary=False)
    control = rounds.begin(3, lambda: None)
    control.reach(AveragingStage.RUNNING_ALLREDUCE if found else AveragingStage.LOOKING_FOR_GROUP)
    outcome = rounds.end(control, 3, lambda: True)
    wanted = "no average within 0.5 s" if found else "no other peer is in this epoch any more"
    assert outcome.failure == wanted
    assert averager.asked[-2:] == ["own mean", "used"]


class Slow(Noting):
    """Its copies of the gradients take as long as is left to a prepared search."""

    def step(self, control: StepControl | None = None, **options: Any) -> StepControl:
        if control is not None:
            control.fail(MatchmakingException("found no group"))
            control.weight = 4.0
        return super().step(control, **options)


def test_a_prepared_search_that_ends_while_gradients_are_copied_is_replaced():
    """It was an error out of the user's step(). One that is let go is no error, either."""
    averager = Slow()
    rounds = GradientRounds(cast("Any", averager), 5.0, auxiliary=False)
    rounds.prepare(0.0, 3, None)
    control = rounds.begin(3, lambda: None)
    assert not control.done()
    assert averager.asked == [group_bits(3), "prepare", group_bits(3), "step"]
    assert control.cancel()
    rounds.prepare(0.0, 4, None)
    rounds.drop(others=True)
    assert rounds.scheduled is None
    assert averager.asked[-1] == "prepare"
