"""The peers of a test, as the test sees them: start them on machines, tell them what to do, read what they say."""

from __future__ import annotations

import json
import os
import queue
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from lab_internet import Machine

PATIENCE = 100.0
"""Seconds; only a peer that hangs takes as long."""
END_PATIENCE = 10.0

Event = dict[str, Any]


class Template:
    """The process that peers are forked from: see ``lab_template.py``."""

    def __init__(self) -> None:
        self._requests, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        program = Path(__file__).with_name("lab_template.py")
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, str(program), str(theirs.fileno())], pass_fds=[theirs.fileno()]
            )

    def start(self, machine: Machine, program: dict[str, Any], stdin: int, stdout: int) -> int:
        """Start a peer on a machine; returns its process id."""
        return self._ask({"start": program}, [machine.namespace.descriptor, stdin, stdout])

    def end(self, pid: int) -> int:
        """End a peer, if it has not ended by itself; returns its exit status."""
        return self._ask({"end": pid})

    def close(self) -> None:
        self._requests.close()
        self._process.wait(PATIENCE)

    def _ask(self, request: dict[str, Any], descriptors: Sequence[int] = ()) -> int:
        socket.send_fds(self._requests, [json.dumps(request).encode()], descriptors)
        answer = self._requests.recv(1 << 16)
        if not answer:
            raise RuntimeError(f"the template of peers has ended with status {self._process.wait(PATIENCE)}")
        return int(json.loads(answer))


class Peer:
    """A peer on a machine. What it says is kept, with the time at which it was said."""

    def __init__(self, name: str, machine: Machine, template: Template, program: dict[str, Any]) -> None:
        self.name = name
        self.machine = machine
        self.lines: list[tuple[float, str]] = []
        self.peer_id = ""
        self.addresses: list[str] = []
        """Where others join by it, as it said when it had joined."""
        self._template = template
        self._fresh: queue.SimpleQueue[Event | None] = queue.SimpleQueue()
        theirs, self._input = os.pipe()
        self._output, their_output = os.pipe()
        self._pid = template.start(machine, program, theirs, their_output)
        os.close(theirs)
        os.close(their_output)
        self._reader = threading.Thread(target=self._read, name=f"lab-{name}", daemon=True)
        self._reader.start()

    def tell(self, command: str) -> None:
        os.write(self._input, f"{command}\n".encode())

    def wait_until_joined(self) -> Event:
        """Wait until it has joined, and its averager is ready; what it said then."""
        said = self.wait_for("joined")
        self.addresses, self.peer_id = said["addresses"], said["peer_id"]
        return said

    def wait_for(self, event: str) -> Event:
        """The next such event."""
        return self.wait_until(lambda said: said["event"] == event, event)

    def wait_for_log(self, text: str) -> str:
        """The first record of the log, old or new, that has this in it."""
        for message in self.logged():
            if text in message:
                return message
        said = self.wait_until(lambda one: one["event"] == "logged" and text in one["message"], repr(text))
        return str(said["message"])

    def wait_until(self, holds: Callable[[Event], bool], what: str) -> Event:
        """The next event for which this holds."""
        deadline = time.monotonic() + PATIENCE
        while True:
            try:
                said = self._fresh.get(timeout=max(deadline - time.monotonic(), 0.0))
            except queue.Empty:
                raise AssertionError(f"{self.name} did not say {what} within {PATIENCE:g} s") from None
            if said is None:
                self._fresh.put(None)
                raise AssertionError(f"{self.name} ended without {what}")
            if holds(said):
                return said

    def logged(self, level: str | None = None) -> list[str]:
        """The messages of its log so far, of one level or all."""
        said = [json.loads(line) for _, line in list(self.lines) if line.startswith("{")]
        return [one["message"] for one in said if one["event"] == "logged" and level in (None, one["level"])]

    def describe(self) -> Event:
        """How others reach it now, in its own view."""
        self.tell("describe")
        return self.wait_for("described")

    def begin_end(self) -> None:
        """Ask it to shut down."""
        os.close(self._input)

    def end(self) -> None:
        """Wait until it has shut down, which :meth:`begin_end` asked for; by force if it does not."""
        self._reader.join(END_PATIENCE)
        self._template.end(self._pid)
        self._reader.join()
        os.close(self._output)

    def _read(self) -> None:
        rest = b""
        while data := os.read(self._output, 1 << 16):
            *lines, rest = (rest + data).split(b"\n")
            for line in lines:
                text = line.decode(errors="replace")
                self.lines.append((time.monotonic(), text))
                if text.startswith("{"):
                    self._fresh.put(json.loads(text))
        self._fresh.put(None)


class Swarm:
    """The peers of one test, who average together."""

    def __init__(self, template: Template) -> None:
        self.peers: list[Peer] = []
        self._template = template
        self._began = time.monotonic()

    def start(
        self,
        machine: Machine,
        *,
        listen: str | Sequence[str] = (),
        join: Sequence[str] | None = None,
        size: int = 2,
        averager: dict[str, Any] | None = None,
        **dht: Any,
    ) -> Peer:
        """Start a peer, and return at once.

        :param listen: where it listens; on a free port of the machine's own address by default
        :param join: addresses of its initial peers; those that the swarm's first peer gives by default
        :param size: of the groups that it averages in
        :param dht: further options of its DHT
        """
        if join is None:
            join = self.peers[0].addresses if self.peers else []
        where = [listen] if isinstance(listen, str) else list(listen)
        program = {
            "dht": {
                "host_maddrs": where or [f"/ip4/{machine.ip}/tcp/0"],
                "initial_peers": list(join) or None,
                **dht,
            },
            "averager": {
                "prefix": "lab",
                "target_group_size": size,
                "min_group_size": 2,
                "min_matchmaking_time": 4.0,
                "request_timeout": 2.0,
                **(averager or {}),
            },
            "value": float(len(self.peers)),
        }
        made = Peer(machine.name, machine, self._template, program)
        self.peers.append(made)
        return made

    def average(self, peers: Sequence[Peer] | None = None) -> list[Event]:
        """Run one step of all at once; what came of it for each."""
        chosen = self.peers if peers is None else peers
        for peer in chosen:
            peer.tell("average")
        return [peer.wait_for("averaged") for peer in chosen]

    def story(self) -> str:
        """All that the peers have said, in the order of time, with their names in place of their PeerIDs."""
        said = sorted((when, peer.name, line) for peer in self.peers for when, line in list(peer.lines))
        text = "\n".join(
            f"{when - self._began:7.3f} {name:12} {_readable(line)}" for when, name, line in said
        )
        for peer in self.peers:
            text = text.replace(peer.peer_id, peer.name) if peer.peer_id else text
        return text

    def close(self) -> None:
        for peer in self.peers:
            peer.begin_end()
        for peer in self.peers:
            peer.end()


def _readable(line: str) -> str:
    """A line that a peer has said, for people."""
    if not line.startswith("{"):
        return line
    said = json.loads(line)
    event = said.pop("event")
    if event == "logged":
        return f"{said['level']} {said['logger']}: {said['message']}"
    return f"{event}: " + ", ".join(f"{name}={value}" for name, value in said.items())
