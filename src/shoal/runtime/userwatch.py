"""Notices that the user process has ended, however it ended; runs on a thread of the background process.

A pidfd where the kernel has it, kqueue on macOS, else the number of the parent. Not ``PR_SET_PDEATHSIG``,
which follows the thread that started the process, not the user process.
"""

from __future__ import annotations

import os
import select
import sys
import threading
import time
from collections.abc import Callable

_POLL_INTERVAL = 0.25  # seconds, where the kernel offers nothing better


def watch_user_process(user_pid: int, on_exit: Callable[[], None]) -> None:
    """Call ``on_exit`` on a daemon thread when the process ``user_pid``, our parent, has ended."""
    wait = _waiter(user_pid)

    def watch() -> None:
        wait()
        on_exit()

    threading.Thread(target=watch, name="shoal-user-watch", daemon=True).start()


def _waiter(user_pid: int) -> Callable[[], None]:
    wait = _pidfd_waiter(user_pid) or _kqueue_waiter(user_pid)

    def poll_parent() -> None:
        while os.getppid() == user_pid:
            time.sleep(_POLL_INTERVAL)

    # Had the user process ended before it could be watched, its number might be another process's by now: but then it
    # would be our parent no longer, and poll_parent returns at once.
    return wait if wait is not None and os.getppid() == user_pid else poll_parent


def _pidfd_waiter(user_pid: int) -> Callable[[], None] | None:
    if sys.platform != "linux":
        return None
    try:
        descriptor = os.pidfd_open(user_pid)
    except OSError:  # an old kernel, or a sandbox that forbids it
        return None
    poller = select.poll()
    poller.register(descriptor, select.POLLIN)

    def wait() -> None:
        while not poller.poll():
            pass

    return wait


def _kqueue_waiter(user_pid: int) -> Callable[[], None] | None:
    if sys.platform == "darwin":
        queue = select.kqueue()
        event = select.kevent(
            user_pid, filter=select.KQ_FILTER_PROC, flags=select.KQ_EV_ADD, fflags=select.KQ_NOTE_EXIT
        )
        try:
            queue.control([event], 0)
        except OSError:
            return None

        def wait() -> None:
            while not queue.control(None, 1):
                pass

        return wait
    return None
