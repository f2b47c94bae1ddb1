"""One authenticated, encrypted connection, without its I/O: bytes in any split come in, events go out.

Theory of operation. The shell (an asyncio ``BufferedProtocol``) asks :meth:`Session.get_buffer` where to put
the next bytes, reports them with :meth:`Session.buffer_updated`, which returns what they mean, and writes to
its transport what :meth:`Session.data_to_send` returns. First :class:`~shoal.p2p.protocol.handshake.Handshake` takes
the bytes; once both PeerIDs are proven, each Noise message is opened in place: ciphertext lies in the receive
buffer, plaintext goes to a new ``bytes`` or, in a payload, to the memory that its receiver gave, and nowhere
between. Outgoing payloads are sealed straight into large batches of wire bytes (:mod:`shoal.p2p.protocol.sealing`).

The first error ends a session: every later call raises it again, but for sending GOODBYE, which tells the
peer. Time limits are the shell's business.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from shoal.errors import InvalidStateError, InvalidTypeError, InvalidValueError, ProtocolViolation
from shoal.p2p.identity import Identity, PeerID
from shoal.p2p.protocol.frames import (
    CHUNK_BYTES,
    DEFAULT_LIMITS,
    FrameDecoder,
    FrameKind,
    FrameReceived,
    Limits,
    PayloadReceived,
    PayloadSink,
    Piece,
    PieceReceived,
    PieceSink,
    allocate_payload,
    encode_header,
    encode_piece_header,
    fits_beside,
)
from shoal.p2p.protocol.handshake import Handshake, Role
from shoal.p2p.protocol.noise import REKEY_BYTES, TAG_BYTES, CipherState
from shoal.p2p.protocol.preamble import SUPPORTED_VERSIONS, Versions
from shoal.p2p.protocol.receive_buffer import ReceiveBuffer
from shoal.p2p.protocol.sealing import PREFIX_BYTES, seal_chunks, seal_message
from shoal.p2p.protocol.violations import TruncatedStream

if TYPE_CHECKING:
    from typing_extensions import Buffer

# A 512 KiB payload, the usual part of a tensor, is one piece.
_BATCH_BYTES: Final = 9 * CHUNK_BYTES


@dataclass(frozen=True, slots=True)
class HandshakeCompleted:
    """Both sides have proven who they are; frames may be sent from now on."""

    remote: PeerID


Event = HandshakeCompleted | FrameReceived | PayloadReceived | PieceReceived

__all__ = [
    "Event",
    "FrameKind",
    "FrameReceived",
    "HandshakeCompleted",
    "Limits",
    "PayloadReceived",
    "PieceReceived",
    "Role",
    "Session",
]


class Session:
    """One side of a connection.

    ``secret``: 32 random bytes that decide this session's X25519 keys, never the same for two sessions.
    ``expected_peer``: the one that must be at the other side, else
    :class:`~shoal.p2p.protocol.violations.OtherIdentity`. ``rekey_bytes`` and ``versions`` are part of the protocol
    and differ in tests alone.
    """

    def __init__(
        self,
        role: Role,
        identity: Identity,
        secret: bytes,
        *,
        expected_peer: PeerID | None = None,
        limits: Limits = DEFAULT_LIMITS,
        versions: Versions = SUPPORTED_VERSIONS,
        rekey_bytes: int = REKEY_BYTES,
    ) -> None:
        self.role = role
        self.limits = limits
        self._rekey_bytes = rekey_bytes
        self._handshake: Handshake | None = Handshake(
            role, identity, secret, expected_peer=expected_peer, versions=versions
        )
        self._remote: PeerID | None = None
        self._channel_id = 0
        self._version: tuple[int, int] | None = None
        self._sender: CipherState | None = None
        self._receiver: CipherState | None = None
        self._decoder = FrameDecoder(
            limits, allocate_payload, remote_is_initiator=role.other is Role.INITIATOR
        )
        self._buffer = ReceiveBuffer(limits.max_receive_buffer)
        self._payload_bytes = 0
        self._to_send: list[bytes | bytearray | memoryview] = []
        self._frame_unfinished = False
        self._failure: BaseException | None = None

    @property
    def remote(self) -> PeerID | None:
        """Who is at the other side; None until it is proven."""
        return self._remote

    @property
    def channel_id(self) -> int:
        """What both sides call this connection, 64 bits of the handshake's hash; 0 until the handshake is completed."""
        return self._channel_id

    @property
    def version(self) -> tuple[int, int] | None:
        """Major and minor version of the protocol that both sides agreed on; None until they did."""
        return self._version

    @property
    def bytes_held(self) -> int:
        """Memory taken for what the other side sends: never more than ``limits.max_bytes_held``."""
        return self._buffer.capacity + self._decoder.bytes_held

    @property
    def payload_bytes(self) -> int:
        """How many of the bytes received so far were those of payloads. They are known to be, at the latest, when their
        message is complete.
        """
        return self._payload_bytes + (self._buffer.size if self._decoder.awaits_data else 0)

    @property
    def payload_sink(self) -> PayloadSink:
        """Asked for memory with (stream id, tag, length) when the header of a payload was verified.

        It must return writable, contiguous memory of exactly ``length`` bytes, whose content is undefined
        until :class:`PayloadReceived`. It may raise, usually :class:`~shoal.errors.ProtocolViolation`: that
        ends the session. Until one is set, new memory is allocated.
        """
        return self._decoder.payload_sink

    @payload_sink.setter
    def payload_sink(self, sink: PayloadSink) -> None:
        self._decoder.payload_sink = sink

    @property
    def piece_sink(self) -> PieceSink:
        """Asked for memory with each :class:`~.frames.Piece` that has arrived, before its bytes are verified. They
        are written there at once, and :class:`PieceReceived` follows if they are authentic; else the session ends.
        """
        return self._decoder.piece_sink

    @piece_sink.setter
    def piece_sink(self, sink: PieceSink) -> None:
        self._decoder.piece_sink = sink

    def start(self) -> None:
        """Queue the first bytes to send. Call it once, when the connection is made."""
        self._check_alive()
        assert self._handshake is not None
        self._to_send.append(self._handshake.start())

    # ---- receiving ----

    def get_buffer(self, hint: int = -1) -> memoryview:
        """Where the next received bytes belong, for :meth:`buffer_updated`. ``hint`` is not needed.

        Goes on after an error, for a transport that still receives.
        """
        if self._failure is not None:
            self._buffer.clear()
        return self._buffer.free_space()

    def buffer_updated(self, count: int) -> Iterator[Event]:
        """Take ``count`` bytes that were put into the last :meth:`get_buffer`; yield what they complete.

        The bytes are taken as the events are asked for, so that one event is dealt with before the next
        message is read (``payload_sink`` may depend on it): iterate to the end before the next
        :meth:`get_buffer`. :class:`~shoal.errors.ProtocolViolation`, or whatever ``payload_sink`` raised,
        ends the session.
        """
        self._check_alive()
        self._buffer.filled(count)
        return self._events()

    def _events(self) -> Iterator[Event]:
        while True:
            self._check_alive()
            try:
                event = self._next_event()
            except BaseException as error:
                # Also what payload_sink raises: the cipher's counter has moved on, there is no way back.
                self._failure = error
                raise
            if event is None:
                return
            yield event

    def discard_payload(self) -> None:
        """Take the rest of the payload under way elsewhere: its memory is not touched after this."""
        if self._decoder.payload is not None:
            self._decoder.payload = memoryview(bytearray(self._decoder.payload.nbytes))

    def receive_eof(self) -> None:
        """The other side sends no more: :class:`~shoal.p2p.protocol.violations.TruncatedStream` unless it was done.

        An attacker can still cut a connection between two frames: that the other side was done is said by
        GOODBYE.
        """
        self._check_alive()
        if self._handshake is not None:
            self._failure = TruncatedStream("the other side closed the connection during the handshake")
        elif self._buffer.size or self._decoder.in_frame:
            self._failure = TruncatedStream("the other side closed the connection in the middle of a frame")
        self._check_alive()

    def release(self) -> None:
        """The connection is gone: let go of all memory that bytes were received into."""
        self._buffer.release()
        self._decoder.release()

    def _next_event(self) -> Event | None:
        """Take bytes from the buffer up to the next event; None when they do not complete one."""
        if self._handshake is not None:
            return self._continue_handshake(self._handshake)
        assert self._receiver is not None
        return self._receive_messages(self._receiver)

    def _continue_handshake(self, handshake: Handshake) -> HandshakeCompleted | None:
        while not handshake.finished:
            consumed, answer = handshake.receive(self._buffer.content())
            if not consumed:
                return None
            self._buffer.consume(consumed)
            self._version = handshake.version
            if answer:
                self._to_send.append(answer)
        assert handshake.remote is not None
        self._sender, self._receiver = handshake.split(self._rekey_bytes)
        self._remote = handshake.remote
        self._channel_id = handshake.channel_id
        self._handshake = None
        return HandshakeCompleted(handshake.remote)

    def _receive_messages(
        self, receiver: CipherState
    ) -> FrameReceived | PayloadReceived | PieceReceived | None:
        buffer, decoder = self._buffer, self._decoder
        while buffer.size >= PREFIX_BYTES:
            content = buffer.content()
            size = content[0] << 8 | content[1]
            if size < TAG_BYTES:
                raise ProtocolViolation(f"a message of {size} bytes is shorter than its tag")
            end = PREFIX_BYTES + size
            if end > len(content):
                buffer.reserve(end)
                return None
            message = content[PREFIX_BYTES:end]
            event: FrameReceived | PayloadReceived | PieceReceived | None
            if decoder.awaits_data:
                receiver.decrypt_into(message, decoder.next_chunk(size - TAG_BYTES))
                event = decoder.chunk_received(size - TAG_BYTES)
                self._payload_bytes += end
            else:
                event = decoder.receive_message(receiver.decrypt(message))
                if isinstance(event, PayloadReceived):
                    self._payload_bytes += end
            buffer.consume(end)
            if event is not None:
                return event
        return None

    # ---- sending ----

    def send_frame(self, kind: FrameKind, stream_id: int, body: Buffer = b"") -> None:
        """Queue a frame of any kind but PAYLOAD. :class:`InvalidValueError` for one that no peer would take.

        GOODBYE can be sent even after the other side has broken the protocol, to tell it how.
        """
        sender = self._check_open(even_failed=kind is FrameKind.GOODBYE)
        if kind in (FrameKind.PAYLOAD, FrameKind.PIECE):
            raise InvalidValueError("kind: payloads are sent with send_payload, pieces with send_piece")
        data = _as_bytes("body", body)
        header = self._header(kind, stream_id, data.nbytes)
        if fits_beside(header, data.nbytes):
            self._to_send.append(seal_message(sender, b"".join((header, data))))
            return
        for _ in self._seal(header, data, _BATCH_BYTES):
            pass

    def send_payload(self, stream_id: int, tag: int, data: Buffer) -> None:
        """Queue a payload; ``data`` is encrypted before this returns, so the caller may reuse it."""
        for _ in self.send_payload_pieces(stream_id, tag, data, _BATCH_BYTES):
            pass

    def send_payload_pieces(self, stream_id: int, tag: int, data: Buffer, piece_bytes: int) -> Iterator[None]:
        """As :meth:`send_payload`, but about ``piece_bytes`` of it are encrypted and queued at each step.

        The caller sends what is queued between the steps, which bounds the memory for ciphertext. Until the
        last step nothing else can be sent (:class:`InvalidStateError`), and ``data`` must stay as it is.
        """
        self._check_open()
        body = _as_bytes("data", data)
        header = self._header(FrameKind.PAYLOAD, stream_id, body.nbytes, tag)
        return self._seal(header, body, piece_bytes)

    def send_piece(self, piece: Piece, data: memoryview) -> None:
        """Queue a piece of a striped payload; ``data`` are its bytes, encrypted before this returns."""
        sender = self._check_open()
        header = encode_piece_header(piece, self.limits, by_initiator=self.role is Role.INITIATOR)
        self._to_send.append(seal_message(sender, header))
        self._to_send.append(seal_chunks(sender, data))

    def data_to_send(self) -> list[bytes | bytearray | memoryview]:
        """All that was queued since the last call, for ``transport.writelines``; the session keeps no hold on
        it.

        The one call that goes on after an error, so that the other side learns what was said before it.
        """
        queued, self._to_send = self._to_send, []
        return queued

    def _header(self, kind: FrameKind, stream_id: int, length: int, tag: int = 0) -> bytes:
        by_initiator = self.role is Role.INITIATOR
        return encode_header(kind, stream_id, length, self.limits, tag, by_initiator=by_initiator)

    def _seal(self, header: bytes, body: memoryview, piece_bytes: int) -> Iterator[None]:
        """Encrypt a frame and queue it, a piece at each step."""
        sender = self._check_open()
        if fits_beside(header, body.nbytes):
            self._to_send.append(seal_message(sender, b"".join((header, body))))
            yield
            return
        self._frame_unfinished = True
        self._to_send.append(seal_message(sender, header))
        step = max(1, piece_bytes // CHUNK_BYTES) * CHUNK_BYTES
        for begin in range(0, body.nbytes, step):
            self._check_alive()
            self._to_send.append(seal_chunks(sender, body[begin : begin + step]))
            self._frame_unfinished = begin + step < body.nbytes
            yield

    # ---- state ----

    def _check_alive(self) -> None:
        if self._failure is not None:
            raise self._failure.with_traceback(None)

    def _check_open(self, *, even_failed: bool = False) -> CipherState:
        if not even_failed:
            self._check_alive()
        if self._sender is None:
            raise InvalidStateError("nothing can be sent before the handshake is completed")
        if self._frame_unfinished:
            raise InvalidStateError(
                "nothing else can be sent before the payload under way is queued to its end"
            )
        return self._sender


def _as_bytes(name: str, data: Buffer) -> memoryview:
    """The bytes of ``data``, uncopied."""
    try:
        view = memoryview(data)
        return view if view.format == "B" and view.ndim == 1 and view.c_contiguous else view.cast("B")
    except TypeError as error:
        raise InvalidTypeError(f"{name}: needs contiguous memory of plain numbers: {error}") from None
