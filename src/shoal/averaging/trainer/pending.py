"""When the average of a committed round is written to the user's tensors: as soon as it is there, or when the user
calls.

The arena keeps an average that waits for the user's call, so no further round begins until it is written.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Literal, TypeAlias, get_args

from shoal.averaging.trainer.arena import TensorArena
from shoal.errors import InvalidStateError

logger = logging.getLogger(__name__)

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

    :param arena: writes the average that is in it
    :param on_call: leave it to the user to say when
    :param name: of the averager, for people
    """

    def __init__(self, arena: TensorArena, *, on_call: bool = False, name: str = "") -> None:
        self.arena = arena
        self._store = arena.store
        self.on_call = on_call
        self._name = name
        self._pending: int | None = None
        self._callers_in_step = 0
        self.notify_written: Callable[[], object] = lambda: None
        """Tells the background process that the arena is free again."""

    def deliver(self, step: int) -> bool:
        """The round of ``step`` has committed.

        :returns: whether its average was written; otherwise it waits for :meth:`apply`
        """
        if not self.on_call:
            self.arena.write_average()
            return True
        with self._store.lock(None, lambda: self.arena.is_ending):
            if self._callers_in_step == 0:
                self._pending = step
                return False
            self.arena.write_visibly()
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
                self.arena.write_visibly()
            except InvalidStateError as e:
                raise InvalidStateError(f"the average of step {step} could not be written: {e}") from e
            finally:
                self.notify_written()
            return True

    def close(self) -> None:
        """The averager ends: an average that waits for the user's call is dropped, with a warning. No lock is taken."""
        step, self._pending = self._pending, None
        if step is not None:
            logger.warning(
                "%s: shut down before the average of step %d was applied: the tensors lack it; call apply_average() "
                "before shutdown()",
                self._name,
                step,
            )

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
