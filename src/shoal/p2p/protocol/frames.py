"""Frames: what a connection carries once it is encrypted. Messages of plaintext in, frames out.

A frame is a header and a body. It begins at the start of a Noise message. If it fits, it is that message,
alone; else its header is, and its body fills the following messages, each but the last with ``CHUNK_BYTES``.
So every message but the first of a frame holds nothing but body, and a payload is decrypted straight into the
memory that its receiver gave for it.

Header, big-endian: kind (1 byte), flags (1 byte, zero), stream (4 bytes), length of the body (4 bytes);
PAYLOAD frames have a tag (8 bytes) besides. Every length is checked against :class:`Limits` before memory is
taken.

A PIECE is a part of a payload that travels over several connections (:mod:`.pieces`). Its header names the payload
and the place in it; its body, of ``CHUNK_BYTES`` or up to the payload's end, is one message of its own. Where those
bytes go is asked when all of them are there, and they are put there at once: nothing is written later, when the memory
may serve something else.

Pure.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from dataclasses import dataclass
from enum import IntEnum
from functools import cached_property
from typing import Annotated, Final, NamedTuple

from shoal.errors import InvalidValueError, ProtocolViolation
from shoal.p2p.config import MAX_MESSAGE
from shoal.p2p.protocol.noise import MAX_MESSAGE_BYTES, TAG_BYTES
from shoal.utils.checks import Count
from shoal.utils.options import check_options

MAX_PLAINTEXT_BYTES: Final = MAX_MESSAGE_BYTES - TAG_BYTES
# The most that is a multiple of a cache line, so that an aligned payload is decrypted in aligned pieces.
CHUNK_BYTES: Final = MAX_PLAINTEXT_BYTES // 64 * 64
MAX_STREAM_ID: Final = 2**31 - 1
MAX_TAG: Final = 2**64 - 1

Buffer = bytes | bytearray | memoryview

_HEADER = struct.Struct(">BBII")
_PAYLOAD_HEADER = struct.Struct(">BBIIQ")
_PIECE_HEADER = struct.Struct(">BBIIQIQII")


class FrameKind(IntEnum):
    """Every kind of frame. Those without a stream concern the connection: their stream id is 0."""

    OPEN = 1
    MESSAGE = 2
    PAYLOAD = 3
    END = 4
    RESET = 5
    CREDIT = 6
    PING = 7
    PONG = 8
    HELLO = 9
    GOODBYE = 10
    STRIPED = 11
    """The next item of the stream is a payload whose bytes come as PIECE frames."""
    PIECE = 12
    """Bytes of a striped payload, of a stream of any connection between the same two processes."""
    RECEIVED = 13
    """All pieces of a striped payload have arrived."""


_OF_CONNECTION = frozenset({FrameKind.PING, FrameKind.PONG, FrameKind.HELLO, FrameKind.GOODBYE})
_WITH_MESSAGE = frozenset({FrameKind.OPEN, FrameKind.MESSAGE, FrameKind.END})


class FrameRule(NamedTuple):
    """What is allowed for frames of one kind."""

    kind: FrameKind
    of_connection: bool
    longest_body: int


_MAX_LENGTH = 2**32 - 1
"""A header has four bytes for a length."""

Size = Annotated[int, Count(0, _MAX_LENGTH, "bytes")]


@dataclass(frozen=True)
class Limits:
    """What one session takes, all in bytes. Both sides must allow what either sends.

    ``max_message_body``: OPEN, MESSAGE and END frames, which carry messages. ``max_payload``: PAYLOAD frames.
    ``max_control_body``: all others.
    ``max_receive_buffer``: ciphertext that waits to be decrypted; it begins small and grows with the traffic.
    """

    max_message_body: Size = MAX_MESSAGE
    max_payload: Size = 64 * 2**20
    max_control_body: Size = 16 * 2**10
    max_receive_buffer: Annotated[int, Count(MAX_MESSAGE_BYTES + 2, _MAX_LENGTH, "bytes")] = 512 * 2**10

    def __post_init__(self) -> None:
        check_options(self)

    @property
    def max_bytes_held(self) -> int:
        """The most that a session holds for its peer: full buffer, and the largest frame under way."""
        return self.max_receive_buffer + max(self.max_message_body, self.max_payload, self.max_control_body)

    @cached_property
    def rules(self) -> tuple[FrameRule | None, ...]:
        """What is allowed for each kind of frame, by its number; None where a number is no kind."""
        rules: list[FrameRule | None] = [None] * (max(FrameKind) + 1)
        for kind in FrameKind:
            limit = self.max_message_body if kind in _WITH_MESSAGE else self.max_control_body
            if kind is FrameKind.PAYLOAD:
                limit = self.max_payload
            elif kind is FrameKind.PIECE:
                limit = CHUNK_BYTES
            rules[kind] = FrameRule(kind, kind in _OF_CONNECTION, limit)
        return tuple(rules)


DEFAULT_LIMITS: Final = Limits()


@dataclass(frozen=True, slots=True)
class FrameReceived:
    """A whole frame of any kind but PAYLOAD."""

    kind: FrameKind
    stream_id: int
    body: bytes


@dataclass(frozen=True, slots=True)
class PayloadReceived:
    """A whole payload, every byte of it verified, in the memory that the sink gave."""

    stream_id: int
    tag: int
    data: memoryview


class Piece(NamedTuple):
    """Which bytes of which striped payload."""

    home: int
    """The connection that carries the stream, see :attr:`.session.Session.channel_id`."""
    stream_id: int
    number: int
    """Of the payload among the striped ones of its sender in that stream, from 0."""
    tag: int
    total: int
    """Bytes of the whole payload."""
    offset: int
    """A multiple of ``CHUNK_BYTES``."""

    @property
    def size(self) -> int:
        """Bytes of this piece."""
        return min(CHUNK_BYTES, self.total - self.offset)


@dataclass(frozen=True, slots=True)
class PieceReceived:
    """A piece, verified, in the memory that the sink gave."""

    piece: Piece


# Given (stream id, tag, length) of a payload that begins, returns writable memory of exactly that many bytes.
PayloadSink = Callable[[int, int, int], memoryview]
# Given a piece that has arrived whole, returns writable memory of exactly its size.
PieceSink = Callable[[Piece], memoryview]


class _Header(NamedTuple):
    kind: FrameKind
    stream_id: int
    length: int
    tag: int
    begin: int  # of the body, in the header's message


def encode_header(
    kind: FrameKind, stream_id: int, length: int, limits: Limits, tag: int = 0, *, by_initiator: bool
) -> bytes:
    """The header of a frame to send; :class:`InvalidValueError` for one that no receiver would take."""
    rule = limits.rules[kind]
    assert rule is not None
    problem = _find_problem(rule, stream_id, length, by_initiator)
    if problem is not None:
        raise InvalidValueError(problem)
    if kind is not FrameKind.PAYLOAD:
        return _HEADER.pack(kind, 0, stream_id, length)
    if not 0 <= tag <= MAX_TAG:
        raise InvalidValueError(f"tag must be 0 to {MAX_TAG}, got {tag}")
    return _PAYLOAD_HEADER.pack(kind, 0, stream_id, length, tag)


def encode_piece_header(piece: Piece, limits: Limits, *, by_initiator: bool) -> bytes:
    """The header of a PIECE to send; :class:`InvalidValueError` for one that no receiver would take."""
    rule = limits.rules[FrameKind.PIECE]
    assert rule is not None
    problem = _find_problem(rule, piece.stream_id, piece.size, by_initiator) or _find_piece_problem(
        piece, limits
    )
    if problem is not None:
        raise InvalidValueError(problem)
    return _PIECE_HEADER.pack(
        FrameKind.PIECE,
        0,
        piece.stream_id,
        piece.size,
        piece.home,
        piece.number,
        piece.tag,
        piece.total,
        piece.offset,
    )


def fits_beside(header: bytes, length: int) -> bool:
    """Whether a body of ``length`` bytes goes into the same message as its header."""
    return len(header) + length <= MAX_PLAINTEXT_BYTES


def is_opened_by(initiator: bool, stream_id: int) -> bool:
    """Whether a stream is one that the initiator opens, or the responder: it has the parity of its opener."""
    return stream_id % 2 == int(initiator)


def _find_problem(rule: FrameRule, stream_id: int, length: int, by_initiator: bool) -> str | None:
    """What is wrong with a header from this side, if anything: the one home of what a header may say."""
    kind, of_connection, longest_body = rule
    if of_connection:
        if stream_id != 0:
            return f"a {kind.name} frame belongs to the connection, not to stream {stream_id}"
    elif not 1 <= stream_id <= MAX_STREAM_ID:
        return f"a {kind.name} frame cannot belong to stream {stream_id}"
    elif kind is FrameKind.OPEN and not is_opened_by(by_initiator, stream_id):
        return f"stream {stream_id} is not the {'initiator' if by_initiator else 'responder'}'s to open"
    if length > longest_body:
        return f"a {kind.name} frame of {length} bytes is longer than the limit of {longest_body} bytes"
    return None


def _find_piece_problem(piece: Piece, limits: Limits) -> str | None:
    if piece.total > limits.max_payload:
        return f"a PIECE of a payload of {piece.total} bytes: the limit is {limits.max_payload} bytes"
    if piece.offset % CHUNK_BYTES or piece.offset >= piece.total:
        return f"a PIECE at byte {piece.offset} of a payload of {piece.total} bytes"
    return None


def _decode_piece(message: bytes, header: _Header, limits: Limits) -> Piece:
    """The piece that a header announces, checked."""
    if len(message) != _PIECE_HEADER.size:
        raise ProtocolViolation(f"a message of {len(message)} bytes begins a PIECE frame")
    home, number, tag, total, offset = _PIECE_HEADER.unpack(message)[4:]
    piece = Piece(home, header.stream_id, number, tag, total, offset)
    problem = _find_piece_problem(piece, limits)
    if problem is None and header.length != piece.size:
        problem = f"a PIECE of {header.length} bytes instead of {piece.size}"
    if problem is not None:
        raise ProtocolViolation(problem)
    return piece


def _decode_header(message: bytes, rules: tuple[FrameRule | None, ...], by_initiator: bool) -> _Header:
    """The header at the start of ``message``, checked."""
    if len(message) < _HEADER.size:
        raise ProtocolViolation(f"a message of {len(message)} bytes is too short for a frame")
    number, flags, stream_id, length = _HEADER.unpack_from(message)
    rule = rules[number] if number < len(rules) else None
    if rule is None:
        raise ProtocolViolation(f"{number} is not a kind of frame")
    kind = rule.kind
    if flags != 0:
        raise ProtocolViolation(f"a {kind.name} frame has unknown flags {flags:#04x}")
    problem = _find_problem(rule, stream_id, length, by_initiator)
    if problem is not None:
        raise ProtocolViolation(problem)
    if kind is not FrameKind.PAYLOAD:
        return _Header(kind, stream_id, length, 0, _HEADER.size)
    if len(message) < _PAYLOAD_HEADER.size:
        raise ProtocolViolation(f"a message of {len(message)} bytes is too short for a PAYLOAD frame")
    tag = _PAYLOAD_HEADER.unpack_from(message)[4]
    return _Header(kind, stream_id, length, tag, _PAYLOAD_HEADER.size)


class FrameDecoder:
    """Turns the plaintexts of one direction's messages into frames.

    While :attr:`awaits_data` is False, give each plaintext to :meth:`receive_message`. Otherwise a payload or a piece
    of one is under way: ask :meth:`next_chunk` where the next message's plaintext belongs, decrypt it there, and tell
    :meth:`chunk_received`. All raise :class:`ProtocolViolation`; after that the decoder is of no use.
    """

    def __init__(self, limits: Limits, payload_sink: PayloadSink, *, remote_is_initiator: bool) -> None:
        self._limits = limits
        self._rules = limits.rules
        self._remote_is_initiator = remote_is_initiator
        self.payload_sink = payload_sink
        self.piece_sink: PieceSink = discard_piece
        self.payload: memoryview | None = None
        self._piece: Piece | None = None
        self._header = _Header(FrameKind.PING, 0, 0, 0, 0)
        self._received = 0
        self._chunks: list[bytes] = []

    @property
    def awaits_data(self) -> bool:
        """Whether the next message is a part of a payload."""
        return self.payload is not None or self._piece is not None

    @property
    def in_frame(self) -> bool:
        """Whether a frame has begun and not ended."""
        return self.awaits_data or self._received < self._header.length

    @property
    def bytes_held(self) -> int:
        """Memory held for the frame under way."""
        if self.payload is not None:
            return self._header.length
        return self._received if self.in_frame and self._piece is None else 0

    def release(self) -> None:
        """Let go of the frame under way: the rest of it will not come."""
        self.payload = self._piece = None
        self._chunks = []
        self._received = self._header.length

    def receive_message(self, message: bytes) -> FrameReceived | PayloadReceived | None:
        """Take a message that is no part of a payload; return the frame that it completes."""
        if self._received < self._header.length:
            return self._receive_chunk(message)
        header = _decode_header(message, self._rules, self._remote_is_initiator)
        kind, stream_id, length, tag, begin = header
        if kind is FrameKind.PIECE:
            self._piece = _decode_piece(message, header, self._limits)
            return None
        if length == len(message) - begin:
            if kind is not FrameKind.PAYLOAD:
                return FrameReceived(kind, stream_id, message[begin:])
            data = self._take_memory(header)
            data[:] = memoryview(message)[begin:]
            return PayloadReceived(stream_id, tag, data)
        # A frame that would fit into one message must come in one: else a peer could make us hold many.
        if begin != len(message) or begin + length <= MAX_PLAINTEXT_BYTES:
            raise ProtocolViolation(
                f"a {kind.name} frame of {length} bytes comes with {len(message) - begin} of them"
            )
        if kind is FrameKind.PAYLOAD:
            self.payload = self._take_memory(header)
        self._header = header
        self._received = 0
        return None

    def next_chunk(self, size: int) -> memoryview:
        """Where the next ``size`` bytes of the payload belong."""
        if self._piece is not None:
            if size != self._piece.size:
                raise ProtocolViolation(
                    f"a message of {size} bytes, not {self._piece.size}, continues a PIECE frame"
                )
            return payload_memory(self.piece_sink(self._piece), size)
        assert self.payload is not None
        self._check_chunk(size)
        return self.payload[self._received : self._received + size]

    def chunk_received(self, size: int) -> PayloadReceived | PieceReceived | None:
        """The bytes asked for are in place and verified; return the payload or piece if it is complete."""
        if self._piece is not None:
            piece, self._piece = self._piece, None
            return PieceReceived(piece)
        self._received += size
        if self._received < self._header.length:
            return None
        assert self.payload is not None
        data, self.payload = self.payload, None
        return PayloadReceived(self._header.stream_id, self._header.tag, data)

    def _receive_chunk(self, message: bytes) -> FrameReceived | None:
        self._check_chunk(len(message))
        self._chunks.append(message)
        self._received += len(message)
        if self._received < self._header.length:
            return None
        body = b"".join(self._chunks)
        self._chunks = []
        return FrameReceived(self._header.kind, self._header.stream_id, body)

    def _check_chunk(self, size: int) -> None:
        expected = min(CHUNK_BYTES, self._header.length - self._received)
        if size != expected:
            raise ProtocolViolation(
                f"a message of {size} bytes, not {expected}, continues a {self._header.kind.name} frame"
            )

    def _take_memory(self, header: _Header) -> memoryview:
        return payload_memory(self.payload_sink(header.stream_id, header.tag, header.length), header.length)


def payload_memory(given: Buffer, length: int) -> memoryview:
    """The memory that a sink gave for a payload of ``length`` bytes.

    :raises InvalidValueError: it is not writable, contiguous memory of exactly that size
    """
    try:
        memory = memoryview(given)
    except TypeError:
        raise InvalidValueError(f"the payload sink must give memory, got {type(given).__name__}") from None
    if memory.nbytes != length or memory.readonly or not memory.c_contiguous:
        raise InvalidValueError(
            f"the payload sink must give writable, contiguous memory of {length} bytes, the size of the payload, got "
            f"{memory.nbytes} bytes, writable: {not memory.readonly}, contiguous: {memory.c_contiguous}"
        )
    return memory if memory.format == "B" and memory.ndim == 1 else memory.cast("B")


def allocate_payload(stream_id: int, tag: int, length: int) -> memoryview:
    """The sink that is used until another is set: new memory for each payload."""
    return memoryview(bytearray(length))


def discard_piece(piece: Piece) -> memoryview:
    """The sink of pieces that is used until another is set."""
    return memoryview(bytearray(piece.size))
