"""The user process's side of an averager without a background process: its rounds end with an average of 9."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch

from shoal.averaging.commands import DoubtSettled, StepOutcome, TakeSnapshot
from shoal.averaging.matchmaking_config import matchmaking_config
from shoal.averaging.partition import Layout
from shoal.averaging.report import DoubtOutcome, StepReport
from shoal.averaging.trainer import link
from shoal.averaging.trainer.arena import TensorArena
from shoal.averaging.trainer.control import Steering, StepControl
from shoal.averaging.trainer.in_place import InPlaceTransfer
from shoal.averaging.trainer.late import LateAverage
from shoal.averaging.trainer.link import Link
from shoal.averaging.trainer.pending import ApplyWhen, AverageWriter
from shoal.averaging.trainer.shared_buffers import SharedBuffers
from shoal.averaging.trainer.steps import Steps
from shoal.averaging.trainer.tensors import TensorStore
from shoal.errors import InDoubt
from shoal.runtime.futures import MPFuture
from shoal.testing.arena import tensor_in
from shoal.utils.serializer import MSGPackSerializer

AVERAGE = 9.0
LIMIT = 20  # seconds, against hanging only


class NoStates:
    """In place of state sharing."""

    def settle(self, *, default: bool) -> None:
        pass

    def attach(self, handle: Any) -> None:
        pass

    def close(self) -> None:
        pass


class UserSide:
    """What an averager has, with one tensor, or with buffers that were handed over to it."""

    def __init__(
        self,
        tensor: torch.Tensor | SharedBuffers,
        apply_when: ApplyWhen = "ready",
        *,
        config: Any = None,
        name: str = "test",
        alpha: float = 1.0,
    ) -> None:
        buffers = tensor if isinstance(tensor, SharedBuffers) else None
        tensors = [tensor] if isinstance(tensor, torch.Tensor) else tensor.tensors
        self.layout = Layout.from_tensors(tensors)
        self.store = TensorStore(tensors, self.layout)
        transfer = None if buffers is None else InPlaceTransfer(buffers, self.store)
        self.arena = TensorArena(self.store, transfer, alpha=alpha)
        self.writer = AverageWriter(self.arena, on_call=apply_when == "called", name=name)
        self.late = LateAverage(self.arena, name)
        self.steps = Steps(self.store, matchmaking_config(2, 2, 5.0, 3.0), name, self.late)
        states: Any = NoStates()
        self.link = Link(config, self.writer, self.steps, states)

    def make_average(self) -> None:
        """Make the arena, with the average in it that every round ends with."""
        area = torch.frombuffer(self.arena.create_memory().buffer, dtype=torch.uint8)[self.layout.nbytes :]
        for index in range(len(self.layout.slots)):
            tensor_in(self.layout, area, index).fill_(AVERAGE)

    def add_step(self, number: int = 0) -> StepControl:
        """A step that is under way."""
        control = self.steps._controls[number] = make_control()
        return control

    def close(self) -> None:
        self.writer.close()
        self.arena.close()


class Peer(UserSide):
    """Its steps end as the test says."""

    def __init__(
        self, apply_when: ApplyWhen = "ready", tensors: SharedBuffers | None = None, **options: Any
    ) -> None:
        super().__init__(torch.zeros(3) if tensors is None else tensors, apply_when, **options)
        self.tensor = self.store.tensors[0]
        self.make_average()
        self.commands: list[object] = []
        self.calls: list[MPFuture[Any]] = []
        handle: Any = self
        self.steps.when_over = partial(link._let_go, self.arena.transfer, handle)

    def call(self, command: object, timeout: float | None = None) -> MPFuture[Any]:
        self.commands.append(command)
        self.calls.append(MPFuture())
        return self.calls[-1]

    def begin_step(self, *, wait: bool = False) -> StepControl:
        wishes: dict[str, Any] = dict.fromkeys(("gather", "scheduled_time", "weight", "timeout"))
        handle: Any = self
        options = {"allow_retries": True, "require_trigger": False, "when_busy": "queue", "wait": wait}
        control, _ = self.steps.submit(handle, MSGPackSerializer, **wishes, **options)
        return control

    def take_snapshot(self, step: int) -> None:
        self.link.carry_out(TakeSnapshot(step))

    def end_step(self, step: int, failure: str | None = None, *, in_doubt: bool = False) -> None:
        report = StepReport(step, failure=failure, in_doubt=in_doubt)
        self.calls[step].set_result(StepOutcome(report, found_group=True))

    def settle(self, step: int, outcome: DoubtOutcome = DoubtOutcome.COMMITTED) -> None:
        self.link.carry_out(DoubtSettled(step, outcome))

    def run_into_doubt(self) -> StepControl:
        """Step 0."""
        control = self.begin_step()
        self.take_snapshot(0)
        self.end_step(0, "others may have decided", in_doubt=True)
        with pytest.raises(InDoubt):
            control.result(LIMIT)
        assert self.late.last is not None
        assert self.late.last.outcome is DoubtOutcome.OPEN
        return control

    @property
    def outcome(self) -> DoubtOutcome | None:
        return None if self.late.last is None else self.late.last.outcome


def make_control() -> StepControl:
    return StepControl(
        scheduled_time=0.0,
        deadline=None,
        weight=1.0,
        needs_trigger=False,
        steering=Steering(trigger=lambda: None, reschedule=lambda _: None),
    )
