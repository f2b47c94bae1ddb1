"""The ends of background processes: at the interpreter's, in forked children, by garbage collection."""

from __future__ import annotations

import atexit
import contextlib
import os
import sys
import threading
import time
from collections.abc import Collection

from shoal.runtime.process_link import ProcessLink

_EXIT_SECONDS = 3.0

_running: dict[ProcessLink, bool] = {}  # to whether it is a daemon
_registered = False


def add(link: ProcessLink, *, daemon: bool) -> None:
    """Keep an eye on a new process."""
    global _registered
    if not _registered:
        _registered = True
        os.register_at_fork(after_in_child=_abandon_all)
        atexit.register(_end_all)
    _running[link] = daemon
    link.on_end = _forget


def end_in_background(link: ProcessLink) -> None:
    """End a process that nobody refers to any more; called by garbage collection, so it must not wait."""
    if not link.is_alive:
        return
    with contextlib.suppress(RuntimeError):  # the interpreter is ending: _end_all has its turn
        threading.Thread(target=link.shutdown, args=(_EXIT_SECONDS,), daemon=True).start()


def _forget(link: ProcessLink) -> None:
    _running.pop(link, None)


def _abandon_all() -> None:
    for link in list(_running):
        link.abandon()
    _running.clear()


def _end_all() -> None:
    """Runs at the interpreter's exit, while threads still run."""
    try:
        interrupted = _was_interrupted()
        for link in [link for link, daemon in list(_running.items()) if not daemon]:
            # Ended by Ctrl+C already: who pressed it wants the processes to end as well.
            while not interrupted and not link.ended.wait(1.0):
                pass
    except KeyboardInterrupt:
        pass
    try:
        _end(list(_running))
    except KeyboardInterrupt:
        for link in list(_running):
            link.kill()


def _end(links: Collection[ProcessLink]) -> None:
    deadline = time.monotonic() + _EXIT_SECONDS
    for link in links:
        link.begin_shutdown(_EXIT_SECONDS)
    for link in links:
        link.shutdown(max(deadline - time.monotonic(), 0.0))


def _was_interrupted() -> bool:
    error = getattr(sys, "last_value", None)
    return isinstance(error, KeyboardInterrupt)
