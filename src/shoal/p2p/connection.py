"""One authenticated connection: the asyncio shell around :class:`~shoal.p2p.protocol.session.Session` and the streams.

It hands the transport's bytes to the session, and frames to the streams and to the handlers of what the peer calls. It
knows how a connection is opened and how it ends. Its :class:`~.connection_writer.ConnectionWriter` sends, its
:class:`~.liveness.LivenessMonitor` keeps the time. Which connections exist, and to which peers, is decided by
their ``owner``: :class:`~shoal.p2p.connections.Connections`.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
from typing import cast

from shoal.errors import ConnectionLost, DeadlineExceeded, ProtocolViolation, ShoalError
from shoal.p2p import tcp_info
from shoal.p2p.calls import Calls
from shoal.p2p.config import KIB
from shoal.p2p.connection_owner import ConnectionOwner
from shoal.p2p.connection_writer import ConnectionWriter
from shoal.p2p.identity import PeerID
from shoal.p2p.lanes.scheduler import Outgoing
from shoal.p2p.liveness import LivenessMonitor
from shoal.p2p.multiaddr import Multiaddr
from shoal.p2p.pacing import CreditPace, ReadingPace
from shoal.p2p.protocol import wire
from shoal.p2p.protocol.claims import UNKNOWN
from shoal.p2p.protocol.frames import FrameKind, Piece, discard_piece
from shoal.p2p.protocol.session import (
    FrameReceived,
    HandshakeCompleted,
    PayloadReceived,
    PieceReceived,
    Role,
    Session,
)
from shoal.p2p.protocol.stream_state import StreamState
from shoal.p2p.protocol.streams import Multiplexer
from shoal.p2p.protocol.violations import Ending, EndKind, TurnedAway
from shoal.p2p.rpc import Lane
from shoal.p2p.sockets import ip_of, origin_of
from shoal.utils import figures

logger = logging.getLogger(__name__)

STRIPE_IDLE = 2.0
"""Seconds without a piece after which a lane that carries only these counts as idle."""
CONNECTION_FRAMES = frozenset({FrameKind.HELLO, FrameKind.GOODBYE, FrameKind.PING, FrameKind.PONG})


class Connection(asyncio.BufferedProtocol):
    """See the module. ``lane`` is what the dialing side wants it to be; the other side learns it from HELLO."""

    def __init__(
        self,
        owner: ConnectionOwner[Connection],
        role: Role,
        *,
        expected_peer: PeerID | None = None,
        lane: Lane = Lane.CONTROL,
    ) -> None:
        self.lane = lane
        self.role = role
        self.remote: PeerID | None = None
        self.hello: wire.Hello | None = None
        self.remote_address: Multiaddr | None = None
        """The other end as this side sees it: what it dialed, or from where it was dialed."""
        self.seen: Multiaddr | None = None
        """This end as the peer sees it, if it says so."""
        self.hello_sent: wire.Hello | None = None
        self.remote_ip: str | None = None
        self.local_ip: str | None = None
        self.origin: str | None = None
        """Whom limits per address count this connection for; None for a process of this machine."""
        self.ending: Ending | None = None
        """How it ended; None while it stands."""
        self.last_used = 0.0
        self.last_piece = 0.0
        """When it last carried a piece of a striped payload, or was opened."""
        self._loop = asyncio.get_running_loop()
        self.opened: asyncio.Future[None] = self._loop.create_future()
        """Done when HELLO has arrived; fails with :class:`ProtocolViolation`, :class:`ConnectionLost` or
        :class:`DeadlineExceeded`."""
        self.opened.add_done_callback(_mark_retrieved)
        self.closed: asyncio.Future[None] = self._loop.create_future()
        self.is_admitted = False
        """Whether the owner has let the peer in, which has said HELLO and proven its identity."""
        self._owner = owner
        self._config = owner.config
        self._session = Session(role, owner.identity, secrets.token_bytes(32), expected_peer=expected_peer)
        self._session.payload_sink = self._place_payload
        self._session.piece_sink = self._place_piece
        self.writer = ConnectionWriter(self._session, owner.upload_turns, self._peer_does_not_read)
        """What goes out."""
        self._pace = ReadingPace(owner.download_turns)
        self._credit_pace = CreditPace(owner.download_turns, self._send_credit)
        self.liveness = LivenessMonitor(self, self.writer, owner.config)
        """Its time, and the peer's signs of life."""
        self.streams = Multiplexer(
            is_initiator=role is Role.INITIATOR,
            send_frame=self._send_frame,
            max_inbound=owner.config.max_inbound_streams,
            max_unread=owner.config.max_unread,
            discard_payload=self._session.discard_payload,
            striped_received=self._striped_received,
            violate=self.violate,
        )
        self.calls = Calls(self, self.streams, owner.find_served, owner.config.max_stream_timeout)
        """Opens streams on this connection, and serves those of the peer."""
        self._transport: asyncio.Transport | None = None

    # Who, and in which state.

    @property
    def peer(self) -> PeerID:
        """Who is at the other end; known once the connection is opened."""
        assert self.remote is not None
        return self.remote

    @property
    def close_reason(self) -> str | None:
        """Why it ended, in words; None while it stands."""
        return None if self.ending is None else self.ending.reason

    @property
    def incarnation(self) -> int:
        """The number that the peer's process has drawn; :data:`.claims.UNKNOWN` until it says it."""
        return UNKNOWN if self.hello is None else self.hello.incarnation

    @property
    def channel_id(self) -> int:
        """What both sides call this connection."""
        return self._session.channel_id

    @property
    def is_open(self) -> bool:
        """Whether streams can be opened on it."""
        return self.is_admitted and self.ending is None

    @property
    def rtt(self) -> float | None:
        """Smoothed round-trip time in seconds, once measured."""
        return self.liveness.rtt

    @property
    def load(self) -> int:
        """Streams in use here: the least loaded lane gets the next one."""
        return self.streams.open_streams

    @property
    def is_idle(self) -> bool:
        """Whether nothing goes on here."""
        if self.lane is Lane.STRIPE:
            return self._loop.time() - self.last_piece > STRIPE_IDLE
        return self.streams.open_streams == 0 and not self.calls.handlers

    @property
    def max_message(self) -> int:
        """The longest message body that peers accept."""
        return self._session.limits.max_message_body - 1 * KIB

    # Transport -> session.

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)
        self.writer.connect(self._transport)
        self._pace.connect(self._transport)
        peername = transport.get_extra_info("peername")
        self.remote_ip = ip_of(peername)
        if self.remote_ip is not None:
            protocol = "ip6" if ":" in self.remote_ip else "ip4"
            self.remote_address = Multiaddr(protocol, self.remote_ip, int(peername[1]))
        self.local_ip = ip_of(transport.get_extra_info("sockname"))
        self.origin = origin_of(self.remote_ip, self.local_ip)
        refusal = self._owner.connection_made(self)
        if refusal is not None:
            self._end(Ending(refusal.kind, refusal.reason), TurnedAway(refusal.reason, refusal.kind))
        if self.ending is not None:
            self._transport.abort()
            return
        self.liveness.begin_handshake(speaks_first=self.role is Role.INITIATOR, expire=self._expire_handshake)
        self._session.start()
        self.writer.flush()

    @property
    def hears_late(self) -> bool:
        """Whether this side reads slowly, to stay within its rate."""
        return self._pace.is_slow

    def get_buffer(self, sizehint: int) -> memoryview:
        buffer = self._session.get_buffer(sizehint)
        return buffer[: self._pace.most] if self._is_bulk else buffer

    @property
    def _is_bulk(self) -> bool:
        """Whether all that comes is bulk data, whose reading has a rate. Any connection may carry payloads, but on one
        for calls these must not hold up calls: there the credit for them waits.
        """
        return self.lane is not Lane.CONTROL and self.is_admitted

    def buffer_updated(self, nbytes: int) -> None:
        if self.ending is not None:
            return
        self.liveness.receive_bytes()
        is_bulk, payload_bytes = self._is_bulk, self._session.payload_bytes
        self.writer.hold()  # what is answered leaves in one write
        try:
            for event in self._session.buffer_updated(nbytes):
                self._receive_event(event)
        except ProtocolViolation as error:
            self.violate(error)
        finally:
            self.writer.let_go()
        if self.ending is None:
            if is_bulk:
                self._pace.note(nbytes)
            else:
                self._credit_pace.note(self._session.payload_bytes - payload_bytes)

    def eof_received(self) -> bool:
        if self.ending is None:
            reason = "closed by the peer"
            try:
                self._session.receive_eof()
            except ProtocolViolation as error:
                reason = f"ended by the peer: {error}"
            self._break_off(Ending(EndKind.LOST, reason), ConnectionLost(self._where(reason)))
        return False

    def connection_lost(self, exc: Exception | None) -> None:
        reason = f"lost: {exc}" if exc is not None else "closed by the peer"
        self._end(Ending(EndKind.LOST, reason), ConnectionLost(self._where(reason)))
        self.liveness.stop()
        self._pace.disconnect()
        self._credit_pace.disconnect()
        self._session.release()  # connections are cycles, which are collected late
        if not self.closed.done():
            self.closed.set_result(None)
        self._owner.connection_closed(self)

    def pause_writing(self) -> None:
        self.writer.pause()

    def resume_writing(self) -> None:
        self.writer.resume()

    # Frames.

    def _send_frame(self, kind: FrameKind, stream_id: int, body: bytes) -> None:
        """Send a frame of a stream."""
        if kind is FrameKind.CREDIT and self.lane is Lane.CONTROL:
            self._credit_pace.send(stream_id, body)
        else:
            self.writer.send_frame(kind, stream_id, body)

    def _send_credit(self, stream_id: int, body: bytes) -> None:
        self.writer.send_frame(FrameKind.CREDIT, stream_id, body)

    def _receive_event(self, event: object) -> None:
        if self.ending is not None:
            return
        if isinstance(event, FrameReceived):
            self._receive_frame(event.kind, event.stream_id, event.body)
        elif isinstance(event, PayloadReceived):
            self.streams.receive_payload(event.stream_id, event.tag, event.data)
        elif isinstance(event, PieceReceived):
            home = self._owner.home_of(self, event.piece)
            if home is not None:
                self.last_piece = self._loop.time()
                home.receive_piece(event.piece)
        elif isinstance(event, HandshakeCompleted):
            self.remote = event.remote
            info = tcp_info.read(self._transport)
            self.liveness.end_handshake(None if info is None else info.rtt)
            if self.role is Role.INITIATOR:
                self._send_hello()

    def _receive_frame(self, kind: FrameKind, stream_id: int, body: bytes) -> None:
        if kind in CONNECTION_FRAMES:
            self._receive_connection_frame(kind, body)
        elif not self.is_admitted:
            raise ProtocolViolation(f"{kind.name} before HELLO")
        elif self.lane in (Lane.PROBE, Lane.STRIPE):
            raise ProtocolViolation(f"{kind.name} on a lane that carries no streams")
        elif kind is FrameKind.OPEN:
            self.note_use()
            self.calls.receive_open(stream_id, body)
        else:
            self.streams.receive_frame(kind, stream_id, body)

    def _receive_connection_frame(self, kind: FrameKind, body: bytes) -> None:
        if kind is FrameKind.GOODBYE:
            goodbye = wire.decode_goodbye(body)
            if goodbye.proof:
                self._owner.hear_refusal(goodbye.reason, goodbye.proof)
            self._receive_goodbye(goodbye)
        elif kind is FrameKind.HELLO:
            self._receive_hello(wire.decode_hello(body))
        elif len(body) != wire.PING_BYTES:
            raise ProtocolViolation(f"{kind.name} with a body of {len(body)} bytes")
        elif kind is FrameKind.PING:
            self.writer.send_frame(FrameKind.PONG, 0, body)
        else:
            self.liveness.receive_pong(body)

    def _receive_goodbye(self, goodbye: wire.Refusal) -> None:
        ending = Ending(goodbye.kind, f"the peer said goodbye: {goodbye.reason}", by_peer=True)
        words = self._where(ending.reason)
        failure = ConnectionLost(words) if self.opened.done() else TurnedAway(words, goodbye.kind)
        if not ending.peer_has_left:
            self._end(ending, failure)
            return
        self._break_off(ending, failure)  # it takes nothing that we still have for it
        self._owner.peer_left(self)

    def _receive_hello(self, hello: wire.Hello) -> None:
        if self.hello is not None:
            raise ProtocolViolation("a second HELLO")
        if self.role is Role.RESPONDER:
            if hello.lane not in Lane.__members__.values():
                raise ProtocolViolation(f"HELLO for an unknown kind of lane: {hello.lane}")
            self.lane = Lane(hello.lane)
        self.hello = hello
        self.last_used = self.last_piece = self._loop.time()
        contest = self._owner.contest(self)
        if contest is None:
            self._admit()
        elif self.role is Role.RESPONDER:
            contest.add_done_callback(self._contest_decided)
        else:
            # Who dialed has streams of the peer to serve at once: it does not wait, and finds the verdict next time.
            self._refuse(wire.Refusal("another peer with the same identity is connected; it is asked"))

    def _contest_decided(self, contest: asyncio.Task[wire.Refusal | None]) -> None:
        if self.ending is not None or contest.cancelled():
            return
        refusal = contest.result()
        if refusal is None:
            self._admit()
        else:
            self._refuse(refusal)

    def _refuse(self, refusal: wire.Refusal) -> None:
        if not self.opened.done():
            self.opened.set_exception(TurnedAway(refusal.reason, refusal.kind))
        self._close(refusal)

    def _admit(self) -> None:
        self.is_admitted = True
        refusal = self._owner.connection_opened(self)
        if refusal is not None:
            if self.role is Role.RESPONDER and self.remote == self._owner.identity.peer_id:
                self._send_hello()  # both ends need both claims
            self._refuse(refusal)
            return
        if self.role is Role.RESPONDER:
            # Only now, so that a dialer who gets HELLO knows that it was not refused.
            self._send_hello()
        if not self.opened.done():
            self.opened.set_result(None)
        self.liveness.begin_watch()

    def _send_hello(self) -> None:
        self.hello_sent = self._owner.make_hello(self)
        self.writer.send_frame(FrameKind.HELLO, 0, wire.encode(self.hello_sent))

    def _place_payload(self, stream_id: int, tag: int, length: int) -> memoryview:
        if not self.is_admitted:
            raise ProtocolViolation("PAYLOAD before HELLO")
        return self.streams.payload_memory(stream_id, tag, length)

    def _place_piece(self, piece: Piece) -> memoryview:
        if not self.is_admitted or self.lane not in (Lane.STRIPE, Lane.BULK):
            raise ProtocolViolation("PIECE on a connection that is not for bulk data")
        home = self._owner.home_of(self, piece)
        memory = None if home is None else home.piece_memory(piece)
        return discard_piece(piece) if memory is None else memory

    def _striped_received(self, stream_id: int, number: int) -> None:
        self._owner.bundle_of(self).receive_confirmation(self.channel_id, stream_id, number)

    def stripe(self, state: StreamState, tag: int, data: memoryview) -> Outgoing | None:
        """Begin to send a payload over several connections; None: it goes out on this one."""
        is_too_long = len(data) > self._session.limits.max_payload  # as is said where it would go out whole
        if self.lane is not Lane.BULK or self.ending is not None or is_too_long:
            return None
        return self._owner.bundle_of(self).stripe(self.channel_id, state, tag, data)

    # What the liveness monitor sees.

    @property
    def seen_elsewhere(self) -> float:
        """When the peer last showed life on another connection, in seconds of the loop; -inf: on none."""
        return self._owner.seen_elsewhere(self)

    @property
    def congestion_control(self) -> str:
        """How the system avoids congestion on it; empty if it does not tell."""
        return tcp_info.congestion_control(self._transport)

    def measure(self) -> tcp_info.TcpInfo | None:
        """What the system knows of it now; None if it does not tell."""
        return tcp_info.read(self._transport)

    @property
    def heard_at(self) -> float:
        """When something last arrived, in seconds of the loop."""
        return self.liveness.heard_at

    def note_use(self) -> None:
        """A stream was opened, by either side: from now on somebody waits for this peer."""
        self.liveness.note_use()

    def close_if_spare(self) -> bool:
        """Close a connection that is not used and can be spared; False if it stays."""
        if self._owner.may_close_idle(self):
            self.close("not used")
        return self.ending is not None

    def fall_silent(self, silence: float) -> None:
        """The peer shows no sign of life: end the connection."""
        reason = f"no sign of life for {figures.duration(silence)}"
        logger.info("%s", self._where(reason))
        self._say_goodbye(wire.Refusal(reason, kind=EndKind.SILENCE))  # it may hear, and not be heard
        self._end(Ending(EndKind.SILENCE, reason), ConnectionLost(self._where(reason)))

    def ask_elsewhere(self) -> None:
        """The peer is asked for a sign of life here: ask it on its unused connections too."""
        self._owner.ask_others(self)

    def _expire_handshake(self) -> None:
        reason = f"no proof of identity within {self._config.handshake_timeout:g} s"
        self._break_off(Ending(EndKind.OTHER, reason), DeadlineExceeded(self._where(reason)))

    def _peer_does_not_read(self) -> None:
        reason = "the peer does not read"
        self._end(Ending(EndKind.OTHER, reason), ConnectionLost(self._where(reason)))

    # The end.

    def violate(self, error: ProtocolViolation) -> None:
        """End the connection: the peer broke the protocol."""
        if self.ending is not None:
            return
        # Who dialed tells its caller why that failed, e.g. that another peer lives at an address now; and anybody may
        # knock at an open port. A known peer that breaks the protocol is another matter.
        level = logging.INFO if self.role is Role.RESPONDER else logging.DEBUG
        level = logging.WARNING if self.hello is not None else level
        logger.log(level, "%s", self._where(f"broke the protocol: {error}"))
        self._say_goodbye(wire.Refusal(f"protocol violation: {error}"))
        self._end(Ending(EndKind.OTHER, f"broke the protocol: {error}"), error)

    def close(self, reason: str, kind: EndKind = EndKind.OTHER) -> None:
        """Say goodbye and close; what is queued is still sent, within ``close_timeout``."""
        self._close(wire.Refusal(reason, kind=kind))

    def _close(self, refusal: wire.Refusal) -> None:
        if self.ending is None:
            self._say_goodbye(refusal)
            reason = f"closed by this side: {refusal.reason}"
            self._end(Ending(refusal.kind, reason), ConnectionLost(self._where(reason)))

    def abort(self, reason: str) -> None:
        """Close at once; what is queued is lost."""
        self._break_off(Ending(EndKind.OTHER, reason), ConnectionLost(reason))

    def drop(self, ending: Ending) -> None:
        """Close at once: the end of the peer was seen on another connection."""
        self._break_off(ending, ConnectionLost(self._where(ending.reason)))

    def _break_off(self, ending: Ending, failure: ShoalError) -> None:
        self._end(ending, failure)
        if self._transport is not None:
            self._transport.abort()

    def _say_goodbye(self, refusal: wire.Refusal) -> None:
        # In the middle of a payload there is no place for a frame, before the end of the handshake no key for it.
        if self.remote is not None and self.writer.has_place_for_frame:
            self.writer.send_frame(FrameKind.GOODBYE, 0, wire.encode_goodbye(refusal))
            self.writer.flush()

    def _end(self, ending: Ending, failure: ShoalError) -> None:
        if self.ending is not None:
            return
        self.ending = ending
        # Now, and not when the transport is closed: that may still have to hand over what is queued.
        self._loop.call_soon(self._owner.connection_ended, self)
        self.writer.end()
        if not self.opened.done():
            self.opened.set_exception(failure)
        self.streams.fail_all(lambda: type(failure)(str(failure)))
        self.calls.cancel_handlers()
        if self._transport is not None:
            self._transport.close()
            self.liveness.begin_end(self._transport.abort)

    def _where(self, what: str) -> str:
        who = str(self.remote) if self.remote is not None else f"unknown peer at {self.remote_ip}"
        return f"connection to {who}: {what}"


def _mark_retrieved(future: asyncio.Future[None]) -> None:
    # Nobody may be waiting for it: an incoming connection that fails is logged, not raised.
    if not future.cancelled():
        future.exception()
