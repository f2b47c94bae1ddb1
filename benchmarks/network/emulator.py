"""The program that carries packets between machines: ``python -m benchmarks.network.emulator LINKS DESCRIPTORS``.

It has the TUN device of each machine. What one sends goes through its uplink, takes its time, and goes through the
downlink of the machine that it is for. It ends when its standard input does, and says what it carried.
"""

from __future__ import annotations

import contextlib
import ctypes
import heapq
import itertools
import json
import os
import random
import select
import socket
import sys
import time
from dataclasses import dataclass
from typing import Any

from benchmarks.network.packets import destination, is_ipv4
from benchmarks.network.shaping import Direction

LARGEST = 70_000
"""Bytes of a packet, with the header on offloads."""
AT_ONCE = 32
"""Packets that are read of one device before the others have their turn."""
PR_SET_TIMERSLACK = 29
SLACK_NS = 10_000
NICE = -15
"""Packets come in time though the machines' programs take all cores."""


@dataclass
class Machine:
    """A device, and both directions of its link."""

    device: int
    up: Direction
    down: Direction
    delay: float


class Emulator:
    """Carries packets until the end of the standard input.

    :param links: :meth:`benchmarks.network.plan.Link.as_json` of each machine
    """

    def __init__(self, links: list[dict[str, Any]], devices: list[int], seed: int) -> None:
        rng = random.Random(seed)
        self._machines = [
            Machine(
                device, Direction(one["up"], one["loss"], rng), Direction(one["down"], 0.0, rng), one["delay"]
            )
            for one, device in zip(links, devices, strict=True)
        ]
        self._by_device = {one.device: one for one in self._machines}
        self._by_address = {
            socket.inet_aton(link["ip"]): one for link, one in zip(links, self._machines, strict=True)
        }
        self._numbers = itertools.count()
        self._due: list[tuple[float, int, Machine, bool, bytes]] = []
        """When, a number that keeps the order, where to, whether it has come through the downlink, and what."""
        self.latest = 0.0
        """Seconds by which a packet was late, at most."""

    def run(self, end: int) -> None:
        """Carry packets until there is something to read from the descriptor ``end``, or it is closed."""
        while True:
            timeout = max(0.0, self._due[0][0] - time.monotonic()) if self._due else None
            ready, _, _ = select.select([end, *self._by_device], [], [], timeout)
            if end in ready:
                return
            for device in ready:
                self._take(self._by_device[device])
            self._deliver(time.monotonic())

    def facts(self) -> dict[str, float]:
        """What was carried, in segments."""
        directions = [one for machine in self._machines for one in (machine.up, machine.down)]
        return {
            "carried": sum(machine.up.carried for machine in self._machines),
            "lost": sum(one.lost for one in directions),
            "overflowed": sum(one.overflowed for one in directions),
            "late_ms": round(1e3 * self.latest, 1),
            "cpu_s": round(time.process_time(), 2),
        }

    def _take(self, machine: Machine) -> None:
        for _ in range(AT_ONCE):
            try:
                packet = os.read(machine.device, LARGEST)
            except BlockingIOError:
                return
            to = self._by_address.get(destination(packet)) if is_ipv4(packet) else None
            if to is None:
                continue  # IPv6's search for neighbours, and whatever else leads nowhere
            for left_at, part in machine.up.pass_on(packet, time.monotonic()):
                self._later(left_at + machine.delay + to.delay, to, False, part)

    def _later(self, moment: float, to: Machine, is_through: bool, packet: bytes) -> None:
        heapq.heappush(self._due, (moment, next(self._numbers), to, is_through, packet))

    def _deliver(self, now: float) -> None:
        while self._due and self._due[0][0] <= now:
            moment, _, to, is_through, packet = heapq.heappop(self._due)
            if is_through:
                self.latest = max(self.latest, now - moment)
                with contextlib.suppress(OSError):  # the machine's device is down, or its queue is full
                    os.write(to.device, packet)
                continue
            for left_at, part in to.down.pass_on(packet, moment):
                self._later(left_at, to, True, part)


def be_on_time() -> None:
    """Ask for exact timers, and for a turn before others."""
    ctypes.CDLL(None).prctl(PR_SET_TIMERSLACK, SLACK_NS, 0, 0, 0)
    with contextlib.suppress(PermissionError):
        os.setpriority(os.PRIO_PROCESS, 0, NICE)


def main() -> None:
    links, devices, seed = json.loads(sys.argv[1]), json.loads(sys.argv[2]), int(sys.argv[3])
    be_on_time()
    emulator = Emulator(links, devices, seed)
    print("ready", flush=True)
    with contextlib.suppress(KeyboardInterrupt):
        emulator.run(sys.stdin.fileno())
    with contextlib.suppress(BrokenPipeError):  # the runner was killed
        print(json.dumps(emulator.facts()), flush=True)


if __name__ == "__main__":
    main()
