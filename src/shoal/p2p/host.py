"""The host: one identity, its listeners, its connections to peers, and the methods that it serves."""

from __future__ import annotations

import random
from collections.abc import Awaitable, Callable, Iterable, Sequence
from contextlib import AbstractAsyncContextManager

from shoal.p2p.config import HostConfig
from shoal.p2p.identity import Identity, PeerID
from shoal.p2p.multiaddr import Multiaddr
from shoal.p2p.network import Network
from shoal.p2p.rpc import Lane, Method, RequestT, ResponseT, Stream

__all__ = ["Host"]


class Host:
    """What calls peers and is called by them. Lives on one event loop; nothing here is thread-safe.

    Connections are opened when they are needed and shared: one opened by either side carries the calls of both, so
    that a peer that cannot be dialed is called over the connection that it opened.
    """

    identity: Identity
    peer_id: PeerID

    def __init__(
        self,
        identity: Identity,
        network: Network,
        config: HostConfig = HostConfig(),
        *,
        clock: Callable[[], float],
        rng: random.Random | None = None,
    ) -> None:
        raise NotImplementedError

    async def start(self, listen_on: Sequence[Multiaddr] = ()) -> None:
        """Listen at each address (port 0: any free one). Without addresses the host can only dial."""

    async def close(self) -> None:
        """Say goodbye to everybody, cancel all handlers, close everything. Idempotent."""

    @property
    def listen_addresses(self) -> list[Multiaddr]:
        """Where the host listens, with real ports, without ``/p2p``."""
        raise NotImplementedError

    @property
    def announced_addresses(self) -> list[Multiaddr]:
        """What peers are told: ``config.announce``, or else where it listens; nothing if it cannot be dialed."""
        raise NotImplementedError

    @property
    def can_be_dialed(self) -> bool:
        """False in client mode, and after :meth:`check_reachability` found that nobody gets through."""
        raise NotImplementedError

    def add_addresses(self, peer: PeerID, addresses: Iterable[Multiaddr]) -> None:
        """Remember where ``peer`` may be dialed; the newest are kept and are tried first."""

    def addresses_of(self, peer: PeerID) -> list[Multiaddr]:
        """Where ``peer`` may be dialed, as far as known, without ``/p2p``."""
        raise NotImplementedError

    async def connect(self, peer_or_address: PeerID | Multiaddr, *, timeout: float) -> PeerID:
        """Make sure that there is a connection, and return who is at its other end.

        An address without ``/p2p`` accepts whoever answers. :class:`PeerUnreachable` lists each address with the
        reason (refused, timed out, other identity, other version, not a Shoal peer, this host itself);
        :class:`DeadlineExceeded`; :class:`InvalidValueError` for the host's own PeerID.
        """
        raise NotImplementedError

    def is_connected(self, peer: PeerID) -> bool:
        """Whether a connection to ``peer`` stands."""
        raise NotImplementedError

    def connected_peers(self) -> list[PeerID]:
        """Everybody to whom a connection stands, in the order in which they came."""
        raise NotImplementedError

    def rtt(self, peer: PeerID) -> float | None:
        """The smoothed round-trip time to ``peer`` in seconds, if it was measured."""
        raise NotImplementedError

    def serve(
        self, method: Method[RequestT, ResponseT], handler: Callable[[PeerID, RequestT], Awaitable[ResponseT]]
    ) -> None:
        """Answer calls of ``method``. :class:`InvalidValueError` if its name is served already.

        The handler's task is cancelled when the caller cancels, disconnects or its deadline passes. A handler that
        raises ``RemoteError(code, message)`` sends that; another :class:`ShoalError` is sent as code ``failed`` with its
        text; anything else as ``internal``, and is logged here with its traceback.
        """

    def serve_stream(
        self, method: Method[RequestT, ResponseT], handler: Callable[[Stream], Awaitable[None]]
    ) -> None:
        """Serve streams of ``method``; errors as in :meth:`serve`. When the handler returns, the stream is finished."""

    def stop_serving(self, method: Method[RequestT, ResponseT]) -> None:
        """Serve ``method`` no more; calls in progress go on. Does nothing if it is not served."""

    async def call(
        self, peer: PeerID, method: Method[RequestT, ResponseT], request: RequestT, *, timeout: float
    ) -> ResponseT:
        """Call ``method`` at ``peer``, connecting if need be; ``timeout`` in seconds covers everything.

        Raises :class:`DeadlineExceeded`, :class:`PeerUnreachable`, :class:`ConnectionLost`, :class:`RemoteError`
        (codes: see :mod:`shoal.p2p.wire`), :class:`ProtocolViolation`. Cancelling cancels the handler too.
        """
        raise NotImplementedError

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
        raise NotImplementedError

    def on_disconnect(self, callback: Callable[[PeerID, str], None]) -> Callable[[], None]:
        """Call ``callback(peer, reason)`` when the last connection to a peer ends; returns an unsubscriber."""
        raise NotImplementedError
