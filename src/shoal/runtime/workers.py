"""Threads that run what they are given, one after the other."""

from __future__ import annotations

import logging
import queue
import threading
from collections import deque
from collections.abc import Callable

logger = logging.getLogger(__name__)


class SerialThread:
    """Runs callables in order on one daemon thread, which starts with the first of them if not before."""

    def __init__(self, name: str) -> None:
        self._name = name
        # SimpleQueue may be used from signal handlers and garbage collection, on the same thread.
        self._queue: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._lock = threading.RLock()
        self._thread: threading.Thread | None = None

    @property
    def backlog(self) -> int:
        """How many callables have not begun yet."""
        return self._queue.qsize()

    def start(self) -> None:
        """Start the thread now: once the interpreter is ending, no thread can be started any more."""
        with self._lock:
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name=self._name, daemon=True)
                self._thread.start()

    def submit(self, work: Callable[[], None]) -> None:
        self._queue.put(work)
        if self._thread is None:
            self.start()

    def stop(self, timeout: float = 0.0) -> None:
        """End the thread after what it was given before; wait for that for ``timeout`` seconds at most."""
        self._queue.put(None)
        thread = self._thread
        if thread is not None and thread is not threading.current_thread():
            thread.join(timeout)

    def _run(self) -> None:
        while (work := self._queue.get()) is not None:
            _run_logged(work, self._name)
            del work


class Strand:
    """Runs callables in order, one at a time, on a thread that lives for as long as there is one to run: there is
    nothing to stop, and nothing that was submitted is ever lost.
    """

    def __init__(self, name: str) -> None:
        self._name = name
        self._lock = threading.RLock()
        self._waiting: deque[Callable[[], None]] = deque()
        self._is_running = False

    def submit(self, work: Callable[[], None]) -> None:
        with self._lock:
            self._waiting.append(work)
            if self._is_running:
                return
            self._is_running = True
        try:
            threading.Thread(target=self._run, name=self._name, daemon=True).start()
        except RuntimeError:  # the interpreter is ending: no thread can be started, and none is held up
            self._run()

    def _run(self) -> None:
        while True:
            with self._lock:
                if not self._waiting:
                    self._is_running = False
                    return
                work = self._waiting.popleft()
            _run_logged(work, self._name)
            del work


def _run_logged(work: Callable[[], None], name: str) -> None:
    """The outer edge of a thread, which has more to run: what it runs are callables of users, too, that may call
    sys.exit().
    """
    try:
        work()
    except BaseException:
        logger.exception("%s failed", name)
