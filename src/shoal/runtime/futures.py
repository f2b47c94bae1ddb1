"""A future that threads can wait for and coroutines can await: what calls return."""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import itertools
import os
import threading
import time
from collections.abc import Callable, Generator
from typing import Any, TypeVar

from shoal.errors import InvalidStateError

S = TypeVar("S")
T = TypeVar("T")

AWAKE = 1.0
"""Seconds after which a thread that waits looks up. Python runs the handlers of signals in the main thread. A signal
that comes in the moment when that begins to wait does not wake it: Ctrl+C would be heard when the wait is over.
"""

_FINISHED = ("CANCELLED", "CANCELLED_AND_NOTIFIED", "FINISHED")


class MPFuture(concurrent.futures.Future[T]):
    """A :class:`concurrent.futures.Future` that can also be awaited in any event loop.

    Cancelling a future of a call cancels the call itself in the background process; so does cancelling a task
    that awaits it. Callbacks of a call's future may block and may make further calls: they do not run on the
    thread that receives results. It belongs to the process that made it: in a forked child, whatever is asked of one
    that had not finished raises :class:`~shoal.errors.InvalidStateError`, since neither side would see what the other
    makes of it.

    :param on_cancel: called when the future was cancelled; true if nobody else will notify those who wait for
        it
    :param dispatch: given a callable, runs it now or on another thread; for done-callbacks
    :param explain: what to raise, instead of a plain TimeoutError, when a wait for the result was too short; None: that
    """

    def __init__(
        self,
        on_cancel: Callable[[], bool] | None = None,
        dispatch: Callable[[Callable[[], None]], None] | None = None,
        explain: Callable[[], Exception | None] | None = None,
    ) -> None:
        self._owner_pid = os.getpid()
        super().__init__()
        self._on_cancel = on_cancel
        self._dispatch = dispatch
        self._explain = explain

    # Every method of Future, wait() and as_completed() go through its condition: there is no way past this check.
    @property
    def _condition(self) -> threading.Condition:
        if os.getpid() == self._owner_pid:
            return self._own_condition
        self.check_process()
        # A thread of the parent may have held the other one when this was forked.
        return threading.Condition()

    @_condition.setter
    def _condition(self, condition: threading.Condition) -> None:
        self._own_condition = condition

    def check_process(self) -> None:
        """:raises InvalidStateError: this is another process than the future's, which is not finished"""
        if os.getpid() != self._owner_pid and self._state not in _FINISHED:
            raise InvalidStateError(
                f"this future belongs to process {self._owner_pid}, and this is process {os.getpid()}, which was "
                "forked from it: what one of them does with the future, the other never sees. Use the future where it "
                "was made; to hand something from one process to the other, use a multiprocessing.Queue or Pipe"
            )

    def cancel(self) -> bool:
        if not super().cancel():
            return False
        if self._on_cancel is not None and self._on_cancel():
            self.set_running_or_notify_cancel()
        return True

    def result(self, timeout: float | None = None) -> T:
        self._outlast(timeout)
        try:
            return super().result(None if timeout is None else 0)
        except TimeoutError:
            late = self.why_late()
            if late is None:
                raise
            raise late from None
        finally:
            del self  # as Future does: the error that it holds would refer to this frame, and thereby to it

    def exception(self, timeout: float | None = None) -> BaseException | None:
        self._outlast(timeout)
        try:
            return super().exception(None if timeout is None else 0)
        except TimeoutError:
            late = self.why_late()
            if late is None:
                raise
            raise late from None

    def _outlast(self, timeout: float | None) -> None:
        """Wait until it is done, or so many seconds have passed."""
        deadline = None if timeout is None else time.monotonic() + timeout
        while not self.done():
            left = AWAKE if deadline is None else min(AWAKE, deadline - time.monotonic())
            if left <= 0:
                return
            with contextlib.suppress(TimeoutError, concurrent.futures.CancelledError):
                super().exception(left)

    def why_late(self) -> Exception | None:
        """The error of a wait that was too short, where the result will not come by itself: the process that has to
        make it is silent. None: there is a result, or it may still come.
        """
        explain = self._explain
        return None if self.done() or explain is None else explain()

    def add_done_callback(self, fn: Callable[[concurrent.futures.Future[T]], Any]) -> None:
        dispatch = self._dispatch
        if dispatch is None or self.done():
            super().add_done_callback(fn)
        else:
            super().add_done_callback(lambda future: dispatch(lambda: fn(future)))

    def when_done(self, call: Callable[[concurrent.futures.Future[T]], Any]) -> None:
        """Call on the thread that finishes the future, or now: for callbacks of Shoal, which do not block.

        Those of users go by ``dispatch``, where others may be waiting for this very future.
        """
        super().add_done_callback(call)

    def __await__(self) -> Generator[Any, None, T]:
        return asyncio.wrap_future(self).__await__()

    def __reduce__(self) -> tuple[Any, ...]:
        from shoal.errors import InvalidTypeError

        raise InvalidTypeError("a future cannot be pickled or copied; send its result instead")


def chain(first: MPFuture[S], begin: Callable[[S], MPFuture[T]]) -> MPFuture[T]:
    """A future of the call that ``begin`` makes with the result of ``first``, as soon as there is one.

    It fails as ``first``, ``begin`` or the call does. Cancelling it cancels the call, or keeps it from being made;
    ``first`` may have others who wait for it and is left alone. ``begin`` must not block: it runs on the thread that
    receives results, or here if ``first`` is done.
    """
    calls: list[MPFuture[T]] = []
    cancellations = itertools.count()

    def cancel_call() -> bool:
        is_first = next(cancellations) == 0
        for call in calls:
            call.cancel()
        return is_first

    def why_late() -> Exception | None:
        return calls[0].why_late() if calls else first.why_late()

    outer: MPFuture[T] = MPFuture(cancel_call, first._dispatch, why_late)

    def first_done(_: concurrent.futures.Future[S]) -> None:
        if first.cancelled():
            outer.cancel()
        if outer.cancelled():
            return
        try:
            call = begin(first.result())
        except Exception as error:  # noqa: BLE001 - whatever it is, who waits for the outer future is told
            _fail(outer, error)
            return
        calls.append(call)
        # A thread that cancels looks into the list afterwards: one of the two sees the other.
        if outer.cancelled():
            call.cancel()
        call.when_done(call_done)

    def call_done(call: concurrent.futures.Future[T]) -> None:
        if call.cancelled():
            outer.cancel()
        elif (error := call.exception()) is not None:
            _fail(outer, error)
        else:
            with contextlib.suppress(concurrent.futures.InvalidStateError):  # cancelled in the same moment
                outer.set_result(call.result())

    first.when_done(first_done)
    return outer


def _fail(future: MPFuture[Any], error: BaseException) -> None:
    with contextlib.suppress(concurrent.futures.InvalidStateError):  # cancelled in the same moment
        future.set_exception(error)
