"""All connections of a host: who is dialed when, which connection carries what, and how many there may be.

One control connection per peer carries the small calls of both sides; bulk lanes are opened on demand. When both
sides dial at once, both connections stand for a while, both sides prefer the same one, and the other falls idle.
"""

from __future__ import annotations

import asyncio
import functools
import logging
import math
from collections.abc import Awaitable, Callable
from typing import Protocol

import msgspec

from shoal.errors import (
    ConnectionLost,
    DeadlineExceeded,
    InvalidStateError,
    InvalidValueError,
    PeerUnreachable,
    ProtocolViolation,
    ShoalError,
)
from shoal.p2p.calls import Served
from shoal.p2p.config import HostConfig
from shoal.p2p.connection import Connection
from shoal.p2p.dialing import Dialer
from shoal.p2p.identity import Identity, PeerID
from shoal.p2p.lane_opener import StripeOpener
from shoal.p2p.lanes.bundle import Bundle
from shoal.p2p.lanes.lane import tune
from shoal.p2p.multiaddr import Multiaddr
from shoal.p2p.network import Network
from shoal.p2p.pacing import ReadingTurns
from shoal.p2p.pool import PeerConnections
from shoal.p2p.protocol import wire
from shoal.p2p.protocol.frames import Piece
from shoal.p2p.protocol.session import Role
from shoal.p2p.protocol.streams import Multiplexer
from shoal.p2p.protocol.violations import Ending, EndKind
from shoal.p2p.reach.addresses import AddressBook
from shoal.p2p.reach.incarnations import Incarnations
from shoal.p2p.reach.routes import Route, routes
from shoal.p2p.room import Room
from shoal.p2p.rpc import Lane
from shoal.p2p.tenancy import Tenancy
from shoal.p2p.turns import SendingTurns

logger = logging.getLogger(__name__)

REDUNDANT_TIMEOUT = 10.0
PASSED_OVER = 20.0
"""A lane without a piece for so many seconds counts as unused, though there are streams: others carry their data."""
LANE_RETRY_PAUSE = 30.0


class AskForLane(Protocol):
    """Asks a peer to dial this host."""

    def __call__(self, peer: PeerID, deadline: float, stripes: int = 0) -> Awaitable[bool]:
        """For one lane for streams, or for ``stripes`` lanes for pieces."""


class Connections:
    """The owner of every connection of a host. ``find_served`` and ``make_hello`` are the host's."""

    def __init__(
        self,
        identity: Identity,
        network: Network,
        config: HostConfig,
        *,
        find_served: Callable[[str], Served | None],
        make_hello: Callable[[Connection], wire.Hello],
        ask_for_lane: AskForLane,
        peer_met: Callable[[Connection], None],
        peer_lost: Callable[[PeerID, Ending], None],
        clock: Callable[[], float],
        clock_differs: Callable[[PeerID, float], None],
        incarnation: int | None = None,
    ) -> None:
        self.identity = identity
        self.config = config
        self.addresses = AddressBook(
            max_peers=config.max_known_peers, max_addresses=config.max_addresses_per_peer
        )
        self.upload_turns = SendingTurns(config.max_upload_rate)
        self.download_turns = ReadingTurns(config.max_download_rate)
        self.incarnations = Incarnations(config.max_known_peers)
        self.find_served = find_served
        self.make_hello = make_hello
        self._ask_for_lane = ask_for_lane
        self._peer_met = peer_met
        self._peer_lost = peer_lost
        self._clock = clock
        self.tenancy = Tenancy(
            identity,
            connections_to=lambda peer: [one for one in self._all_to(peer) if one.is_open],
            forget_addresses=self.addresses.forget,
            clock=clock,
            incarnation=incarnation,
        )
        self.contest = self.tenancy.contest
        self.hear_refusal = self.tenancy.hear_refusal
        self._clock_differs = clock_differs
        self._dialer = Dialer(network, self._make, timeout=config.dial_timeout, stagger=config.dial_stagger)
        self._peers: dict[PeerID, PeerConnections] = {}
        self._connections: dict[Connection, None] = {}
        self._dials: dict[tuple[PeerID, Lane], asyncio.Task[Connection | PeerUnreachable]] = {}
        self._lane_failures: dict[PeerID, float] = {}
        self._stripes = StripeOpener(self, self._dialer)
        self._room = Room(self._connections, config, self._can_be_had_again, self.is_unused)
        self._is_closing = False

    # What is there.

    def to(self, peer: PeerID) -> PeerConnections | None:
        """The connections to ``peer``, if any."""
        return self._peers.get(peer)

    def dialed_stripes(self) -> list[Connection]:
        """See :class:`~shoal.p2p.lane_opener.LaneOwner`."""
        return [stripe for one in self._peers.values() for stripe in one.dialed_stripes]

    def dialing_stripes(self) -> int:
        """See :class:`~shoal.p2p.lane_opener.LaneOwner`."""
        return sum(one.dialing for one in self._peers.values())

    def is_unused(self, connection: Connection) -> bool:
        """Whether nothing goes on on a connection. A lane for pieces is in use while there are streams whose payloads
        may come on it, unless it has been passed over for long.
        """
        if connection.lane is not Lane.STRIPE or not connection.is_idle:
            return connection.is_idle
        silence = asyncio.get_running_loop().time() - connection.last_piece
        return silence > PASSED_OVER or not self.entry(connection.peer).has_streams

    def connected(self) -> list[PeerID]:
        """All peers to which a connection stands."""
        return [peer for peer, connections in self._peers.items() if connections.is_connected]

    def is_client(self, peer: PeerID) -> bool:
        """Whether ``peer`` is connected and says that it cannot be dialed."""
        return any(one.hello is not None and one.hello.is_client for one in self._all_to(peer))

    def routes_to(self, peer: PeerID) -> list[Route]:
        """The routes that this host can take to ``peer``, as far as it knows; none to a client."""
        known = [] if self.is_client(peer) else routes(self.addresses.get(peer))
        return [route for route in known if not route.obstacle]

    # Getting one.

    async def control(self, peer: PeerID, deadline: float) -> Connection:
        """The control connection to ``peer``, dialed if need be."""
        if peer == self.identity.peer_id:
            raise InvalidValueError(f"peer: {peer} is this host itself")
        while True:
            self._check_not_closing()
            connections = self._peers.get(peer)
            connection = None if connections is None else connections.control()
            if connection is not None:
                return connection
            outcome = await self._dial(peer, Lane.CONTROL, deadline)
            if isinstance(outcome, Connection) and not outcome.is_open:
                raise ConnectionLost(f"connection to {peer}: {outcome.close_reason}")
            connections = self._peers.get(peer)
            if isinstance(outcome, PeerUnreachable) and (connections is None or not connections.control()):
                raise PeerUnreachable(str(outcome), outcome.dials)

    async def lane(self, peer: PeerID, deadline: float) -> Connection:
        """The bulk lane to ``peer`` for the next stream; the control connection if none can be had."""
        control = await self.control(peer, deadline)
        lanes = self._bulk(peer)
        now = asyncio.get_running_loop().time()
        may_open = len(lanes) < self.config.bulk_lanes and now >= self._lane_failures.get(peer, now)
        if may_open and (not lanes or lanes[0].load > 0):
            if not await self._open_lane(peer, deadline):
                until = {one: when for one, when in self._lane_failures.items() if when > now}
                self._lane_failures = {**until, peer: now + LANE_RETRY_PAUSE}
            lanes = self._bulk(peer)
        if lanes:
            self.bundle_of(lanes[0]).prepare()
            return lanes[0]
        return control if control.is_open else await self.control(peer, deadline)

    async def open_lane_to(self, peer: PeerID) -> bool:
        """``peer`` asks for one more lane, because it cannot dial this host."""
        loop = asyncio.get_running_loop()
        before = len(self._bulk(peer))
        if before >= self.config.bulk_lanes or not self.routes_to(peer):
            return False
        deadline = loop.time() + self.config.dial_timeout
        # More than once, if the dial that was joined had just led to the lane before.
        while len(self._bulk(peer)) <= before:
            if isinstance(await self._dial(peer, Lane.BULK, deadline), PeerUnreachable):
                return False
        return True

    def open_stripes_to(self, peer: PeerID, count: int) -> bool:
        """``peer`` asks for so many lanes for pieces, because it cannot dial this host; whether any is dialed."""
        return self._stripes.open_for(peer, count)

    @property
    def upload_rate(self) -> float | None:
        """Bytes of bulk data a second that this host can send; None: neither measured nor limited."""
        measured = self._stripes.uplink.peak(asyncio.get_running_loop().time())
        known = [rate for rate in (measured, self.config.max_upload_rate) if rate]
        return min(known, default=None)

    def bundle_of(self, connection: Connection) -> Bundle:
        """See :class:`~shoal.p2p.connection_owner.ConnectionOwner`."""
        return self._stripes.bundle(connection.peer, connection.incarnation)

    def home_of(self, connection: Connection, piece: Piece) -> Multiplexer | None:
        """See :class:`~shoal.p2p.connection_owner.ConnectionOwner`."""
        connections = self._peers.get(connection.peer)
        return None if connections is None else connections.streams_of(piece.home, connection.incarnation)

    async def dial_address(
        self, address: Multiaddr, expected: PeerID | None, lane: Lane, deadline: float
    ) -> Connection | PeerUnreachable:
        """A fresh connection to one address."""
        self._check_not_closing()
        try:
            async with asyncio.timeout_at(deadline):
                outcome = await self._dialer.dial([Route.of(address.without_peer_id())], expected, lane)
        except TimeoutError:
            raise DeadlineExceeded(f"{address} could not be connected in time") from None
        return outcome if isinstance(outcome, PeerUnreachable) else outcome[0]

    def _all_to(self, peer: PeerID) -> list[Connection]:
        connections = self._peers.get(peer)
        return [] if connections is None else connections.all()

    def _bulk(self, peer: PeerID) -> list[Connection]:
        connections = self._peers.get(peer)
        return [] if connections is None else connections.bulk()

    async def _open_lane(self, peer: PeerID, deadline: float) -> bool:
        if self.routes_to(peer) and not isinstance(
            await self._dial(peer, Lane.BULK, deadline), PeerUnreachable
        ):
            return True
        arrival = self.entry(peer).next_arrival(Lane.BULK)
        try:
            return await self._ask_for_lane(peer, deadline) and await self._arrives(arrival, deadline)
        except ShoalError as error:
            logger.debug("%s opens no lane: %s", peer, error)
            return False
        finally:
            self.forget_arrival(peer, Lane.BULK, arrival)

    async def _arrives(self, arrival: asyncio.Future[None], deadline: float) -> bool:
        timeout = min(deadline - asyncio.get_running_loop().time(), self.config.dial_timeout)
        await asyncio.wait((arrival,), timeout=max(timeout, 0.0))
        return arrival.done()

    async def _dial(self, peer: PeerID, lane: Lane, deadline: float) -> Connection | PeerUnreachable | None:
        """Share the dial that is under way, or begin one; None to look again at what there is."""
        loop = asyncio.get_running_loop()
        task = self._dials.get((peer, lane))
        is_joined = task is not None and not task.done()
        if task is None or not is_joined:
            task = loop.create_task(self._run_dial(peer, lane))
            self._dials[peer, lane] = task
            task.add_done_callback(functools.partial(self._dial_done, peer, lane))
        arrival = self.entry(peer).next_arrival(lane)
        try:
            await asyncio.wait(
                (task, arrival), timeout=max(deadline - loop.time(), 0.0), return_when=asyncio.FIRST_COMPLETED
            )
            if task.done():
                if task.cancelled():
                    raise InvalidStateError("the host is closed")
                outcome = task.result()
                # One that was under way may have led to a connection that has ended already: dial afresh.
                is_stale = is_joined and isinstance(outcome, Connection) and not outcome.is_open
                return None if is_stale else outcome
            if arrival.done():
                return None
            raise DeadlineExceeded(f"{peer} could not be connected in time")
        finally:
            self.forget_arrival(peer, lane, arrival)

    def _dial_done(self, peer: PeerID, lane: Lane, task: asyncio.Task[Connection | PeerUnreachable]) -> None:
        if self._dials.get((peer, lane)) is task:
            del self._dials[peer, lane]
        if not task.cancelled() and task.exception() is not None:
            # Failures to reach a peer are results; this is a mistake of ours, which those who wait see too.
            logger.error("dialing %s failed unexpectedly", peer, exc_info=task.exception())

    async def _run_dial(self, peer: PeerID, lane: Lane) -> Connection | PeerUnreachable:
        outcome = await self._dialer.dial(routes(self.addresses.get(peer)), peer, lane)
        if isinstance(outcome, PeerUnreachable):
            return outcome
        connection, address = outcome
        self.addresses.prefer(peer, address)
        return connection

    # What connections tell their owner.

    def accept(self) -> Connection:
        """A connection for somebody who dials this host."""
        return Connection(self, Role.RESPONDER)

    def _make(self, expected: PeerID | None, lane: Lane) -> Connection:
        return Connection(self, Role.INITIATOR, expected_peer=expected, lane=lane)

    def connection_made(self, connection: Connection) -> wire.Refusal | None:
        """See :class:`~shoal.p2p.connection_owner.ConnectionOwner`."""
        self._connections[connection] = None
        if self._is_closing:
            return wire.Refusal("the host is closed")
        return self._room.refuse_dialer(connection)

    def connection_opened(self, connection: Connection) -> wire.Refusal | None:
        """See :class:`~shoal.p2p.connection_owner.ConnectionOwner`."""
        peer, hello = connection.peer, connection.hello
        assert hello is not None
        if peer == self.identity.peer_id:
            return self.tenancy.meet(connection)
        try:
            announced = [Multiaddr.parse(text) for text in hello.addresses]
            seen = Multiaddr.parse(hello.seen) if hello.seen else None
        except InvalidValueError as error:
            raise ProtocolViolation(f"HELLO with a bad address: {error}") from error
        connection.seen = None if seen is None or seen.unspoken else seen
        if self._is_closing:
            return wire.Refusal("the host is closed", kind=EndKind.LEAVING)
        refusal = self._room.make(connection)
        if refusal is not None:
            return refusal
        self._note_clock(connection, hello)
        if connection.lane is Lane.PROBE:
            return None
        self.addresses.add(peer, _meaningful(announced, connection))
        self._lane_failures.pop(peer, None)
        self.incarnations.note(peer, connection.incarnation)
        if connection.lane is not Lane.CONTROL:
            is_stripe = connection.lane is Lane.STRIPE
            others = len(self.entry(peer).stripes(connection.incarnation)) if is_stripe else None
            tune(connection.writer.transport, self.config.congestion_control, others)
        self.entry(peer).add(connection)
        if connection.lane is Lane.STRIPE:
            # Soon: HELLO, with which the dialing side lets this one in, has to be the first thing on it.
            asyncio.get_running_loop().call_soon(self.bundle_of(connection).pump)
        self._peer_met(connection)
        logger.debug("connected to %s (%s, %s lane)", peer, hello.agent, connection.lane.name.lower())
        return None

    def peer_announced(self, peer: PeerID, addresses: list[Multiaddr], is_client: bool) -> None:
        """``peer`` says that what its HELLO said of it has changed."""
        known = self._all_to(peer)
        self.addresses.add(peer, _meaningful(addresses, known[0]) if known else addresses)
        for connection in known:
            if connection.hello is not None:
                texts = [str(address) for address in addresses]
                connection.hello = msgspec.structs.replace(
                    connection.hello, is_client=is_client, addresses=texts
                )

    def connection_ended(self, connection: Connection) -> None:
        """See :class:`~shoal.p2p.connection_owner.ConnectionOwner`."""
        assert connection.ending is not None
        peer = connection.remote
        connections = None if peer is None else self._peers.get(peer)
        if peer is None or connections is None or connection not in connections.all():
            logger.debug("%s connection: %s", connection.role.value, connection.ending)
            return
        connections.remove(connection)
        bundle = connections.bundles.get(connection.incarnation)
        if bundle is not None and connection.lane is not Lane.CONTROL:
            bundle.lane_ended(connection)
        self._drop_if_empty(peer)
        # A new process of the peer may be connected already: that the old one is gone is told all the same.
        if all(other.incarnation != connection.incarnation for other in connections.all()):
            connections.forget_process(connection.incarnation)
            self._peer_lost(peer, connection.ending)

    def connection_closed(self, connection: Connection) -> None:
        """See :class:`~shoal.p2p.connection_owner.ConnectionOwner`."""
        self._connections.pop(connection, None)

    def may_close_idle(self, connection: Connection) -> bool:
        """See :class:`~shoal.p2p.connection_owner.ConnectionOwner`."""
        assert connection.remote is not None
        idle = asyncio.get_running_loop().time() - max(connection.last_used, connection.last_piece)
        if connection.lane is not Lane.CONTROL:
            return idle >= self.config.idle_lane_timeout
        connections = self._peers.get(connection.remote)
        if connections is not None and connections.is_redundant(connection):
            return idle >= REDUNDANT_TIMEOUT
        return idle >= self.config.idle_timeout and self._can_be_had_again(connection)

    def peer_left(self, connection: Connection) -> None:
        """See :class:`~shoal.p2p.connection_owner.ConnectionOwner`."""
        assert connection.ending is not None
        for other in self._all_to(connection.peer):
            if other.incarnation == connection.incarnation:
                other.drop(connection.ending)

    def ask_others(self, connection: Connection) -> None:
        """See :class:`~shoal.p2p.connection_owner.ConnectionOwner`."""
        for other in self._all_to(connection.peer):
            if other is not connection and other.is_open:
                other.liveness.ask()

    def seen_elsewhere(self, connection: Connection) -> float:
        others = (other for other in self._all_to(connection.peer) if other is not connection)
        return max((other.liveness.last_sign for other in others), default=-math.inf)

    def _can_be_had_again(self, connection: Connection) -> bool:
        # A peer that cannot be dialed could not be called any more, and neither could this host by that peer.
        return bool(self.routes_to(connection.peer)) and not self.config.client_mode

    def _note_clock(self, connection: Connection, hello: wire.Hello) -> None:
        ahead = hello.clock - self._clock()
        if abs(ahead) > self.config.clock_difference + (connection.rtt or 0.0):
            self._clock_differs(connection.peer, ahead)

    # Entries of peers.

    def ask_for_stripes(self, peer: PeerID, deadline: float, count: int) -> Awaitable[bool]:
        """Ask ``peer`` to dial this host for so many lanes for pieces."""
        return self._ask_for_lane(peer, deadline, count)

    def entry(self, peer: PeerID) -> PeerConnections:
        """The connections to ``peer``; made if there are none."""
        connections = self._peers.get(peer)
        if connections is None:
            connections = self._peers[peer] = PeerConnections(self.identity.peer_id, peer)
        return connections

    def forget_arrival(self, peer: PeerID, lane: Lane, arrival: asyncio.Future[None]) -> None:
        """Nobody waits for ``arrival`` any more."""
        self.entry(peer).forget_arrival(lane, arrival)
        self._drop_if_empty(peer)

    def _drop_if_empty(self, peer: PeerID) -> None:
        connections = self._peers.get(peer)
        if connections is not None and connections.is_empty:
            del self._peers[peer]

    # The end.

    def retire(self, reason: str, kind: EndKind) -> None:
        """Close all connections and open no more."""
        self._is_closing = True
        for connection in list(self._connections):
            connection.close(reason, kind)

    def _check_not_closing(self) -> None:
        if self.tenancy.rival is not None:
            raise PeerUnreachable(str(self.tenancy.rival))
        if self._is_closing:
            raise InvalidStateError("the host is closed")

    def abort(self) -> None:
        """Reset all connections."""
        self._is_closing = True
        self.tenancy.close()
        for connection in list(self._connections):
            connection.abort("aborted by this side")

    async def close(self) -> None:
        """Say goodbye to everybody; when this returns, no transport, handler or dial is left."""
        self._is_closing = True
        contests = self.tenancy.close()
        dials = [*self._dials.values(), *self._stripes.dials]
        for dial in dials:
            dial.cancel()
        connections = list(self._connections)
        here = asyncio.current_task()
        handlers = [
            task for connection in connections for task in connection.calls.handlers if task is not here
        ]
        for connection in connections:
            connection.close("the host is closing", EndKind.LEAVING)
        await asyncio.gather(*dials, *contests, *handlers, return_exceptions=True)
        # Each is aborted by its own timer when the peer does not take what is queued.
        await asyncio.gather(*(connection.closed for connection in connections))


def _meaningful(addresses: list[Multiaddr], connection: Connection) -> list[Multiaddr]:
    """What a peer announces, without loopback if that would lead to this machine instead of the peer's."""
    if connection.origin is None:
        return addresses
    return [address for address in addresses if not address.is_loopback]
