"""The user process's side of an averager without a background process: its rounds end with an average of 9."""

from __future__ import annotations

from typing import Any

import torch

from shoal.averaging.matchmaking_config import matchmaking_config
from shoal.averaging.partition import Layout
from shoal.averaging.trainer.arena import TensorArena
from shoal.averaging.trainer.control import Steering, StepControl
from shoal.averaging.trainer.late import LateAverage
from shoal.averaging.trainer.link import Link
from shoal.averaging.trainer.pending import ApplyWhen, AverageWriter
from shoal.averaging.trainer.steps import Steps
from shoal.averaging.trainer.tensors import TensorStore

AVERAGE = 9.0


class NoStates:
    """In place of state sharing."""

    def settle(self, *, default: bool) -> None:
        pass

    def attach(self, handle: Any) -> None:
        pass

    def close(self) -> None:
        pass


class UserSide:
    """What an averager has, with ``tensor`` alone."""

    def __init__(
        self, tensor: torch.Tensor, apply_when: ApplyWhen = "ready", *, config: Any = None, name: str = "test"
    ) -> None:
        self.layout = Layout.from_tensors([tensor])
        self.store = TensorStore([tensor], self.layout)
        self.arena = TensorArena(self.store)
        self.writer = AverageWriter(self.arena, on_call=apply_when == "called", name=name)
        self.late = LateAverage(self.arena, name)
        self.steps = Steps(self.store, matchmaking_config(2, 2, 5.0, 3.0), name, self.late)
        states: Any = NoStates()
        self.link = Link(config, self.writer, self.steps, states)

    def make_average(self) -> None:
        """Make the arena, with the average in it that every round ends with."""
        area = torch.frombuffer(self.arena.create_memory().buffer, dtype=torch.uint8)[self.layout.nbytes :]
        self.layout.tensor_view(area, 0).fill_(AVERAGE)

    def add_step(self, number: int = 0) -> StepControl:
        """A step that is under way."""
        control = self.steps._controls[number] = make_control()
        return control

    def close(self) -> None:
        self.writer.close()
        self.arena.close()


def make_control() -> StepControl:
    return StepControl(
        scheduled_time=0.0,
        deadline=None,
        weight=1.0,
        needs_trigger=False,
        steering=Steering(trigger=lambda: None, reschedule=lambda _: None),
    )
