"""The congestion controls of the sockets of other processes, by ``getsockopt``."""

from __future__ import annotations

import contextlib
import ctypes
import os
import socket
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path

PIDFD_GETFD = 438
"""The number of the system call on every architecture of Linux."""
NAME_BYTES = 16


def controls_of(processes: Iterable[int]) -> Counter[str]:
    """How many connected TCP sockets of these processes have each congestion control."""
    found: Counter[str] = Counter()
    seen: set[str] = set()
    for process in processes:
        with contextlib.suppress(ProcessLookupError):
            pidfd = os.pidfd_open(process)
            try:
                found.update(_controls(process, pidfd, seen))
            finally:
                os.close(pidfd)
    return found


def _controls(process: int, pidfd: int, seen: set[str]) -> Iterator[str]:
    """Of each socket once: processes that were forked share theirs."""
    for entry in Path(f"/proc/{process}/fd").iterdir():
        with contextlib.suppress(OSError):
            name = os.readlink(entry)
            if not name.startswith("socket:") or name in seen:
                continue
            seen.add(name)
            with socket.socket(fileno=_duplicate(pidfd, int(entry.name))) as one:
                if one.family in (socket.AF_INET, socket.AF_INET6) and one.type == socket.SOCK_STREAM:
                    one.getpeername()  # raises for those that listen
                    value = one.getsockopt(socket.IPPROTO_TCP, socket.TCP_CONGESTION, NAME_BYTES)
                    yield value.rstrip(b"\0").decode()


def _duplicate(pidfd: int, descriptor: int) -> int:
    made = ctypes.CDLL(None, use_errno=True).syscall(PIDFD_GETFD, pidfd, descriptor, 0)
    if made < 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()), "pidfd_getfd")
    return int(made)
