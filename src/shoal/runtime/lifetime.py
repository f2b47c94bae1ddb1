"""The ends of background processes: at the interpreter's, in forked children, by garbage collection."""

from __future__ import annotations

import atexit
import contextlib
import os
import sys
import threading
import time
from collections.abc import Collection

from shoal.runtime.connection import Connection

_EXIT_SECONDS = 3.0

_running: dict[Connection, bool] = {}  # to whether it is a daemon
_registered = False


def add(connection: Connection, *, daemon: bool) -> None:
    """Keep an eye on a new process."""
    global _registered
    if not _registered:
        _registered = True
        os.register_at_fork(after_in_child=_abandon_all)
        atexit.register(_end_all)
    _running[connection] = daemon
    connection.on_end = _forget


def end_in_background(connection: Connection) -> None:
    """End a process that nobody refers to any more; called by garbage collection, so it must not wait."""
    if not connection.is_alive:
        return
    with contextlib.suppress(RuntimeError):  # the interpreter is ending: _end_all has its turn
        threading.Thread(target=connection.shutdown, args=(_EXIT_SECONDS,), daemon=True).start()


def _forget(connection: Connection) -> None:
    _running.pop(connection, None)


def _abandon_all() -> None:
    for connection in list(_running):
        connection.abandon()
    _running.clear()


def _end_all() -> None:
    """Runs at the interpreter's exit, while threads still run."""
    try:
        interrupted = _was_interrupted()
        for connection in [connection for connection, daemon in list(_running.items()) if not daemon]:
            # Ended by Ctrl+C already: who pressed it wants the processes to end as well.
            while not interrupted and not connection.ended.wait(1.0):
                pass
    except KeyboardInterrupt:
        pass
    try:
        _end(list(_running))
    except KeyboardInterrupt:
        for connection in list(_running):
            connection.kill()


def _end(connections: Collection[Connection]) -> None:
    deadline = time.monotonic() + _EXIT_SECONDS
    for connection in connections:
        connection.begin_shutdown(_EXIT_SECONDS)
    for connection in connections:
        connection.shutdown(max(deadline - time.monotonic(), 0.0))


def _was_interrupted() -> bool:
    error = getattr(sys, "last_value", None)
    return isinstance(error, KeyboardInterrupt)
