"""The host: one identity, its listeners, its connections to peers, and the methods that it serves."""

from __future__ import annotations

import asyncio
import logging
import math
import random
from collections.abc import Awaitable, Callable, Iterable, Sequence
from contextlib import AbstractAsyncContextManager

from shoal.errors import (
    DialFailure,
    IdentityInUse,
    InvalidStateError,
    InvalidValueError,
    PeerUnreachable,
)
from shoal.p2p import tcp_info
from shoal.p2p.announcing import Announcer
from shoal.p2p.calls import Served
from shoal.p2p.config import HostConfig
from shoal.p2p.connection import Connection
from shoal.p2p.connections import Connections
from shoal.p2p.identity import Identity, PeerID
from shoal.p2p.lane_requests import OPEN_LANE, LaneRequests
from shoal.p2p.lanes.lane import LaneReport
from shoal.p2p.multiaddr import Multiaddr
from shoal.p2p.network import Listener, Network
from shoal.p2p.opening import OpenedStream
from shoal.p2p.pool import KEPT
from shoal.p2p.probing import Prober
from shoal.p2p.protocol import wire
from shoal.p2p.protocol.violations import Ending, EndKind
from shoal.p2p.reach.dialback import (
    ANNOUNCE,
    DIAL_BACK,
    DialBackRequest,
    DialBackResponse,
)
from shoal.p2p.reach.helper import DialBackHelper
from shoal.p2p.reach.inquiry import Reach
from shoal.p2p.reach.reachability import Findings, Reachability
from shoal.p2p.rivals import Rivals
from shoal.p2p.rpc import Lane, Method, RequestT, ResponseT, Stream
from shoal.p2p.tenancy import CLAIM
from shoal.utils.timed import get_dht_time

__all__ = ["Host"]

logger = logging.getLogger(__name__)

CHECK_TIMEOUT = 7.0


class Host:
    """What calls peers and is called by them. Lives on one event loop; nothing here is thread-safe.

    Connections are opened when they are needed and shared: one opened by either side carries the calls of both, so
    that a peer that cannot be dialed is called over the connection that it opened.
    """

    def __init__(
        self,
        identity: Identity,
        network: Network,
        config: HostConfig = HostConfig(),
        *,
        clock: Callable[[], float] = get_dht_time,
        rng: random.Random | None = None,
        incarnation: int | None = None,
    ) -> None:
        self.identity = identity
        self.peer_id = identity.peer_id
        self.config = config
        self.rng = rng if rng is not None else random.Random()  # noqa: S311 - decides order, keeps no secret
        self._network = network
        self._clock = clock
        self._listeners: list[Listener] = []
        self._served: dict[str, Served] = {}
        self._on_disconnect: dict[int, Callable[[PeerID, Ending], None]] = {}
        self._on_clock_difference: dict[int, Callable[[PeerID, float], None]] = {}
        self._subscriptions = 0
        self._state = "new"
        self._connections = Connections(
            identity,
            network,
            config,
            find_served=lambda name: self._served.get(name),
            make_hello=self._make_hello,
            ask_for_lane=self._ask_for_lane,
            peer_met=self._peer_met,
            peer_lost=self._peer_lost,
            clock=clock,
            clock_differs=self._clock_differs,
            incarnation=incarnation,
        )
        self.reach = Reach(
            config=lambda: self.config,
            listening=lambda: self.listen_addresses,
            list_interfaces=network.interfaces,
            connections_to=self._connections_to,
            connect=lambda peer, timeout: self.connect(peer, timeout=timeout),
            ask=self._ask_back,
        )
        """Where this host can be dialed, as far as it knows."""
        self._lanes = LaneRequests(
            ask=self.call,
            can_be_dialed=lambda: self.reachability.is_full,
            open_lane_to=self._connections.open_lane_to,
            open_stripes_to=self._connections.open_stripes_to,
        )
        self._rivals = Rivals(self._connections)
        self._announcer = Announcer(
            reachability=lambda: self.reachability,
            is_elsewhere=self.is_elsewhere,
            ask=self.call,
            peer_announced=self._connections.peer_announced,
        )
        self.tenancy = self._connections.tenancy
        self.tenancy.on_lost.append(self._retire)
        prober = Prober(self._connections, interfaces=self.reach.interfaces)
        helper = DialBackHelper(
            ips_of=prober.ips_of, probe=prober.probe, now=lambda: asyncio.get_running_loop().time()
        )
        self.serve(DIAL_BACK, helper.handle)
        self.serve(OPEN_LANE, self._lanes.answer)
        self.serve(ANNOUNCE, self._announcer.hear)
        self.serve(CLAIM, self.tenancy.handle_claim)

    async def start(self, listen_on: Sequence[Multiaddr] = ()) -> None:
        """Listen at each address (port 0: any free one). Without addresses the host can only dial.

        :class:`OSError` if an address cannot be had; the host is closed then.
        """
        if self._state != "new":
            raise InvalidStateError(f"start: the host is {self._state}")
        self._state = "running"
        if self.config.client_mode and listen_on:
            raise InvalidValueError("listen_on: a host in client mode does not listen")
        for address in listen_on:
            if address.unspoken:
                raise InvalidValueError(f"listen_on: {address}: {address.unspoken}")
        try:
            for address in listen_on:
                self._listeners.append(await self._network.listen(self._connections.accept, address))
        except BaseException:
            await self.close()
            raise

    async def close(self) -> None:
        """Say goodbye to everybody, cancel all handlers, close everything. Idempotent."""
        self._state = "closed"
        for listener in self._listeners:
            listener.close()
        self._announcer.close()
        await self._connections.close()
        for listener in self._listeners:
            await listener.wait_closed()

    def leave(self) -> None:
        """Say goodbye to everybody now, and speak with nobody any more. :meth:`close` the host then."""
        self._stop_speaking("the host is closing", EndKind.LEAVING)

    def abort(self) -> None:
        """Drop everything at once without a word, as the death of the process would; :meth:`close` it then."""
        self._state = "closed"
        for listener in self._listeners:
            listener.close()
        self._connections.abort()

    async def ask_rivals(self, addresses: Iterable[Multiaddr]) -> list[DialFailure]:
        """Dial where another peer with this host's identity may be; how each dial ended instead.

        An address that does not answer within 5 s counts as free: its dial ended as TIMED_OUT.

        :raises IdentityInUse: another peer answers, and keeps the identity
        """
        failures = await self._rivals.ask(addresses)
        self.check_identity()
        return failures

    def check_identity(self) -> None:
        """:class:`IdentityInUse` if another peer holds this host's identity: the host is closed then."""
        if self.tenancy.rival is not None:
            raise self.tenancy.rival

    def addresses_elsewhere(self, peer: PeerID) -> list[Multiaddr]:
        """Where ``peer`` is known to have been, other than what it says of itself on its connections."""
        connections = self._connections.to(peer)
        hellos = [] if connections is None else [connection.hello for connection in connections.all()]
        said = {text for hello in hellos if hello is not None for text in hello.addresses}
        return [address for address in self.addresses_of(peer) if str(address) not in said]

    @property
    def listen_addresses(self) -> list[Multiaddr]:
        """Where the host listens, with real ports, without ``/p2p``."""
        return [listener.address for listener in self._listeners]

    @property
    def announced_addresses(self) -> list[Multiaddr]:
        """What peers are told: first the addresses at which others got through; nothing if it cannot be dialed."""
        return list(self.reachability.addresses)

    @property
    def visible_addresses(self) -> list[Multiaddr]:
        """What a person may give to others: as :attr:`announced_addresses`, and loopback at the end, if it is listened
        on.
        """
        return self.reach.visible()

    @property
    def candidate_addresses(self) -> list[Multiaddr]:
        """Where it may be that peers can dial the host: ``config.announce``, or else where it listens.

        For a listener on all interfaces these are the interfaces' addresses.
        """
        return self.reach.candidates()

    @property
    def reachability(self) -> Reachability:
        """How others reach this host now: whether they can dial it, where, how that is known, and why not."""
        return self.reach.reachability

    def is_elsewhere(self, peer: PeerID) -> bool:
        """Whether ``peer`` is connected from another machine, where loopback addresses of this one mean nothing."""
        connections = self._connections.to(peer)
        return connections is not None and any(one.origin is not None for one in connections.all())

    def is_client(self, peer: PeerID) -> bool:
        """Whether ``peer`` is connected and says that it cannot be dialed."""
        return self._connections.is_client(peer)

    def add_addresses(self, peer: PeerID, addresses: Iterable[Multiaddr]) -> None:
        """Remember where ``peer`` may be dialed; the newest are kept and are tried first."""
        if peer != self.peer_id:
            self._connections.addresses.add(peer, addresses)

    def add_hearsay(self, peer: PeerID, addresses: Iterable[Multiaddr]) -> None:
        """As :meth:`add_addresses`, for what another peer says of ``peer``: tried last, and displaces nothing."""
        if peer != self.peer_id:
            self._connections.addresses.add_hearsay(peer, addresses)

    def addresses_of(self, peer: PeerID) -> list[Multiaddr]:
        """Where ``peer`` may be dialed, as far as known, without ``/p2p``."""
        return self._connections.addresses.get(peer)

    async def connect(self, peer_or_address: PeerID | Multiaddr, *, timeout: float) -> PeerID:
        """Make sure that there is a connection, and return who is at its other end.

        An address without ``/p2p`` accepts any peer that answers. :class:`PeerUnreachable` lists each address with the
        reason (refused, timed out, other identity, other version, not a Shoal peer, this host itself);
        :class:`DeadlineExceeded`; :class:`InvalidValueError` for the host's own PeerID.
        """
        deadline = asyncio.get_running_loop().time() + timeout
        if isinstance(peer_or_address, PeerID):
            return (await self._connections.control(peer_or_address, deadline)).peer
        address = peer_or_address
        expected = None if address.peer_id is None else PeerID.from_base58(address.peer_id)
        if expected == self.peer_id:
            raise InvalidValueError(f"peer_or_address: {address} is this host itself")
        if expected is not None and self.is_connected(expected):
            return expected
        outcome = await self._connections.dial_address(address, expected, Lane.CONTROL, deadline)
        if isinstance(outcome, PeerUnreachable):
            raise outcome
        self._connections.addresses.prefer(outcome.peer, address)
        return outcome.peer

    def is_connected(self, peer: PeerID) -> bool:
        """Whether a connection to ``peer`` stands."""
        connections = self._connections.to(peer)
        return connections is not None and connections.is_connected

    def last_sign(self, peer: PeerID) -> float:
        """When ``peer`` last showed life on a connection that stands, in seconds of the loop; -inf: none stands."""
        connections = self._connections.to(peer)
        return -math.inf if connections is None else connections.last_sign

    def incarnation(self, peer: PeerID) -> int | None:
        """The number that the process of ``peer`` drew when it started, as last seen; None if it was not met.

        A peer that comes back as another process has another number. What is remembered of a peer's failures is to be
        remembered of that process: keep the number with it.
        """
        return self._connections.incarnations.of(peer)

    def connected_peers(self) -> list[PeerID]:
        """All peers to which a connection stands, in the order in which they came."""
        return self._connections.connected()

    def count_connections(self, peer: PeerID) -> dict[Lane, int]:
        """How many connections to ``peer`` stand, by kind."""
        connections = self._connections.to(peer)
        lanes = [] if connections is None else [one.lane for one in connections.all() if one.is_open]
        return {lane: lanes.count(lane) for lane in KEPT}

    @property
    def upload_rate(self) -> float | None:
        """Bytes of bulk data a second that this host can send to all peers together; None: neither measured nor
        limited. It is measured over long paths while they are full.
        """
        return self._connections.upload_rate

    def lane_report(self, peer: PeerID) -> LaneReport | None:
        """How the payloads to ``peer`` travel; None if none have."""
        connections = self._connections.to(peer)
        return None if connections is None else connections.lane_report(self.incarnation(peer))

    def rtt(self, peer: PeerID) -> float | None:
        """The smoothed round-trip time to ``peer`` in seconds, if it was measured."""
        connections = self._connections.to(peer)
        connection = None if connections is None else connections.control()
        return None if connection is None else connection.rtt

    def least_rtt(self, peer: PeerID) -> float | None:
        """The smallest round-trip time to ``peer`` in seconds, where the system measures it: of the path alone, and not
        of processes that are busy. Else as :meth:`rtt`.
        """
        connections = self._connections.to(peer)
        connection = None if connections is None else connections.control()
        info = None if connection is None else tcp_info.read(connection.writer.transport)
        return (info and info.min_rtt) or self.rtt(peer)

    def serve(
        self, method: Method[RequestT, ResponseT], handler: Callable[[PeerID, RequestT], Awaitable[ResponseT]]
    ) -> None:
        """Answer calls of ``method``. :class:`InvalidValueError` if its name is served already.

        The handler's task is cancelled when the caller cancels, disconnects or its deadline passes. A handler that
        raises ``RemoteError(code, message)`` sends that; another :class:`ShoalError` is sent as code ``failed``
        with its text; anything else as ``internal``, and is logged here with its traceback.
        """
        self._register(Served(method, unary=handler))

    def serve_stream(
        self, method: Method[RequestT, ResponseT], handler: Callable[[Stream], Awaitable[None]]
    ) -> None:
        """Serve streams of ``method``; errors as in :meth:`serve`.

        When the handler returns, the stream is finished, and the peer may send no more on it.
        """
        self._register(Served(method, stream=handler))

    def stop_serving(self, method: Method[RequestT, ResponseT]) -> None:
        """Serve ``method`` no more; calls in progress go on. Does nothing if it is not served."""
        self._served.pop(method.name, None)

    async def call(
        self, peer: PeerID, method: Method[RequestT, ResponseT], request: RequestT, *, timeout: float
    ) -> ResponseT:
        """Call ``method`` at ``peer``, connecting if need be; ``timeout`` in seconds covers everything.

        Raises :class:`DeadlineExceeded`, :class:`PeerUnreachable`, :class:`ConnectionLost`, :class:`RemoteError`
        (codes: see :mod:`shoal.p2p.protocol.wire`), :class:`ProtocolViolation`. Cancelling cancels the handler too.
        """
        deadline = asyncio.get_running_loop().time() + timeout
        body = wire.encode(request)
        connection = await self._connections.control(peer, deadline)
        wire.check_message_size(body, connection.max_message)
        response: ResponseT = await connection.calls.call(method, body, deadline, timeout)
        return response

    def open_stream(
        self,
        peer: PeerID,
        method: Method[RequestT, ResponseT],
        *,
        timeout: float | None = None,
        lane: Lane = Lane.CONTROL,
    ) -> AbstractAsyncContextManager[Stream]:
        """Open a stream for the length of an ``async with`` block, connecting if need be.

        ``timeout`` covers the whole life of the stream. Leaving the block by an exception resets the stream; leaving
        it normally finishes it, and resets it if the other side has not finished.
        """
        return OpenedStream(self._connections, peer, method, timeout, lane)

    def on_disconnect(self, callback: Callable[[PeerID, Ending], None]) -> Callable[[], None]:
        """Call ``callback(peer, ending)`` when the last connection to a peer's process ends; returns an unsubscriber.

        ``ending`` tells a goodbye (:attr:`~shoal.p2p.protocol.violations.Ending.peer_has_left`) from a connection that
        was closed, lost or found dead by silence.
        """
        self._subscriptions += 1
        number = self._subscriptions
        self._on_disconnect[number] = callback
        return lambda: self._on_disconnect.pop(number, None) and None

    def on_clock_difference(self, callback: Callable[[PeerID, float], None]) -> Callable[[], None]:
        """Call ``callback(peer, seconds)`` when a peer connects whose clock is ahead by so many seconds, or behind if
        negative: by more than ``config.clock_difference`` and the round trip. Returns an unsubscriber.
        """
        self._subscriptions += 1
        number = self._subscriptions
        self._on_clock_difference[number] = callback
        return lambda: self._on_clock_difference.pop(number, None) and None

    async def check_reachability(
        self, helpers: Sequence[PeerID], *, more: Sequence[PeerID] = (), timeout: float = CHECK_TIMEOUT
    ) -> Findings:
        """Ask ``helpers`` to dial back the candidate addresses, and draw the conclusions; see :mod:`.inquiry`.

        ``more`` are asked too if the helpers disagree, or if they say that nobody gets through any more. If nobody
        gets through, one warning says what can be done, nothing is announced, and the host acts as a client; what it
        listens on goes on. If a helper gets through later, that ends, and is logged. Peers that are connected hear of
        a change by :meth:`announce`.
        """
        return await self.reach.check(helpers, more, timeout)

    async def announce(self) -> None:
        """Tell all connected peers where this host can be dialed now, or that it cannot; those that fail are left out.

        For a change: peers that connect learn it anyway.
        """
        await self._announcer.tell(self.connected_peers())

    # ---- inside ----

    def _peer_met(self, connection: Connection) -> None:
        self.reach.note_connection(connection)
        self._announcer.peer_met(connection)

    def _register(self, served: Served) -> None:
        if served.method.name in self._served:
            raise InvalidValueError(f"method: {served.method.name!r} is served already")
        self._served[served.method.name] = served

    def _make_hello(self, connection: Connection) -> wire.Hello:
        now = self.reachability
        claim = self.tenancy.claim()
        return wire.Hello(
            lane=int(connection.lane),
            agent=self.config.agent,
            is_client=not now.is_full,
            addresses=[str(one) for one in now.told(beyond_machine=connection.origin is not None)],
            clock=self._clock(),
            seen="" if connection.remote_address is None else str(connection.remote_address),
            incarnation=claim.incarnation,
            tenure=claim.tenure,
        )

    def _retire(self, rival: IdentityInUse) -> None:
        """Another peer holds the identity. :meth:`close` the host then."""
        self._stop_speaking(f"another peer holds this identity, at {rival.address}", EndKind.OTHER)

    def _stop_speaking(self, reason: str, kind: EndKind) -> None:
        self._state = "closed"
        for listener in self._listeners:
            listener.close()
        self._connections.retire(reason, kind)

    async def _ask_for_lane(self, peer: PeerID, deadline: float, stripes: int = 0) -> bool:
        return await self._lanes.ask(peer, deadline, stripes)

    def _peer_lost(self, peer: PeerID, ending: Ending) -> None:
        for callback in list(self._on_disconnect.values()):
            callback(peer, ending)

    def _clock_differs(self, peer: PeerID, ahead: float) -> None:
        for callback in list(self._on_clock_difference.values()):
            callback(peer, ahead)

    def _connections_to(self, peer: PeerID) -> list[Connection]:
        connections = self._connections.to(peer)
        return [] if connections is None else connections.all()

    async def _ask_back(self, helper: PeerID, request: DialBackRequest, timeout: float) -> DialBackResponse:
        return await self.call(helper, DIAL_BACK, request, timeout=timeout)
