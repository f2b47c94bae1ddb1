"""How a round gets at the values of the tensors, and how its average gets to them.

A *transfer* knows both areas of the arena. :class:`CopyingTransfer` is the usual one: the user's tensors lie
elsewhere, and may change while a round runs. :class:`~.in_place.InPlaceTransfer` is for tensors that are the first
area themselves.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from shoal.averaging.trainer.tensors import TensorStore
from shoal.errors import InvalidStateError
from shoal.runtime.memory import SharedMemory


class Transfer(Protocol):
    """Moves values between the tensors and the arena. Each call that does so holds the lock of the tensors."""

    holds_values: bool
    """Whether the first area is never empty: the tensors themselves lie there."""
    why_not_late: str
    """Why an average can't be written once its step has ended; empty: it can."""

    def claim(self, holder: str) -> None:
        """The averager starts. ``holder``: what errors call it.

        :raises InvalidStateError: another averager has the memory
        """

    def open(self) -> SharedMemory:
        """The memory of both areas, to be attached in the background process."""

    def snapshot(
        self, step: int, *, checks_finite: bool, timeout: float | None, abandoned: Callable[[], bool]
    ) -> int | None:
        """A round of ``step`` begins: have the tensors' values in the first area. As :meth:`.TensorStore.snapshot`."""

    def apply(self, alpha: float, abandoned: Callable[[], bool]) -> None:
        """Write the average that is in the second area to the tensors; raises as :meth:`.TensorStore.apply` does."""

    def is_read_by(self, step: int) -> bool:
        """Whether the round of ``step`` may still read the tensors themselves."""

    def release(self, step: int) -> None:
        """The round of ``step`` has let go of the arena, and has no average for it."""

    def close(self) -> None:
        """The averager has ended here; its service may still have the memory."""

    @property
    def give_back(self) -> Callable[[], None]:
        """To be called when its service has ended, too. Keeps no tensor alive."""


class CopyingTransfer:
    """Copies the tensors to an arena of its own, and averages from there. What is written to them meanwhile is kept."""

    holds_values = False
    why_not_late = ""

    def __init__(self, store: TensorStore) -> None:
        self._store = store
        self._memory: SharedMemory | None = None

    def claim(self, holder: str) -> None:
        pass

    def open(self) -> SharedMemory:
        self._memory = SharedMemory.create(max(1, 2 * self._store.layout.nbytes))
        return self._memory

    def snapshot(
        self, step: int, *, checks_finite: bool, timeout: float | None, abandoned: Callable[[], bool]
    ) -> int | None:
        return self._store.snapshot(
            self._area(0), checks_finite=checks_finite, timeout=timeout, abandoned=abandoned
        )

    def apply(self, alpha: float, abandoned: Callable[[], bool]) -> None:
        self._store.apply(self._area(0), self._area(1), alpha, abandoned=abandoned)

    def is_read_by(self, step: int) -> bool:
        return False

    def release(self, step: int) -> None:
        pass

    def close(self) -> None:
        memory, self._memory = self._memory, None
        if memory is not None:
            memory.close()

    @property
    def give_back(self) -> Callable[[], None]:
        return _nothing

    def _area(self, number: int) -> memoryview:
        if self._memory is None:
            raise InvalidStateError("the averager was shut down")
        size = self._store.layout.nbytes
        return self._memory.buffer[number * size : (number + 1) * size]


def _nothing() -> None:
    """An arena of one's own is given back when it is closed."""
