"""What was learnt of the path to a peer. Pure."""

from __future__ import annotations

from dataclasses import dataclass, field

from shoal.p2p.lanes.count import Choice

TRIED_SECONDS = 30.0
"""After so long with data under way it is tried again whether more lanes carry more, if they did not;"""
TRIED_RATE = 0.8
"""and as soon as those that are left carry less than this part of it."""

BEST_DECAY = 0.98
"""What is left of the highest rate of all when a rate is next measured: a path may have become slower."""


@dataclass
class PathMemory:
    """What was learnt of the path to a peer, for the next round too."""

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
    min_rtt: float = field(default=float("inf"))
    ends: tuple[str | None, str | None] = (None, None)
    """The addresses of this host and the peer: a path between others is another one."""

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
