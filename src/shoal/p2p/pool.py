"""The connections to one peer, and which of them carries the next stream. Pure bookkeeping; dials nothing."""

from __future__ import annotations

import asyncio
import math

from shoal.p2p.connection import Connection
from shoal.p2p.identity import PeerID
from shoal.p2p.lanes.bundle import Bundle
from shoal.p2p.lanes.lane import LaneReport
from shoal.p2p.multiaddr import Multiaddr
from shoal.p2p.protocol.session import Role
from shoal.p2p.protocol.streams import Multiplexer
from shoal.p2p.rpc import Lane

KEPT = (Lane.CONTROL, Lane.BULK, Lane.STRIPE)
"""The kinds of connections that are kept, those first that are best for control."""


class PeerConnections:
    """All open connections to one peer, and who waits for the next one."""

    def __init__(self, own: PeerID, peer: PeerID) -> None:
        self._own = own
        self._peer = peer
        self._lanes: dict[Lane, list[Connection]] = {lane: [] for lane in KEPT}
        self._arrivals: dict[Lane, list[asyncio.Future[None]]] = {lane: [] for lane in KEPT}
        self.bundles: dict[int, Bundle] = {}
        """The lanes to each process of the peer, by its incarnation."""
        self.dialing = 0
        """Lanes for pieces that this host dials,"""
        self.asked_for = 0
        """and those that it has asked the peer to dial."""

    @property
    def opening(self) -> int:
        """Lanes for pieces that are to come."""
        return self.dialing + self.asked_for

    @property
    def has_streams(self) -> bool:
        """Whether streams of bulk data are open, of either side: their lanes may be used at any time."""
        return any(not one.is_idle for one in self._lanes[Lane.BULK] if one.is_open)

    @property
    def is_empty(self) -> bool:
        """Whether no connection stands and nobody waits for one."""
        return not any(self._lanes.values()) and not any(self._arrivals.values())

    @property
    def is_connected(self) -> bool:
        """Whether a connection of any kind stands."""
        return any(connection.is_open for connection in self.all())

    @property
    def stripe_count(self) -> int:
        """Lanes for pieces that stand, to whichever process of the peer."""
        return sum(lane.is_open for lane in self._lanes[Lane.STRIPE])

    @property
    def dialed_address(self) -> Multiaddr | None:
        """Where the peer has proven to be: the other end of a connection that stands, and that this host dialed."""
        ends = (one.remote_address for one in self.all() if one.is_open and one.role is Role.INITIATOR)
        return next((end for end in ends if end is not None), None)

    @property
    def dialed_stripes(self) -> list[Connection]:
        """The lanes for pieces that stand, and that this host dialed, to whichever process of the peer."""
        return [one for one in self._lanes[Lane.STRIPE] if one.is_open and one.role is Role.INITIATOR]

    @property
    def last_sign(self) -> float:
        """When the peer last showed life on a connection that stands, in seconds of the loop; -inf: none stands."""
        return max(
            (connection.liveness.last_sign for connection in self.all() if connection.is_open),
            default=-math.inf,
        )

    def all(self) -> list[Connection]:
        """Every connection, the best one for control first."""
        return [connection for lane in KEPT for connection in self._lanes[lane]]

    def add(self, connection: Connection) -> None:
        """A connection has opened."""
        lane = self._lanes[connection.lane]
        lane.append(connection)
        if connection.lane is Lane.CONTROL or connection.lane is Lane.BULK:
            # When both sides have dialed at once, both prefer the same connection, and the other one falls idle.
            lane.sort(key=self._is_dialed_by_greater)
        waiting, self._arrivals[connection.lane] = self._arrivals[connection.lane], []
        for future in waiting:
            if not future.done():
                future.set_result(None)

    def remove(self, connection: Connection) -> None:
        """A connection has ended."""
        lane = self._lanes[connection.lane]
        if connection in lane:
            lane.remove(connection)

    def control(self) -> Connection | None:
        """The connection for small calls."""
        for connection in self._lanes[Lane.CONTROL]:
            if connection.is_open:
                return connection
        return None

    def bulk(self, incarnation: int | None = None) -> list[Connection]:
        """The bulk lanes, the least loaded one first: those to one process of the peer, or all."""
        lanes = [lane for lane in self._lanes[Lane.BULK] if lane.is_open]
        if incarnation is not None:
            lanes = [lane for lane in lanes if lane.incarnation == incarnation]
        return sorted(lanes, key=lambda connection: connection.load)

    def stripes(self, incarnation: int) -> list[Connection]:
        """The lanes for pieces to one process of the peer, the oldest first."""
        lanes = self._lanes[Lane.STRIPE]
        return [one for one in lanes if one.is_open and one.incarnation == incarnation]

    def streams_of(self, channel_id: int, incarnation: int) -> Multiplexer | None:
        """The streams of one of the connections to that process."""
        for connection in self._lanes[Lane.BULK] + self._lanes[Lane.CONTROL]:
            if connection.channel_id == channel_id and connection.incarnation == incarnation:
                return connection.streams
        return None

    def forget_process(self, incarnation: int) -> None:
        """The last connection to that process of the peer has ended."""
        self.bundles.pop(incarnation, None)

    def lane_report(self, incarnation: int | None) -> LaneReport | None:
        """How payloads to one process of the peer travel; None if none have."""
        bundle = None if incarnation is None else self.bundles.get(incarnation)
        return None if bundle is None else bundle.report()

    def is_redundant(self, connection: Connection) -> bool:
        """Whether a control connection has fallen out of use because another one is preferred."""
        return connection.lane is Lane.CONTROL and self.control() not in (None, connection)

    def next_arrival(self, lane: Lane) -> asyncio.Future[None]:
        """Resolved when a connection of this kind opens, dialed by whichever side."""
        future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._arrivals[lane].append(future)
        return future

    def forget_arrival(self, lane: Lane, future: asyncio.Future[None]) -> None:
        """Nobody waits for ``future`` any more."""
        if future in self._arrivals[lane]:
            self._arrivals[lane].remove(future)

    def _is_dialed_by_greater(self, connection: Connection) -> bool:
        dialed_by_us = connection.role is Role.INITIATOR
        return dialed_by_us == (self._own > self._peer)
