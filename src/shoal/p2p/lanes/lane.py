"""A connection that carries bulk data: what a bundle needs of it, what is said of it, and how it is tuned.

A lane over another transport than TCP is another :class:`BulkLane`.
"""

from __future__ import annotations

from typing import NamedTuple, Protocol

from shoal.p2p import tcp_info
from shoal.p2p.connection_writer import ConnectionWriter
from shoal.p2p.lanes.count import FEW, SHORT_RTT


class BulkLane(Protocol):
    """What a bundle needs of a connection."""

    local_ip: str | None
    remote_ip: str | None
    last_piece: float
    """When it last carried a piece, in seconds of the loop."""

    @property
    def heard_at(self) -> float:
        """When something last arrived on it, in seconds of the loop."""

    @property
    def congestion_control(self) -> str:
        """How it avoids congestion; empty if the system does not tell."""

    def measure(self) -> tcp_info.TcpInfo | None:
        """What the system knows of it now; None if it does not tell."""

    @property
    def writer(self) -> ConnectionWriter:
        """What goes out."""

    @property
    def is_open(self) -> bool:
        """Whether it carries anything."""

    @property
    def is_idle(self) -> bool:
        """Whether no stream lives on it."""

    @property
    def rtt(self) -> float | None:
        """Smoothed round-trip time in seconds, once measured."""

    def abort(self, reason: str) -> None:
        """Close it at once; what is queued is lost."""


class LaneReport(NamedTuple):
    """How payloads went to one peer. What is counted is of the time since streams were last opened after a pause."""

    lanes: int
    reason: str
    congestion_control: str
    rtt: float | None
    """Seconds."""
    rate: float
    """Bytes a second, in the last measured while."""
    segments_sent: int
    retransmitted: int
    """Segments."""
    resent: int
    """Bytes that were sent again on another lane."""


def tune(transport: object, congestion_control: str, others: int | None) -> None:
    """Choose how a connection that carries bulk data avoids congestion; one over a short path stays as it is. A few
    lanes are paced; on more of them that is not worth its timers.

    :param others: lanes for pieces to the same process that are open already; None: this one is a home
    """
    info = tcp_info.read(transport)
    if info is not None and info.rtt >= SHORT_RTT:
        tcp_info.choose_congestion_control(transport, congestion_control)
        if others is not None and others < FEW:
            tcp_info.enable_pacing(transport)
