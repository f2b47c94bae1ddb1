"""The template of all peers: a process that has imported everything, and makes peers by forking.

An interpreter with torch takes seconds to start, and a peer has two, its user's and its background process. So both
are forked from this one. Everything after the imports is what it would be in a fresh process.

Run as ``python lab_template.py DESCRIPTOR``; requests and answers are JSON messages on that socket.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import select
import signal
import socket
import subprocess
import sys
import traceback
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NoReturn

import lab_fault_program
import lab_peer_program

import shoal.averaging.background.service
import shoal.dht.service
import shoal.runtime.process_link
import shoal.runtime.server
from shoal.testing import namespaces

STANDARD = 3
"""Descriptors below are the standard ones."""


class ForkedProcess:
    """What :mod:`shoal.runtime.process_link` needs of ``subprocess.Popen``, for its background process."""

    def __init__(
        self, arguments: Sequence[str], *, stdout: int, pass_fds: Sequence[int], env: dict[str, str], **_: Any
    ) -> None:
        self.returncode: int | None = None
        self.pid = os.fork()
        if self.pid == 0:
            become(lambda: self._run(arguments, stdout, pass_fds, env))
        self._exit_watch = os.pidfd_open(self.pid)

    @staticmethod
    def _run(arguments: Sequence[str], stdout: int, kept: Sequence[int], env: dict[str, str]) -> None:
        os.setsid()
        logging.getLogger("shoal").handlers.clear()  # those of the user's program
        redirect(os.open(os.devnull, os.O_RDONLY), stdout, keep=kept)
        os.environ.clear()
        os.environ.update(env)
        sys.argv = ["shoal.runtime.child", *arguments[4:]]
        shoal.runtime.server.main()

    def wait(self, timeout: float | None = None) -> int:
        if self.returncode is None:
            if not select.select([self._exit_watch], [], [], timeout)[0]:
                raise subprocess.TimeoutExpired("the background process", timeout or 0.0)
            self.returncode = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])
            os.close(self._exit_watch)
        return self.returncode

    def terminate(self) -> None:
        self._send(signal.SIGTERM)

    def kill(self) -> None:
        self._send(signal.SIGKILL)

    def _send(self, number: int) -> None:
        if self.returncode is None:
            os.kill(self.pid, number)


def become(run: Callable[[], None]) -> NoReturn:
    """In a forked child: run this, and end without a word to what the parent has open."""
    status = 1
    try:
        run()
        status = 0
    except BaseException:  # noqa: BLE001 - the process's outer edge
        os.write(2, traceback.format_exc().encode())
    os._exit(status)


def redirect(stdin: int, stdout: int, *, keep: Sequence[int] = ()) -> None:
    """Make these the standard descriptors, and close all others but some."""
    for number, descriptor in ((0, stdin), (1, stdout), (2, stdout)):
        os.dup2(descriptor, number)
    first = STANDARD
    for descriptor in sorted(keep):
        os.closerange(first, descriptor)
        first = descriptor + 1
    os.closerange(first, os.sysconf("SC_OPEN_MAX"))


PROGRAMS: dict[str, Callable[[dict[str, Any]], None]] = {
    "peer": lab_peer_program.run,
    "faults": lab_fault_program.run,
}


def start_peer(program: dict[str, Any], stdin: int, stdout: int, namespace: int | None = None) -> None:
    """In a forked child: be a peer, in the namespace of the template by default."""
    if namespace is not None:
        namespaces.enter(namespace)
    redirect(stdin, stdout)
    PROGRAMS[program.get("program", "peer")](program)


def serve(requests: socket.socket) -> None:
    """Start and end peers until the tests' process is gone; then end them all."""
    peers: set[int] = set()

    def end(pid: int) -> int:
        # Not reaped so far, so the number is still this peer's.
        peers.discard(pid)
        os.kill(pid, signal.SIGKILL)
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])

    while True:
        message, descriptors, _, _ = socket.recv_fds(requests, 1 << 16, 3)
        if not message:
            break
        request = json.loads(message)
        if "end" in request:
            answer = end(request["end"])
        elif (answer := os.fork()) == 0:
            become(partial(start_peer, request["start"], *descriptors))
        else:
            peers.add(answer)
        for descriptor in descriptors:
            os.close(descriptor)
        requests.send(json.dumps(answer).encode())
    for pid in list(peers):
        with contextlib.suppress(ProcessLookupError):
            end(pid)


if __name__ == "__main__":
    PRELOADED = (shoal.DHT, shoal.DecentralizedAverager)  # named, and so imported
    shoal.runtime.process_link.subprocess.Popen = ForkedProcess
    with socket.socket(fileno=int(sys.argv[1])) as requests:
        serve(requests)
