"""When the average of a committed round is written to the user's tensors: as soon as it is there, or when the user
calls.

The arena keeps an average that waits for the user's call, so no further round begins until it is written.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Literal, TypeAlias, get_args

import torch

from shoal.averaging.trainer.tensors import TensorStore
from shoal.errors import InvalidStateError

ApplyWhen: TypeAlias = Literal["ready", "called"]
"""When an average is written: as soon as it is ready, on a thread of the averager; or when the user calls
``apply_average()`` or ``step()``, on the user's thread.
"""
APPLY_WHEN: tuple[str, ...] = get_args(ApplyWhen)

WATCH_ADVICE: Mapping[str, str] = {
    "ready": "Update inside `with averager.get_tensors():`, or make the averager with apply_when='called'",
    "called": "Call apply_average() and step() on the thread that updates the tensors",
}
"""What to do when :class:`~.lost_updates.UpdateWatch` has noticed something."""


class AverageWriter:
    """Writes averages when it is their time. Its state is guarded by the lock of the tensors.

    :param write: writes the average that is in the arena
    :param on_call: leave it to the user to say when
    """

    def __init__(self, store: TensorStore, write: Callable[[], None], *, on_call: bool) -> None:
        self._store = store
        self._write = write
        self.on_call = on_call
        self._pending: int | None = None
        self._callers_in_step = 0
        self.notify_written: Callable[[], object] = lambda: None
        """Tells the background process that the arena is free again."""

    def deliver(self, step: int, abandoned: Callable[[], bool]) -> bool:
        """The round of ``step`` has committed.

        :returns: whether its average was written; otherwise it waits for :meth:`apply`
        """
        if not self.on_call:
            self._write()
            return True
        with self._store.lock(None, abandoned):
            if self._callers_in_step == 0:
                self._pending = step
                return False
            self._write_visibly()
            return True

    def apply(self) -> bool:
        """Write the average that waits for it, if there is one; returns whether there was.

        :raises InvalidStateError: it can't be written: a tensor has another shape now, for instance. It is dropped.
        """
        if not self.on_call:
            return False
        with self._store.lock():
            step, self._pending = self._pending, None
            if step is None:
                return False
            self._store.mark_stream()
            try:
                self._write_visibly()
            except InvalidStateError as e:
                raise InvalidStateError(f"the average of step {step} could not be written: {e}") from e
            finally:
                self.notify_written()
            return True

    def drop(self) -> int | None:
        """The averager ends; returns the number of the step whose average nobody has called for. Waits for no lock."""
        step, self._pending = self._pending, None
        return step

    @contextmanager
    def caller_in_step(self) -> Iterator[None]:
        """While a caller waits inside ``step(wait=True)``, averages are written as soon as they are ready."""
        if not self.on_call:
            yield
            return
        with self._store.lock():
            self._callers_in_step += 1
        try:
            self.apply()
            yield
        finally:
            with self._store.lock():
                self._callers_in_step -= 1

    def _write_visibly(self) -> None:
        self._write()
        # A backward pass whose forward pass used the old values is an error of autograd from now on.
        for tensor in self._store.tensors:
            if not tensor.is_inference():
                torch.autograd.graph.increment_version(tensor)
