"""What the lanes to one process of a peer have sent and lost, by the kernel's counts. Pure: the time is an argument."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

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

    def begin(self, infos: Iterable[tuple[object, TcpInfo]]) -> None:
        """Count anew, from what these lanes had counted when nothing was under way."""
        self.total, self.interval = Counts(), None
        self._read = dict(infos)

    def read(self, lane: object, info: TcpInfo) -> bool:
        """Add what a lane has counted since it was last read, or was opened; whether anything was delivered."""
        last = self._read.get(lane)
        self._read[lane] = info
        counts = Counts(info.segments_sent, info.retransmitted, info.delivered)
        if last is not None:
            counts.add(Counts(-last.segments_sent, -last.retransmitted, -last.delivered))
        self.total.add(counts)
        if self.interval is not None:
            self.interval.counts.add(counts)
        return counts.delivered > 0

    def forget(self, lane: object) -> None:
        """The lane is gone."""
        self._read.pop(lane, None)
