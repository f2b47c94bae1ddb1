"""What was learnt of the path to a peer. Pure."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from shoal.p2p.lanes.count import Choice

TRIED_SECONDS = 30.0
"""After so long with data under way it is tried again whether more lanes carry more, if they did not;"""
TRIED_RATE = 0.8
"""and as soon as those that are left carry less than this part of it."""

RTT_SECONDS = 30.0
"""The smallest round-trip time is that of one or two periods, each with data under way for so long: routes change. The
kernel's own figures, from which it is taken, are of five minutes."""
LOOK_SECONDS = 1.0
"""More between two looks is a pause."""
BEST_DECAY = 0.98
"""What is left of the highest rate of all when a rate is next measured: a path may have become slower."""


Ends = tuple[str | None, str | None]
"""The addresses of this host and of the peer."""


@dataclass
class PathMemory:
    """What was learnt of the path between two addresses, for the next round too."""

    choice: Choice | None = None
    fewer: int | None = None
    """How many lanes there were before there came to be more."""
    enough: int | None = None
    """So many carried as much as more did,"""
    tried_rate: float = 0.0
    """which was so much,"""
    tried_for: float = 0.0
    """seconds of data under way ago."""
    best: tuple[int, float] | None = None
    """The number of lanes that has carried most of late, and how much."""
    peaks: dict[int, float] = field(default_factory=dict)
    """The highest rate that was measured with so many lanes: slow starts and the end of a round say little."""
    seconds: float = 0.0
    """For how long data was under way since the number of lanes last changed."""
    rtt_now: float = math.inf
    """The smallest round-trip time in this period, in seconds,"""
    rtt_before: float = math.inf
    """and in the one before."""
    period: float = 0.0
    """Seconds with data under way in this period."""
    noted_at: float = -math.inf

    @property
    def min_rtt(self) -> float:
        """The smallest round-trip time of late, in seconds; infinite until it was measured."""
        return min(self.rtt_now, self.rtt_before)

    def note_rtt(self, rtt: float, now: float) -> None:
        """So long, in seconds, is the smallest round-trip time of a lane that moves. Pauses do not count: what was
        learnt before them would be forgotten.
        """
        self.period += min(now - self.noted_at, LOOK_SECONDS)
        self.noted_at = now
        if self.period >= RTT_SECONDS:
            self.rtt_before, self.rtt_now, self.period = self.rtt_now, math.inf, 0.0
        self.rtt_now = min(self.rtt_now, rtt)

    def note_rate(self, count: int, rate: float) -> None:
        """So many lanes have carried so much, in bytes a second."""
        lanes, most = self.best or (count, 0.0)
        most *= BEST_DECAY
        self.best = (count, rate) if rate >= most else (lanes, most)

    def enough_for(self, rate: float) -> int | None:
        """How many lanes need not be exceeded, now that they carry ``rate``: not the highest one of late, since a slow
        start carries for a while what its lanes never do again.
        """
        is_known = self.tried_for < TRIED_SECONDS and rate >= TRIED_RATE * self.tried_rate
        return self.enough if is_known else None
