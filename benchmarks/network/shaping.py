"""One direction of a link: what of a packet gets through, and when its last bit has left. Pure."""

from __future__ import annotations

import random

from benchmarks.network.packets import FRAME, keep, segments
from benchmarks.network.plan import queue_bytes


class Direction:
    """A link that sends at a rate, lets a queue build up before it, and loses segments at random.

    :param rate: bytes a second, headers of Ethernet included
    :param loss: fraction of the segments that get lost
    """

    def __init__(self, rate: float, loss: float, rng: random.Random) -> None:
        self._rate = rate
        self._queue = queue_bytes(rate)
        self._loss = loss
        self._rng = rng
        self._free_at = 0.0
        self._until_lost = self._draw()
        self.carried = 0
        """Segments."""
        self.lost = 0
        self.overflowed = 0
        """Segments that found the queue full."""

    def pass_on(self, packet: bytes, now: float) -> list[tuple[float, bytes]]:
        """What is left of a packet, and when it has left the link."""
        return [
            (self._send(admitted, now), admitted)
            for survivor in self._lose(packet)
            for admitted in self._admit(survivor, now)
        ]

    def _lose(self, packet: bytes) -> list[bytes]:
        """One random number for each segment that gets lost, not for each segment."""
        count = segments(packet).count
        if self._until_lost >= count:
            self._until_lost -= count
            return [packet]
        runs, first = [], 0
        while self._until_lost < count:
            lost = self._until_lost
            if lost > first:
                runs.append((first, lost))
            first = lost + 1
            self.lost += 1
            self._until_lost = first + self._draw()
        if first < count:
            runs.append((first, count))
        self._until_lost -= count
        return keep(packet, runs)

    def _admit(self, packet: bytes, now: float) -> list[bytes]:
        """As much of the packet as the queue has room for."""
        one = segments(packet)
        room = self._queue - max(0.0, self._free_at - now) * self._rate
        fits = min(one.count, int(room // (one.wire_bytes / one.count))) if room > FRAME else 0
        self.overflowed += one.count - fits
        return keep(packet, [(0, fits)]) if fits else []

    def _send(self, packet: bytes, now: float) -> float:
        one = segments(packet)
        self.carried += one.count
        self._free_at = max(now, self._free_at) + one.wire_bytes / self._rate
        return self._free_at

    def _draw(self) -> int:
        """How many segments get through before the next one that gets lost."""
        return int(self._rng.expovariate(1.0) / self._loss) if self._loss else 1 << 62
