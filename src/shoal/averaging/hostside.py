"""The host's end of an averager: copies between the user's tensors and the arena when the background process
asks for it.

Holds no reference to the averager itself, so that an averager that nobody refers to any more is collected.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from shoal.averaging.commands import ApplyAverage, ReachStage, TakeSnapshot
from shoal.averaging.control import StepControl
from shoal.averaging.partition import Layout
from shoal.averaging.tensors import TensorStore, first_non_finite
from shoal.errors import AllreduceException, DeadlineExceeded, InvalidStateError, InvalidValueError
from shoal.runtime.memory import SharedMemory

if TYPE_CHECKING:
    from shoal.averaging.report import RoundReport

logger = logging.getLogger(__name__)

LOCK_TIMEOUT = 30.0
"""Seconds for which a round waits for the lock before its snapshot; groupmates wait with it."""


class TensorKeeper:
    """The tensors of one averager, their arena, and the steps that are under way."""

    def __init__(self, store: TensorStore, layout: Layout, alpha: float) -> None:
        self.store = store
        self.layout = layout
        self.controls: dict[int, StepControl] = {}
        self.last_report: RoundReport | None = None
        self._alpha = alpha
        self._memory: SharedMemory | None = None

    def create_memory(self) -> SharedMemory:
        """The shared memory of both areas: the snapshot, and the average behind it."""
        self._memory = SharedMemory.create(max(1, 2 * self.layout.nbytes))
        return self._memory

    def close(self) -> None:
        memory, self._memory = self._memory, None
        if memory is not None:
            memory.close()

    def handle(self, command: object) -> object:
        """Carry out a request of the service; runs on a thread of the averager, one request after the other."""
        match command:
            case ReachStage(step, stage):
                if step in self.controls:
                    self.controls[step].reach(stage)
            case TakeSnapshot():
                self._take_snapshot()
            case ApplyAverage():
                self.store.apply(self._area(0), self._area(1), self._alpha)
            case _:
                raise InvalidStateError(f"the host has no command {type(command).__name__}")
        return None

    def _area(self, number: int) -> memoryview:
        if self._memory is None:
            raise InvalidStateError("the averager was shut down")
        size = self.layout.nbytes
        return self._memory.buffer[number * size : (number + 1) * size]

    def _take_snapshot(self) -> None:
        area = self._area(0)
        try:
            self.store.snapshot(area, timeout=LOCK_TIMEOUT)
        except DeadlineExceeded as e:
            logger.warning("withdrawing from a round, whose other members wait: %s", e)
            raise AllreduceException(f"withdrawn from the round: {e}") from e
        index = first_non_finite(self.layout, area)
        if index is not None:
            raise InvalidValueError(
                f"averaged_tensors[{index}] has NaN or infinite elements; nothing was sent"
            )
