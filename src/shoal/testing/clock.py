"""A virtual clock for asyncio: code that sleeps for hours runs in milliseconds, and every run is the same.

:class:`VirtualClockLoop` is an asyncio event loop whose ``time()`` stands still while anything is ready to
run and then jumps to the next timer. It polls no file descriptor: everything that runs on it communicates
through memory (see :mod:`shoal.testing.network`). Executors run inline, so that no thread can change the
order of events.
"""

from __future__ import annotations

import asyncio
import heapq
import inspect
import selectors
from collections.abc import Awaitable, Callable, Coroutine, Mapping
from typing import Any, TypeVar

T = TypeVar("T")

__all__ = ["Deadlock", "VirtualClockLoop", "VirtualTimeLimitExceeded", "run"]


class Deadlock(AssertionError):
    """Nothing is ready and no timer is set, but the program has not finished: it would wait for ever."""


class VirtualTimeLimitExceeded(AssertionError, TimeoutError):
    """The program was still running after the limit of virtual seconds."""


class _JumpingSelector(selectors.BaseSelector):
    """Stands where the loop would wait for sockets, and moves the clock instead of waiting."""

    def __init__(self) -> None:
        self.now = 0.0
        self.limit = float("inf")
        self._keys: dict[int, selectors.SelectorKey] = {}

    def register(self, fileobj: Any, events: int, data: Any = None) -> selectors.SelectorKey:
        descriptor = fileobj if isinstance(fileobj, int) else fileobj.fileno()
        key = selectors.SelectorKey(fileobj, descriptor, events, data)
        self._keys[descriptor] = key
        return key

    def unregister(self, fileobj: Any) -> selectors.SelectorKey:
        descriptor = fileobj if isinstance(fileobj, int) else fileobj.fileno()
        return self._keys.pop(descriptor)

    def get_map(self) -> Mapping[Any, selectors.SelectorKey]:
        return self._keys

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        if timeout is None:
            raise Deadlock("nothing is ready and no timer is set: the program would wait for ever")
        if timeout > 0:
            if self.now + timeout > self.limit:
                self.now = self.limit
                raise VirtualTimeLimitExceeded(f"still running after {self.limit:g} virtual seconds")
            self.now += timeout
        return []


class VirtualClockLoop(asyncio.SelectorEventLoop):
    """An event loop on virtual time, starting at 0; deterministic as long as the program's own choices are.

    Timers of the same instant run in the order in which they were set. ``run_in_executor`` runs its function
    at once, in the caller. Sockets and subprocesses do not work here. :class:`Deadlock` is raised out of
    ``run_until_complete`` when nothing can ever happen again.
    """

    def __init__(self) -> None:
        self._virtual = _JumpingSelector()
        super().__init__(self._virtual)
        self._timer_count = 0
        self.unhandled: list[str] = []
        """What the loop's exception handler was told: failures that no other code saw."""
        self._failed_tasks: list[asyncio.Task[Any]] = []
        self.set_exception_handler(self._note_unhandled)
        self.set_task_factory(self._make_task)  # type: ignore[arg-type]

    def time(self) -> float:
        return self._virtual.now

    def set_limit(self, limit: float) -> None:
        """Make time stop at ``limit`` virtual seconds: going on raises :class:`VirtualTimeLimitExceeded`."""
        self._virtual.limit = limit

    def call_at(  # type: ignore[override]
        self, when: float, callback: Callable[..., object], *args: Any, context: Any = None
    ) -> asyncio.TimerHandle:
        # As the base class, but with handles that keep the order in which they were made at equal times
        # (a heap alone would order them by its shape).
        self._timer_count += 1
        timer = _OrderedTimer(when, callback, args, self, context, self._timer_count)
        heapq.heappush(self._scheduled, timer)  # type: ignore[attr-defined]
        timer._scheduled = True  # type: ignore[attr-defined]
        return timer

    def call_later(  # type: ignore[override]
        self, delay: float, callback: Callable[..., object], *args: Any, context: Any = None
    ) -> asyncio.TimerHandle:
        return self.call_at(self.time() + delay, callback, *args, context=context)

    def run_in_executor(  # type: ignore[override]
        self, executor: Any, func: Callable[..., T], *args: Any
    ) -> asyncio.Future[T]:
        future: asyncio.Future[T] = self.create_future()
        try:
            future.set_result(func(*args))
        except Exception as error:  # noqa: BLE001 - belongs to the one that awaits the future, like an executor's
            future.set_exception(error)
        return future

    def close(self) -> None:
        if not self.is_closed():
            self.set_task_factory(None)
        super().close()

    def unseen_failures(self) -> list[str]:
        """Everything that failed without anybody looking, in the order in which it happened."""
        unseen = [task for task in self._failed_tasks if _is_unseen(task)]
        return self.unhandled + [
            f"{task!r} failed and nobody looked: {task.exception()!r}" for task in unseen
        ]

    def _make_task(
        self, loop: asyncio.AbstractEventLoop, coro: Coroutine[Any, Any, Any], **options: Any
    ) -> asyncio.Task[Any]:
        task: asyncio.Task[Any] = asyncio.Task(coro, loop=loop, **options)
        task.add_done_callback(self._note_failed_task)
        return task

    def _note_failed_task(self, task: asyncio.Task[Any]) -> None:
        # Those that somebody has looked at since are let go: their errors hold what they worked with.
        self._failed_tasks = [one for one in (*self._failed_tasks, task) if _is_unseen(one)]

    def _note_unhandled(self, loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        error = context.get("exception")
        self.unhandled.append(f"{context.get('message')}: {error!r}")


class _OrderedTimer(asyncio.TimerHandle):
    """A timer handle that compares by time, then by the order of creation."""

    __slots__ = ("order",)

    def __init__(
        self, when: float, callback: Callable[..., object], args: Any, loop: Any, context: Any, order: int
    ) -> None:
        super().__init__(when, callback, args, loop, context)
        self.order = order

    def __lt__(self, other: object) -> bool:
        # Called a dozen times for each timer: the attributes themselves, and no tuples.
        if not isinstance(other, _OrderedTimer):
            return NotImplemented
        mine, its = self._when, other._when  # type: ignore[attr-defined]
        return bool(mine < its or (mine == its and self.order < other.order))


def _is_unseen(task: asyncio.Task[Any]) -> bool:
    # asyncio's own mark for "has an exception that nobody retrieved", which task.exception() would clear.
    return bool(getattr(task, "_log_traceback", False))


def run(main: Callable[[], Awaitable[T]] | Awaitable[T], *, limit: float = 3600.0) -> T:
    """Run a coroutine (or a function that returns one) on a fresh :class:`VirtualClockLoop`.

    Returns its result. Raises :class:`Deadlock` or :class:`VirtualTimeLimitExceeded` with a list of tasks and
    where each of them waits, and ``AssertionError`` if a task was left behind or a failure that nobody saw.
    """
    loop = VirtualClockLoop()
    loop.set_limit(limit)
    try:
        asyncio.set_event_loop(loop)
        awaitable = main() if callable(main) else main
        task: asyncio.Task[T] = loop.create_task(
            awaitable if inspect.iscoroutine(awaitable) else _await(awaitable)
        )
        try:
            result = loop.run_until_complete(task)
        except (Deadlock, VirtualTimeLimitExceeded) as error:
            waiting = "\n".join(_describe(pending) for pending in _pending_tasks(loop))
            _cancel_all(loop)
            raise type(error)(f"{error}; tasks:\n{waiting}") from None
        except BaseException:
            _cancel_all(loop)
            raise
        _raise_for_leftovers(loop)
        return result
    finally:
        loop.run_until_complete(loop.shutdown_asyncgens())
        asyncio.set_event_loop(None)
        loop.close()


async def _await(awaitable: Awaitable[T]) -> T:
    return await awaitable


def _raise_for_leftovers(loop: VirtualClockLoop) -> None:
    left = _pending_tasks(loop)
    if left:
        described = "\n".join(_describe(task) for task in left)
        _cancel_all(loop)
        raise AssertionError(f"tasks were left behind:\n{described}")
    failures = loop.unseen_failures()
    if failures:
        raise AssertionError("failures that nobody saw:\n" + "\n".join(failures))


def _pending_tasks(loop: VirtualClockLoop) -> list[asyncio.Task[Any]]:
    return sorted(asyncio.all_tasks(loop), key=lambda task: task.get_name())


def _cancel_all(loop: VirtualClockLoop) -> None:
    pending = _pending_tasks(loop)
    for task in pending:
        task.cancel()
    if pending:
        loop.set_limit(float("inf"))
        loop.run_until_complete(asyncio.gather(*pending, return_exceptions=True))


def _describe(task: asyncio.Task[Any]) -> str:
    frames = task.get_stack(limit=1)
    where = f"{frames[-1].f_code.co_filename}:{frames[-1].f_lineno}" if frames else "not started"
    return f"  {task.get_name()}: {task.get_coro()!r} at {where}"
