"""One lock for one memory: averagers of this process whose tensors overlap exclude each other.

Each :class:`MemoryGuard` has a lock of its own. It takes the locks of other guards besides, if their tensors share
memory with its own and they have no lock in common yet. So of two guards that overlap, the one that looked last takes
the other's lock. No thread waits for one of its locks while it keeps another one, so no two wait for each other.

Guards only ever gain locks. Dropping one could part two guards that had it in common.
"""

from __future__ import annotations

import logging
import os
import threading
import time
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch

from shoal.averaging.trainer.tensor_checks import lacks_storage, memory_in_common
from shoal.errors import DeadlineExceeded, InvalidStateError

logger = logging.getLogger(__name__)

LOOK_SECONDS = 0.05
"""While waiting for the lock: time between two looks at whether that still makes sense."""


class TensorLock:
    """A re-entrant lock that knows which thread has held it, and since when."""

    def __init__(self) -> None:
        self._lock = threading.RLock()
        self._holder: int | None = None
        self._holder_name = ""
        self._held_since = 0.0
        self._depth = 0

    @property
    def held_by_this_thread(self) -> bool:
        return self._holder == threading.get_ident()

    def acquire(self, deadline: float, abandoned: Callable[[], bool] | None = None) -> bool:
        """
        :param deadline: on the monotonic clock
        :raises InvalidStateError: the wait was abandoned
        """
        if not self._wait(deadline, abandoned):
            return False
        if self._depth == 0:
            self._holder = threading.get_ident()
            self._holder_name = threading.current_thread().name
            self._held_since = time.monotonic()
        self._depth += 1
        return True

    def release(self) -> None:
        self._depth -= 1
        if self._depth == 0:
            self._holder = None
        self._lock.release()

    def __str__(self) -> str:
        held = time.monotonic() - self._held_since
        return f"thread {self._holder_name!r} has held it for {held:.1f} s"

    def _wait(self, deadline: float, abandoned: Callable[[], bool] | None) -> bool:
        if abandoned is None:
            left = deadline - time.monotonic()
            return self._lock.acquire(timeout=max(0.0, min(left, threading.TIMEOUT_MAX)))
        while not abandoned():
            left = deadline - time.monotonic()
            if self._lock.acquire(timeout=max(0.0, min(left, LOOK_SECONDS))):
                if not abandoned():
                    return True
                self._lock.release()
            elif left <= LOOK_SECONDS:
                return False
        raise InvalidStateError("nobody needs the averaged tensors any more")


class MemoryGuard:
    """What one averager holds to touch its tensors.

    :param tensors: gives those of the averager as they are known now; called on any thread
    :param name: of the averager, for people
    """

    def __init__(self, tensors: Callable[[], Sequence[torch.Tensor]], name: str = "") -> None:
        # Not weak references to them: torch.utils.swap_tensors refuses tensors that have any.
        self._tensors = tensors
        self._name = name
        self._own = TensorLock()
        self._locks: tuple[TensorLock, ...] = (self._own,)
        self._neighbours: weakref.WeakSet[MemoryGuard] = weakref.WeakSet()
        self._round_is_open = False
        self._crossed_by: str | None = None
        self._has_warned = False
        _live.add(self)
        self.look_around()

    @contextmanager
    def hold(
        self, timeout: float | None = None, abandoned: Callable[[], bool] | None = None
    ) -> Iterator[None]:
        """Hold all locks (re-entrant).

        :param timeout: seconds to wait for them
        :param abandoned: whether nobody needs them any more; asked while waiting, and when they are held
        :raises DeadlineExceeded: not free in time; says which thread has held it for how long
        :raises InvalidStateError: the wait was abandoned
        """
        limit = threading.TIMEOUT_MAX if timeout is None else min(timeout, threading.TIMEOUT_MAX)
        deadline = time.monotonic() + limit
        locks = self._locks
        missing: TensorLock | None = locks[0]
        while missing is not None:
            first = missing
            if not first.acquire(deadline, abandoned):
                raise DeadlineExceeded(
                    f"the lock of the averaged tensors was not free within {timeout:g} s: {first}"
                )
            missing = _acquire_besides(first, locks)
        try:
            yield
        finally:
            for lock in locks:
                lock.release()

    @property
    def held_by_this_thread(self) -> bool:
        """Whether this thread holds a lock that :meth:`hold` takes, be it for another averager."""
        return any(lock.held_by_this_thread for lock in self._locks)

    def look_around(self) -> bool:
        """Find the guards whose tensors share memory with this one's, as they lie now.

        :returns: whether :meth:`hold` takes a further lock from now on; hold it anew then
        """
        return _live.connect(self)

    # Rounds of two averagers on one memory: each adds its correction, and the sum of both goes too far.

    def begin_round(self) -> None:
        """The tensors are being copied for a round; call it under the lock."""
        self._round_is_open, self._crossed_by = True, None

    def end_round(self) -> None:
        """The average is being written; call it under the lock. Warns, once, if another averager has written its own
        since :meth:`begin_round`.
        """
        for neighbour in list(self._neighbours):
            if neighbour._round_is_open:
                neighbour._crossed_by = self._name
        self._round_is_open = False
        if self._crossed_by is not None and not self._has_warned:
            self._has_warned = True
            logger.warning(
                "%s: while a round of this averager ran, averager %r wrote its average to the same tensors; both "
                "corrections are added, which goes beyond either average. Step averagers of the same tensors one "
                "after the other",
                self._name,
                self._crossed_by,
            )


class _LiveGuards:
    """The guards of this process. A forked child begins with none: the parent's averagers do not run in it."""

    def __init__(self) -> None:
        self._guards: weakref.WeakSet[MemoryGuard] = weakref.WeakSet()
        self._lock = threading.RLock()
        self._watches_forks = False

    def add(self, guard: MemoryGuard) -> None:
        with self._lock:
            if not self._watches_forks:
                self._watches_forks = True
                os.register_at_fork(after_in_child=self._forget_all)
            self._guards.add(guard)

    def connect(self, guard: MemoryGuard) -> bool:
        with self._lock:
            others = [other for other in self._guards if other is not guard]
            tensors = _lying(guard) if others else []
            neighbours = [other for other in others if memory_in_common(tensors, _lying(other))]
            for other in set(guard._neighbours).difference(neighbours):
                guard._neighbours.discard(other)
                other._neighbours.discard(guard)
            former = guard._locks
            for other in neighbours:
                guard._neighbours.add(other)
                other._neighbours.add(guard)
                if not set(guard._locks).intersection(other._locks):
                    guard._locks = (*guard._locks, other._own)
            return guard._locks != former

    def _forget_all(self) -> None:
        self._guards = weakref.WeakSet()
        self._lock = threading.RLock()  # a thread that the child lacks may have held the old one


def _acquire_besides(held: TensorLock, locks: tuple[TensorLock, ...]) -> TensorLock | None:
    """Acquire all of ``locks`` but ``held``, which this thread has just acquired; None: done.

    If one is not free, all are released, and that one is returned: the caller is to wait for it first. So no thread
    waits for a lock while it keeps another one that it has taken for the same purpose.
    """
    taken = [held]
    for lock in locks:
        if lock is held:
            continue
        if not lock.acquire(deadline=0.0):
            for other in taken:
                other.release()
            return lock
        taken.append(lock)
    return None


def _lying(guard: MemoryGuard) -> list[torch.Tensor]:
    """The tensors of a guard that have memory now."""
    return [
        tensor
        for tensor in guard._tensors()
        if tensor.layout == torch.strided and not tensor.is_meta and not lacks_storage(tensor)
    ]


_live = _LiveGuards()
