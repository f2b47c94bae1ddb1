"""What the lanes to one process of a peer have sent and lost, by the kernel's counts. Pure: the time is an argument."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from shoal.p2p.tcp_info import TcpInfo


@dataclass
class Counts:
    """Of all lanes together."""

    sent: int = 0
    """Segments."""
    retransmitted: int = 0
    """Segments."""
    delivered: int = 0
    """Bytes that the peer's machine has confirmed."""

    def add(self, other: Counts) -> None:
        """Add another count to this one."""
        self.sent += other.sent
        self.retransmitted += other.retransmitted
        self.delivered += other.delivered


@dataclass
class Interval:
    """What was counted since the number of lanes was last chosen."""

    began_at: float
    counts: Counts = field(default_factory=Counts)
    highest_rtt: float = 0.0
    """Of the medians of the lanes, in seconds."""
    looks: int = 0
    busy_looks: int = 0
    """Looks at which data waited."""


class Meter:
    """See the module. Lanes are known by any hashable key."""

    def __init__(self) -> None:
        self.total = Counts()
        """Since :meth:`begin`."""
        self.interval: Interval | None = None
        """None: nothing was counted since data last stood still."""
        self._read: dict[object, TcpInfo] = {}
        self._carrying: set[object] = set()
        """The lanes that carried data when they were last read."""

    def begin(self, infos: Mapping[Any, TcpInfo]) -> None:
        """Count anew, from what these lanes had counted when nothing was under way."""
        self.total, self.interval = Counts(), None
        self._read, self._carrying = dict(infos), set(infos)

    def read(self, infos: Mapping[Any, TcpInfo]) -> list[TcpInfo]:
        """Add what the lanes that carry data have counted since they were last read, or were opened; those of which
        something was delivered.

        What a lane did while it did not carry data says nothing of the interval in which it does again.
        """
        moving = []
        for lane, info in infos.items():
            has_carried = lane in self._carrying or lane not in self._read
            counts = self.count(lane, info)
            if has_carried and self.interval is not None:
                self.interval.counts.add(counts)
            if has_carried and counts.delivered > 0:
                moving.append(info)
        self._carrying = set(infos)
        return moving

    def count(self, lane: object, info: TcpInfo) -> Counts:
        """Add to the total what a lane has counted since it was last read."""
        last = self._read.get(lane)
        self._read[lane] = info
        counts = Counts(info.segments_sent, info.retransmitted, info.delivered)
        if last is not None:
            counts.add(Counts(-last.segments_sent, -last.retransmitted, -last.delivered))
        self.total.add(counts)
        return counts

    def forget(self, lane: object) -> None:
        """The lane is gone."""
        self._read.pop(lane, None)
        self._carrying.discard(lane)
