"""The peers of a test, as the test sees them: start them on machines, tell them what to do, read what they say."""

from __future__ import annotations

import json
import os
import signal
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

Event = dict[str, Any]


class Template:
    """The process that peers are forked from: see ``lab_template.py``."""

    def __init__(self) -> None:
        self._requests, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        program = Path(__file__).with_name("lab_template.py")
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, str(program), str(theirs.fileno())],
                pass_fds=[theirs.fileno()],
                start_new_session=True,  # Ctrl+C is for the tests, which end it in order
            )

    def start(self, machine: Machine | None, program: dict[str, Any], stdin: int, stdout: int) -> int:
        """Start a peer on a machine, None: on this one; returns its process id."""
        place = [] if machine is None else [machine.namespace.descriptor]
        return self._ask({"start": program}, [stdin, stdout, *place])

    @property
    def pid(self) -> int:
        return self._process.pid

    def end(self, pid: int) -> int:
        """Kill a peer, if it has not ended by itself; returns its exit status."""
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


class Talker:
    """A process whose lines are kept, with the time at which it said them."""

    def __init__(self, name: str, output: int) -> None:
        self.name = name
        self.lines: list[tuple[float, str]] = []
        self._ended = False
        self._news = threading.Condition()
        self._reader = threading.Thread(target=self._read, args=(output,), name=f"lab-{name}", daemon=True)
        self._reader.start()

    def wait_for_line(self, holds: Callable[[str], bool], what: str, *, after: int = 0) -> int:
        """The number of the first line for which this holds, of those from the number ``after`` on."""
        number = after
        deadline = time.monotonic() + PATIENCE
        with self._news:
            while True:
                while number < len(self.lines):
                    if holds(self.lines[number][1]):
                        return number
                    number += 1
                if self._ended:
                    raise AssertionError(f"{self.name} has ended, and did not say {what}")
                if not self._news.wait(deadline - time.monotonic()):
                    raise AssertionError(f"{self.name} did not say {what} within {PATIENCE:g} s")

    def wait_until_silent(self, patience: float = PATIENCE) -> bool:
        """Wait until it has closed its output, as it does in its end; false if it does not."""
        self._reader.join(patience)
        return self._ended

    def _read(self, output: int) -> None:
        rest = b""
        while data := os.read(output, 1 << 16):
            *lines, rest = (rest + data).split(b"\n")
            with self._news:
                self.lines += [(time.monotonic(), line.decode(errors="replace")) for line in lines]
                self._news.notify_all()
        os.close(output)
        with self._news:
            self._ended = True
            self._news.notify_all()


class Peer(Talker):
    """A peer on a machine, which runs ``lab_peer_program.py``."""

    def __init__(self, machine: Machine, template: Template, program: dict[str, Any]) -> None:
        self.machine = machine
        self.peer_id = ""
        self.addresses: list[str] = []
        """Where others join by it, as it said when it had joined."""
        self._template = template
        self._heard = 0
        theirs, self._input = os.pipe()
        output, their_output = os.pipe()
        self._pid = template.start(machine, program, theirs, their_output)
        os.close(theirs)
        os.close(their_output)
        super().__init__(machine.name, output)

    def tell(self, command: str) -> None:
        os.write(self._input, f"{command}\n".encode())

    def wait_until_joined(self) -> Event:
        """Wait until it has joined, and its averager is ready; what it said then."""
        said = self.wait_for("joined")
        self.addresses, self.peer_id = said["addresses"], said["peer_id"]
        return said

    def wait_for(self, event: str) -> Event:
        """The next such event."""
        marked = f'{{"event": "{event}"'
        number = self.wait_for_line(lambda line: line.startswith(marked), repr(event), after=self._heard)
        self._heard = number + 1
        said: Event = json.loads(self.lines[number][1])
        return said

    def wait_for_log(self, text: str) -> str:
        """The first message of its log, old or to come, that has this in it."""

        def holds(line: str) -> bool:
            return line.startswith('{"event": "logged"') and text in json.loads(line)["message"]

        number = self.wait_for_line(holds, f"{text!r} in its log")
        return str(json.loads(self.lines[number][1])["message"])

    def logged(self, level: str) -> list[str]:
        """The messages of this level that are in its log so far."""
        said = [json.loads(line) for _, line in self.lines if line.startswith('{"event": "logged"')]
        return [one["message"] for one in said if one["level"] == level]

    def describe(self) -> Event:
        """How others reach it now, in its own view."""
        self.tell("describe")
        return self.wait_for("described")

    def begin_end(self) -> None:
        """Ask it to shut down."""
        os.close(self._input)

    def end(self) -> int:
        """Wait until it has shut down, which :meth:`begin_end` asked for; its exit status."""
        self.wait_until_silent()
        return self._template.end(self._pid)


class Command(Talker):
    """``shoal`` with these arguments, on a machine."""

    def __init__(self, machine: Machine, arguments: Sequence[str]) -> None:
        output, their_output = os.pipe()
        self._process = machine.namespace.start(
            [sys.executable, "-m", "shoal.cli.main", *arguments],
            stdin=subprocess.DEVNULL,
            stdout=their_output,
            stderr=their_output,
            env={**os.environ, "PYTHONUNBUFFERED": "1", "COLUMNS": "80"},
        )
        os.close(their_output)
        super().__init__(f"{machine.name}$", output)

    def wait_for_text(self, text: str) -> list[str]:
        """What it has printed up to the line that has this in it, and that line."""
        number = self.wait_for_line(lambda line: text in line, repr(text))
        return [line for _, line in self.lines[: number + 1]]

    def begin_end(self) -> None:
        self._process.send_signal(signal.SIGTERM)

    def end(self) -> int:
        self.wait_until_silent()
        return self._process.wait(PATIENCE)


class Swarm:
    """The peers of one test, who average together, and the commands beside them."""

    def __init__(self, template: Template) -> None:
        self.peers: list[Peer] = []
        self.commands: list[Command] = []
        self._template = template
        self._began = time.monotonic()

    def start(
        self,
        machine: Machine,
        *,
        listen: Sequence[str] = (),
        join: Sequence[str] | None = None,
        size: int = 2,
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
        family, ip = ("ip4", machine.ip) if machine.ip else ("ip6", machine.ip6)
        options = {
            "host_maddrs": list(listen) or [f"/{family}/{ip}/tcp/0"],
            "initial_peers": list(join) or None,
            **dht,
        }
        averager = {
            "prefix": "lab",
            "target_group_size": size,
            "min_group_size": 2,
            "min_matchmaking_time": 4.0,
            "request_timeout": 2.0,
        }
        program = {"dht": options, "averager": averager, "value": float(len(self.peers))}
        made = Peer(machine, self._template, program)
        self.peers.append(made)
        return made

    def command(self, machine: Machine, *arguments: str) -> Command:
        """Start ``shoal ARGUMENTS``, and return at once."""
        made = Command(machine, arguments)
        self.commands.append(made)
        return made

    def average(self) -> list[Event]:
        """Run one step of all peers at once; what came of it for each."""
        for peer in self.peers:
            peer.tell("average")
        return [peer.wait_for("averaged") for peer in self.peers]

    def story(self) -> str:
        """All that was said, in the order of time, with the peers' names in place of their PeerIDs."""
        talkers = [*self.peers, *self.commands]
        said = sorted((when, one.name, line) for one in talkers for when, line in list(one.lines))
        text = "\n".join(
            f"{when - self._began:7.3f} {name:12} {_readable(line)}" for when, name, line in said
        )
        for peer in self.peers:
            text = text.replace(peer.peer_id, peer.name) if peer.peer_id else text
        return text

    def close(self) -> None:
        """End all in order; an error if one does not end so."""
        talkers = [*self.peers, *self.commands]
        for one in talkers:
            one.begin_end()
        statuses = {one.name: one.end() for one in talkers}
        assert not any(statuses.values()), f"exit statuses: {statuses}"


def _readable(line: str) -> str:
    """A line that a peer has said, for people."""
    if not line.startswith("{"):
        return line
    said = json.loads(line)
    event = said.pop("event")
    if event == "logged":
        return f"{said['level']} {said['logger']}: {said['message']}"
    return f"{event}: " + ", ".join(f"{name}={value}" for name, value in said.items())
