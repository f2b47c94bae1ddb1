"""Opens lanes for pieces: as many as each path needs, all of them within the limit of the host."""

from __future__ import annotations

import asyncio
import logging
import weakref
from collections import Counter
from collections.abc import Awaitable, Coroutine
from typing import Any, Protocol

from shoal.errors import ShoalError
from shoal.p2p.config import MAX_STRIPES, HostConfig
from shoal.p2p.connection import Connection
from shoal.p2p.dialing import Dialer
from shoal.p2p.identity import PeerID
from shoal.p2p.lanes.bundle import Bundle
from shoal.p2p.lanes.memory import Ends, PathMemory
from shoal.p2p.lanes.upload_rate import UploadRate
from shoal.p2p.pool import PeerConnections
from shoal.p2p.protocol.violations import EndKind
from shoal.p2p.room import files_for_lanes
from shoal.p2p.rpc import Lane
from shoal.p2p.turns import SendingTurns

logger = logging.getLogger(__name__)

AT_ONCE = 16
"""So many lanes to one peer are opened at once. Several peers may share an address, and each host lets only so many
connections of one address prove at once who they are."""
RETRY_PAUSE = 5.0
"""Seconds after a lane could not be opened until more are."""
MAX_PATHS = 4096


class LaneOwner(Protocol):
    """What an opener needs of the connections of its host."""

    config: HostConfig
    upload_turns: SendingTurns

    def entry(self, peer: PeerID) -> PeerConnections:
        """The connections to a peer, made if there are none."""

    def dialed_stripes(self) -> list[Connection]:
        """Lanes for pieces, to all peers, that stand and that this host dialed."""

    def dialing_stripes(self) -> int:
        """How many lanes for pieces this host dials now, to all peers together."""

    def is_unused(self, connection: Connection) -> bool:
        """Whether nothing goes on on a connection."""

    def forget_arrival(self, peer: PeerID, lane: Lane, arrival: asyncio.Future[None]) -> None:
        """Nobody waits for ``arrival`` any more."""

    def ask_for_stripes(self, peer: PeerID, deadline: float, count: int) -> Awaitable[bool]:
        """Ask a peer that cannot be dialed to dial."""


class StripeOpener:
    """See the module."""

    def __init__(self, owner: LaneOwner, dialer: Dialer) -> None:
        self._owner = owner
        self._dialer = dialer
        self._paths: dict[tuple[PeerID, Ends], PathMemory] = {}
        self._pauses: dict[PeerID, float] = {}
        self._refused: set[PeerID] = set()
        """Peers of whose lanes that are being opened one has failed."""
        self._bundles: weakref.WeakSet[Bundle] = weakref.WeakSet()
        self.uplink = UploadRate()
        """What the host's uplink takes."""
        self.dials: dict[asyncio.Task[bool], None] = {}
        """What is being dialed or asked for."""

    def bundle(self, peer: PeerID, incarnation: int) -> Bundle:
        """The lanes to one process of a peer."""
        connections = self._owner.entry(peer)
        bundle = connections.bundles.get(incarnation)
        if bundle is None:
            bundle = Bundle(
                memory_of=lambda ends: self._path(peer, ends),
                homes=lambda: connections.bulk(incarnation),
                lanes=lambda: connections.stripes(incarnation),
                open_more=lambda count: self._open(peer, count),
                limit=self._limit,
                turns=self._owner.upload_turns,
                uplink=self.uplink,
                fixed=self._owner.config.lanes_per_peer or None,
            )
            connections.bundles[incarnation] = bundle
            self._bundles.add(bundle)
        return bundle

    def _limit(self) -> int:
        """What one bundle may have now."""
        busy = sum(bundle.is_busy for bundle in self._bundles)
        return max(1, min(self._most(), MAX_STRIPES) // max(1, busy))

    def _most(self) -> int:
        return min(self._owner.config.max_lanes, files_for_lanes())

    def _path(self, peer: PeerID, ends: Ends) -> PathMemory:
        path = self._paths.pop((peer, ends), None) or PathMemory()
        self._paths[peer, ends] = path
        while len(self._paths) > MAX_PATHS:
            del self._paths[next(iter(self._paths))]
        return path

    def _open(self, peer: PeerID, count: int) -> None:
        """Open lanes to ``peer``, as far as they are not being opened, and some of them now."""
        opening = self._owner.entry(peer).opening
        missing = min(count, AT_ONCE) - opening
        if missing <= 0 or self._is_paused(peer):
            return
        if self._owner.entry(peer).dialed_address is not None:
            self._dial_often(peer, self._make_room(peer, missing))
        else:  # it has dialed this host, and may be where it cannot be dialed
            self._begin(peer, self._ask(peer, missing), asked_for=missing)

    def open_for(self, peer: PeerID, count: int) -> bool:
        """Begin to dial so many lanes for ``peer``, which asks for them, those counted that are being dialed; False if
        there may be none.

        The peer itself says where it can be dialed. So that it cannot turn connections on another one, only the address
        of a connection is dialed that stands, and that this host dialed. However often it and others ask, all lanes
        together are within the limit.
        """
        if self._is_paused(peer) or self._owner.entry(peer).dialed_address is None:
            return False
        dialing = self._owner.entry(peer).dialing
        room = self._make_room(peer, min(count, AT_ONCE) - dialing)
        self._dial_often(peer, room)
        return dialing + room > 0

    def _make_room(self, peer: PeerID, count: int) -> int:
        """How many of so many more lanes to ``peer`` may be dialed. Unused ones to others are closed for them, and some
        of peers that have more than their share, up to the share of this one.
        """
        most, dialed = self._most(), self._owner.dialed_stripes()
        room = most - len(dialed) - self._owner.dialing_stripes()
        # Below 0 for a moment: a lane that has just opened still counts as being dialed, too.
        if room >= count or room < 0:
            return max(0, min(count, room))
        counts = Counter(lane.peer for lane in dialed)
        own = counts.pop(peer, 0) + self._owner.entry(peer).dialing
        share = most // (1 + len(counts))
        others = sorted((lane for lane in dialed if lane.peer != peer), key=lambda lane: lane.last_piece)
        for lane in others:
            is_surplus = own + room < share < counts[lane.peer]
            if room < count and (is_surplus or self._owner.is_unused(lane)):
                counts[lane.peer] -= 1
                lane.close("a lane to another peer takes its place", EndKind.NO_ROOM)
                room += 1
        return max(0, min(count, room))

    def _is_paused(self, peer: PeerID) -> bool:
        return asyncio.get_running_loop().time() < self._pauses.get(peer, 0.0)

    def _dial_often(self, peer: PeerID, count: int) -> None:
        for _ in range(count):
            self._begin(peer, self._dial(peer), dialing=1)

    def _begin(
        self, peer: PeerID, work: Coroutine[Any, Any, bool], *, dialing: int = 0, asked_for: int = 0
    ) -> None:
        """Work in a task of its own, while so many lanes count as being dialed or asked for. When the last task for a
        peer has ended, and any has failed, there is a pause.
        """
        loop, entry = asyncio.get_running_loop(), self._owner.entry(peer)
        entry.dialing += dialing
        entry.asked_for += asked_for

        def done(task: asyncio.Task[bool]) -> None:
            entry.dialing -= dialing
            entry.asked_for -= asked_for
            self.dials.pop(task, None)
            if task.cancelled() or not _succeeded(task, peer):
                self._refused.add(peer)
            if entry.opening == 0 and peer in self._refused:
                self._refused.discard(peer)
                self._pauses = {one: when for one, when in self._pauses.items() if when > loop.time()}
                self._pauses[peer] = loop.time() + RETRY_PAUSE

        task = loop.create_task(work)
        self.dials[task] = None
        task.add_done_callback(done)

    async def _dial(self, peer: PeerID) -> bool:
        address = self._owner.entry(peer).dialed_address
        return address is not None and isinstance(
            await self._dialer.dial_one(address, peer, Lane.STRIPE), Connection
        )

    async def _ask(self, peer: PeerID, count: int) -> bool:
        """Ask for lanes, and wait until all of them have come, or it is too late."""
        loop, entry = asyncio.get_running_loop(), self._owner.entry(peer)
        deadline, before = loop.time() + self._owner.config.dial_timeout, entry.stripe_count
        arrival = entry.next_arrival(Lane.STRIPE)  # the first one may come before the answer
        try:
            if not await self._owner.ask_for_stripes(peer, deadline, count):
                return False
            while entry.stripe_count < before + count and loop.time() < deadline:
                await asyncio.wait((arrival,), timeout=deadline - loop.time())
                if arrival.done():
                    arrival = entry.next_arrival(Lane.STRIPE)
        finally:
            self._owner.forget_arrival(peer, Lane.STRIPE, arrival)
        return entry.stripe_count > before


def _succeeded(task: asyncio.Task[bool], peer: PeerID) -> bool:
    error = task.exception()
    if isinstance(error, ShoalError):
        logger.debug("%s opens no lanes: %s", peer, error)
    elif error is not None:  # a mistake of ours
        logger.error("opening a lane to %s failed", peer, exc_info=error)
    return error is None and task.result()
