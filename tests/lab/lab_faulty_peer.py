"""One peer of the laboratory of faults, as the laboratory sees it, and the line on which peers ask for faults."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
from lab_internet import Machine
from lab_peers import Event, Talker, Template

START_LIMIT = 60.0
"""Seconds; only a peer that hangs takes as long."""


class FaultyPeer(Talker):
    """A peer of this swarm, which runs ``lab_fault_program.py``."""

    def __init__(
        self, name: str, template: Template, program: dict[str, Any], machine: Machine | None
    ) -> None:
        self.is_client = bool(program["dht"].get("client_mode"))
        self.machine = machine
        self.value, self.weight = 0.0, 1.0
        """What it averages: no two sets of members have the same average."""
        self.digest = ""
        self.joined: Event = {}
        self.is_broken = False
        """One of its processes was killed."""
        self.is_estranged = False
        """It is back, and not in one group with the others: their memory of its failure lasts."""
        self._template = template
        self._marked = 0
        theirs, self._input = os.pipe()
        output, their_output = os.pipe()
        self.user = template.start(machine, program, theirs, their_output)
        os.close(theirs)
        os.close(their_output)
        super().__init__(name, output)

    @property
    def title(self) -> str:
        """How it is called in stories: by what it averages."""
        return f"{'client' if self.is_client else 'member'} {self.value:g}"

    @property
    def peer_id(self) -> str:
        return str(self.joined["peer_id"])

    @property
    def background(self) -> int:
        return int(self.joined["background"])

    def do(self, command: str, **options: Any) -> None:
        with contextlib.suppress(BrokenPipeError):
            os.write(self._input, (json.dumps({"do": command, **options}) + "\n").encode())

    def wait_until_joined(self) -> None:
        if not self.joined:
            self.joined = self.expect("joined", time.monotonic() + START_LIMIT)

    def enlist(self) -> None:
        """It is a member from now on, and its state may be shared."""
        self.wait_until_joined()
        if not self.is_client:
            self.do("share_state")

    def mark(self) -> None:
        """What it says from now on is new."""
        self._marked = len(self.lines)

    def expect(self, event: str, until: float, *, new: bool = False, **fields: Any) -> Event:
        said = self.hear(event, until, after=self._marked if new else 0, **fields)
        if said is None:
            raise AssertionError(f"{self.name} did not say {event!r} in time; it said: {self.tail()}")
        return said

    def hear(self, event: str, until: float, *, after: int = 0, **fields: Any) -> Event | None:
        """The first such event, old or to come; None: there is none, and the peer has ended, or time is up.

        :param after: of those from this line on
        """
        number = after
        with self._news:
            while True:
                for _, line in self.lines[number:]:
                    number += 1
                    said = json.loads(line) if line.startswith(f'{{"event": "{event}"') else {}
                    if said and all(said.get(name) == value for name, value in fields.items()):
                        return said
                if self._ended or not self._news.wait(max(0.0, until - time.monotonic())):
                    return None

    @property
    def has_ended(self) -> bool:
        """Its user's process is gone."""
        return self._ended

    def forget(self) -> None:
        """Drop what it has said."""
        with self._news:
            self.lines.clear()

    def tail(self) -> str:
        return "\n".join(line for _, line in self.lines[-20:])

    def signal(self, number: signal.Signals) -> None:
        for pid in (self.user, self.background):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)

    def alive(self) -> list[str]:
        """Which of its processes run."""
        return [name for name, pid in self._processes() if is_running(pid)]

    def _processes(self) -> list[tuple[str, int]]:
        return [("user", self.user), ("background", self.background)]

    def end(self) -> None:
        """Kill what is left of it."""
        if self.joined:
            self.signal(signal.SIGCONT)
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.background, signal.SIGKILL)
        os.close(self._input)
        self._template.end(self.user)


def is_running(pid: int) -> bool:
    with contextlib.suppress(psutil.NoSuchProcess):
        return bool(psutil.Process(pid).status() != psutil.STATUS_ZOMBIE)
    return False


class Line:
    """A Unix socket on which a process of a peer asks, and waits for the answer; works from any namespace."""

    def __init__(self, path: Path, on_asked: Callable[[int], None]) -> None:
        self.path = path
        self._on_asked = on_asked
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._socket.bind(str(path))
        self._socket.listen()
        self._thread = threading.Thread(target=self._serve, name="lab-line", daemon=True)
        self._thread.start()

    def _serve(self) -> None:
        while True:
            try:
                asking, _ = self._socket.accept()
            except OSError:
                return
            with asking, contextlib.suppress(BrokenPipeError):
                self._on_asked(int(asking.recv(64)))
                asking.sendall(b"+")

    def close(self) -> None:
        self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()
        self._thread.join()
