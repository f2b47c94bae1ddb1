"""How many bytes of payloads a sender may have on the way to this peer: as many as the path holds. Pure.

A window must be twice what arrives in one round trip: credit for what was taken is a round trip old when it is used.
It doubles while as much as half of it comes in a round trip, and halves when it is far larger than what comes.

Where packets are lost, the next payload waits for a piece that is late, and those behind it take credit meanwhile. They
are taken all at once, so that it is the busiest round trips that count, and not the mean. On a long path a window is
larger at first: what waits is as much as the path carries in some round trips, and there is no time to learn it.
"""

from __future__ import annotations

GROWS_AT = 0.4
"""A window grows if in one round trip so much of it has come,"""
SHRINKS_AT = 0.05
"""and shrinks if in each of several it was less than this."""
QUIET_SPELLS = 8
LEAST_SPELL = 0.01
"""Seconds that are looked at together at least, where the round trip is shorter."""
FIRST_RATE = 160e6
"""Bytes a second: a window at first is what comes at this rate in a round trip."""


def first_size(rtt: float, least: int, most: int) -> int:
    """The window of a path with this round-trip time, in seconds."""
    return max(least, min(int(FIRST_RATE * rtt), most))


class FlowWindow:
    """The window of one stream, in bytes.

    :param size: at first
    :param least: the smallest that it becomes
    :param most: the largest that it becomes
    """

    def __init__(self, size: int, least: int, most: int) -> None:
        self.size = size
        self._least = least
        self._most = max(most, size)
        self._began: float | None = None
        self._came = 0
        self._quiet = 0

    def receive(self, nbytes: int, now: float, rtt: float) -> bool:
        """So much was taken; returns whether :attr:`size` has changed. ``now`` and ``rtt`` in seconds."""
        if self._began is None:
            self._began = now
        spell = max(rtt, LEAST_SPELL)
        if now - self._began < spell:
            self._came += nbytes
            return False
        before, came = self.size, self._came * rtt / spell
        self._began, self._came = now, nbytes
        self._quiet = self._quiet + 1 if came < SHRINKS_AT * self.size else 0
        if came >= GROWS_AT * self.size:
            self.size = min(2 * self.size, self._most)
        elif self._quiet >= QUIET_SPELLS:
            self._quiet = 0
            self.size = max(self.size // 2, self._least)
        return self.size != before
