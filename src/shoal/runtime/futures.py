"""A future that threads can wait for and coroutines can await: what calls return."""

from __future__ import annotations

import asyncio
import concurrent.futures
import os
from collections.abc import Callable, Generator
from typing import Any, TypeVar

from shoal.errors import InvalidStateError

T = TypeVar("T")


class MPFuture(concurrent.futures.Future[T]):
    """A :class:`concurrent.futures.Future` that can also be awaited in any event loop.

    Cancelling a future of a call cancels the call itself in the background process; so does cancelling a task
    that awaits it. Callbacks of a call's future may block and may make further calls: they do not run on the
    thread that receives results. In a forked child process a future that was not finished yet raises
    :class:`~shoal.errors.InvalidStateError`, since its result will arrive in the parent only.

    :param on_cancel: called when the future was cancelled; true if nobody else will notify those who wait for
        it
    :param dispatch: given a callable, runs it now or on another thread; for done-callbacks
    """

    def __init__(
        self,
        on_cancel: Callable[[], bool] | None = None,
        dispatch: Callable[[Callable[[], None]], None] | None = None,
    ) -> None:
        super().__init__()
        self._on_cancel = on_cancel
        self._dispatch = dispatch
        self._owner_pid = os.getpid()

    def cancel(self) -> bool:
        if not super().cancel():
            return False
        if self._on_cancel is not None and self._on_cancel():
            self.set_running_or_notify_cancel()
        return True

    def result(self, timeout: float | None = None) -> T:
        self._check_process()
        return super().result(timeout)

    def exception(self, timeout: float | None = None) -> BaseException | None:
        self._check_process()
        return super().exception(timeout)

    def add_done_callback(self, fn: Callable[[concurrent.futures.Future[T]], Any]) -> None:
        dispatch = self._dispatch
        if dispatch is None or self.done():
            super().add_done_callback(fn)
        else:
            super().add_done_callback(lambda future: dispatch(lambda: fn(future)))

    def __await__(self) -> Generator[Any, None, T]:
        return asyncio.wrap_future(self).__await__()

    def __reduce__(self) -> tuple[Any, ...]:
        from shoal.errors import InvalidTypeError

        raise InvalidTypeError("a future cannot be pickled or copied; send its result instead")

    def _check_process(self) -> None:
        if os.getpid() != self._owner_pid and not self.done():
            raise InvalidStateError(
                "this future belongs to the parent process: it was forked before the result arrived, "
                "which only the parent will receive"
            )
