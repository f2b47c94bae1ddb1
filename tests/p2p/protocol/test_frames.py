"""Frames: headers, limits, and long frames that come in chunks."""

from __future__ import annotations

import re
import struct

import pytest

from shoal.errors import InvalidTypeError, InvalidValueError, ProtocolViolation
from shoal.p2p.protocol.frames import (
    CHUNK_BYTES,
    DEFAULT_LIMITS,
    MAX_PLAINTEXT_BYTES,
    MAX_STREAM_ID,
    FrameDecoder,
    FrameKind,
    FrameReceived,
    Limits,
    PayloadReceived,
    PayloadSink,
    Piece,
    PieceReceived,
    allocate_payload,
    encode_header,
    encode_piece_header,
    fits_beside,
)

CONNECTION_KINDS = (FrameKind.PING, FrameKind.PONG, FrameKind.HELLO, FrameKind.GOODBYE)


def decoder(sink: PayloadSink = allocate_payload, limits: Limits = DEFAULT_LIMITS) -> FrameDecoder:
    return FrameDecoder(limits, sink, remote_is_initiator=True)


def header(kind: int, stream_id: int, length: int, *, flags: int = 0, tag: int | None = None) -> bytes:
    packed = struct.pack(">BBII", kind, flags, stream_id, length)
    return packed if tag is None else packed + struct.pack(">Q", tag)


def valid_stream(kind: FrameKind) -> int:
    return 0 if kind in CONNECTION_KINDS else 7


@pytest.mark.parametrize(
    "kind", [kind for kind in FrameKind if kind not in (FrameKind.PAYLOAD, FrameKind.PIECE)]
)
@pytest.mark.parametrize("body", [b"", b"body"])
def test_short_frames(kind: FrameKind, body: bytes) -> None:
    encoded = encode_header(kind, valid_stream(kind), len(body), DEFAULT_LIMITS, by_initiator=True)
    assert encoded == header(kind, valid_stream(kind), len(body))
    frames = decoder()
    assert frames.receive_message(encoded + body) == FrameReceived(kind, valid_stream(kind), body)
    assert not frames.in_frame
    assert frames.bytes_held == 0


@pytest.mark.parametrize("data", [b"", b"tensor"])
def test_a_short_payload_is_put_where_the_sink_says(data: bytes) -> None:
    asked = []
    memory = bytearray(len(data))

    def sink(*what: int) -> memoryview:
        asked.append(what)
        return memoryview(memory)

    frames = decoder(sink)
    encoded = encode_header(FrameKind.PAYLOAD, 9, len(data), DEFAULT_LIMITS, 2**64 - 1, by_initiator=True)
    assert encoded == header(FrameKind.PAYLOAD, 9, len(data), tag=2**64 - 1)
    event = frames.receive_message(encoded + data)
    assert isinstance(event, PayloadReceived)
    assert (event.stream_id, event.tag, bytes(event.data)) == (9, 2**64 - 1, data)
    assert event.data.obj is memory
    assert memory == data
    assert asked == [(9, 2**64 - 1, len(data))]


def test_the_longest_frame_that_fits_into_one_message() -> None:
    short = encode_header(FrameKind.MESSAGE, 1, MAX_PLAINTEXT_BYTES - 10, DEFAULT_LIMITS, by_initiator=True)
    assert fits_beside(short, MAX_PLAINTEXT_BYTES - 10)
    assert not fits_beside(short, MAX_PLAINTEXT_BYTES - 9)
    body = bytes(MAX_PLAINTEXT_BYTES - 10)
    assert decoder().receive_message(short + body) == FrameReceived(FrameKind.MESSAGE, 1, body)


def test_a_long_message_comes_in_chunks() -> None:
    body = bytes(range(256)) * 1024
    frames = decoder()
    assert frames.receive_message(header(FrameKind.MESSAGE, 3, len(body))) is None
    chunks = [body[begin : begin + CHUNK_BYTES] for begin in range(0, len(body), CHUNK_BYTES)]
    assert len(chunks) == 5
    for number, chunk in enumerate(chunks[:-1], start=1):
        assert frames.receive_message(chunk) is None
        assert frames.in_frame
        assert frames.bytes_held == number * CHUNK_BYTES
    assert frames.receive_message(chunks[-1]) == FrameReceived(FrameKind.MESSAGE, 3, body)
    assert not frames.in_frame
    assert frames.bytes_held == 0
    # and the next frame begins
    assert frames.receive_message(header(FrameKind.PING, 0, 0)) == FrameReceived(FrameKind.PING, 0, b"")


def test_a_long_payload_is_asked_for_chunk_by_chunk() -> None:
    memory = memoryview(bytearray(CHUNK_BYTES + 100))
    frames = decoder(lambda *_: memory)
    assert frames.payload is None
    assert frames.receive_message(header(FrameKind.PAYLOAD, 3, len(memory), tag=5)) is None
    assert frames.payload is not None
    assert frames.in_frame
    assert frames.bytes_held == len(memory)
    first = frames.next_chunk(CHUNK_BYTES)
    first[:] = b"a" * CHUNK_BYTES
    assert frames.chunk_received(CHUNK_BYTES) is None
    with pytest.raises(ProtocolViolation, match="of 101 bytes, not 100, continues a PAYLOAD"):
        frames.next_chunk(101)
    frames.next_chunk(100)[:] = b"b" * 100
    event = frames.chunk_received(100)
    assert event == PayloadReceived(3, 5, memory)
    assert bytes(memory) == b"a" * CHUNK_BYTES + b"b" * 100
    assert not frames.in_frame


@pytest.mark.parametrize(
    ("message", "reason"),
    [
        (b"", "0 bytes is too short"),
        (header(FrameKind.PING, 0, 0)[:-1], "9 bytes is too short"),
        (header(FrameKind.PAYLOAD, 1, 0), "too short for a PAYLOAD"),
        (header(FrameKind.PAYLOAD, 1, 0, tag=1)[:-1], "too short for a PAYLOAD"),
        (header(0, 1, 0), "0 is not a kind"),
        (header(14, 1, 0), "14 is not a kind"),
        (header(255, 1, 0), "255 is not a kind"),
        (header(FrameKind.MESSAGE, 1, 0, flags=1), "flags 0x01"),
        (header(FrameKind.MESSAGE, 1, 0, flags=0x80), "flags 0x80"),
        (header(FrameKind.MESSAGE, 0, 0), "cannot belong to stream 0"),
        (header(FrameKind.MESSAGE, MAX_STREAM_ID + 1, 0), "cannot belong to stream 2147483648"),
        (header(FrameKind.CREDIT, 0, 0), "cannot belong"),
        (header(FrameKind.PING, 1, 0), "belongs to the connection"),
        (header(FrameKind.GOODBYE, 1, 0), "belongs to the connection"),
        (header(FrameKind.OPEN, 2, 0), "not the initiator's to open"),
        (header(FrameKind.MESSAGE, 1, 2**20 + 1), "longer than the limit of 1048576"),
        (header(FrameKind.PAYLOAD, 1, 2**26 + 1, tag=1), "longer than the limit of 67108864"),
        (header(FrameKind.HELLO, 0, 2**14 + 1), "longer than the limit of 16384"),
        (header(FrameKind.MESSAGE, 1, 2**32 - 1), "longer than the limit"),
        (header(FrameKind.MESSAGE, 1, 5) + b"four", "comes with 4"),
        (header(FrameKind.MESSAGE, 1, 5) + b"sixsix", "comes with 6"),
        (header(FrameKind.MESSAGE, 1, 5), "comes with 0"),
        (header(FrameKind.MESSAGE, 1, 0) + b"x", "comes with 1"),
        (header(FrameKind.PAYLOAD, 1, 5, tag=1), "comes with 0"),
        (header(FrameKind.MESSAGE, 1, 2**20) + b"x", "comes with 1"),
    ],
)
def test_bad_frames(message: bytes, reason: str) -> None:
    def sink(*_: int) -> memoryview:
        raise AssertionError("memory was asked for")

    with pytest.raises(ProtocolViolation, match=re.escape(reason)):
        decoder(sink).receive_message(message)


@pytest.mark.parametrize("size", [0, 1, CHUNK_BYTES - 1, CHUNK_BYTES + 1, MAX_PLAINTEXT_BYTES])
def test_chunks_have_their_size(size: int) -> None:
    frames = decoder()
    frames.receive_message(header(FrameKind.MESSAGE, 1, 2**20))
    with pytest.raises(ProtocolViolation, match="continues a MESSAGE"):
        frames.receive_message(bytes(size))


def test_streams_are_opened_by_their_own_side() -> None:
    from_initiator = FrameDecoder(DEFAULT_LIMITS, allocate_payload, remote_is_initiator=True)
    from_responder = FrameDecoder(DEFAULT_LIMITS, allocate_payload, remote_is_initiator=False)
    assert from_initiator.receive_message(header(FrameKind.OPEN, 1, 0)) is not None
    assert from_responder.receive_message(header(FrameKind.OPEN, 2, 0)) is not None
    with pytest.raises(ProtocolViolation, match="'s to open"):
        from_responder.receive_message(header(FrameKind.OPEN, 1, 0))
    # The other kinds answer on the stream that either side opened.
    assert from_initiator.receive_message(header(FrameKind.END, 2, 0)) is not None


def test_a_long_open_is_opened_by_its_own_side_too() -> None:
    with pytest.raises(ProtocolViolation, match="'s to open"):
        decoder().receive_message(header(FrameKind.OPEN, 2, 2**20))


@pytest.mark.parametrize("length", [10, 100_000])
@pytest.mark.parametrize(
    "memory",
    [
        lambda length: memoryview(bytearray(length + 1)),
        lambda length: memoryview(bytearray(length - 1)),
        lambda length: memoryview(bytes(length)),
        lambda length: memoryview(bytearray(2 * length))[::2],
    ],
    ids=["too long", "too short", "read-only", "scattered"],
)
def test_a_sink_must_give_what_was_asked_for(memory: object, length: int) -> None:
    frames = decoder(lambda _stream, _tag, length: memory(length))  # type: ignore[operator]
    body = b"" if length > MAX_PLAINTEXT_BYTES else bytes(length)
    with pytest.raises(InvalidValueError, match="the payload sink must give"):
        frames.receive_message(header(FrameKind.PAYLOAD, 1, length, tag=0) + body)


def test_a_sink_may_give_memory_of_any_shape() -> None:
    memory = memoryview(bytearray(24)).cast("d")
    event = decoder(lambda *_: memory).receive_message(header(FrameKind.PAYLOAD, 1, 24, tag=0) + b"x" * 24)
    assert isinstance(event, PayloadReceived)
    assert bytes(memory) == b"x" * 24


@pytest.mark.parametrize(
    ("kind", "stream_id", "length", "tag"),
    [
        (FrameKind.MESSAGE, 0, 0, 0),
        (FrameKind.MESSAGE, -1, 0, 0),
        (FrameKind.MESSAGE, 2**31, 0, 0),
        (FrameKind.PING, 1, 0, 0),
        (FrameKind.MESSAGE, 1, 2**20 + 1, 0),
        (FrameKind.CREDIT, 1, 2**14 + 1, 0),
        (FrameKind.PAYLOAD, 1, 2**26 + 1, 0),
        (FrameKind.PAYLOAD, 1, 0, -1),
        (FrameKind.PAYLOAD, 1, 0, 2**64),
    ],
)
def test_frames_that_no_peer_would_take_are_not_sent(
    kind: FrameKind, stream_id: int, length: int, tag: int
) -> None:
    with pytest.raises(InvalidValueError):
        encode_header(kind, stream_id, length, DEFAULT_LIMITS, tag, by_initiator=True)


def test_limits_are_checked_where_they_are_made() -> None:
    with pytest.raises(InvalidValueError, match="max_payload must be 0 to 4294967295 bytes, got -1"):
        Limits(max_payload=-1)
    with pytest.raises(InvalidValueError, match="max_message_body"):
        Limits(max_message_body=2**32)
    with pytest.raises(InvalidValueError, match=r"max_receive_buffer must be 65537 to .*, got 65536"):
        Limits(max_receive_buffer=65_536)
    with pytest.raises(InvalidTypeError, match="max_control_body"):
        Limits(max_control_body=1.5)  # type: ignore[arg-type]
    assert Limits(max_payload=2**30).max_bytes_held == 2**30 + 2**19


def test_limits_are_those_of_the_kind() -> None:
    limits = Limits(max_message_body=10, max_control_body=20, max_payload=30)
    for kind in FrameKind:
        carries_message = kind in (FrameKind.OPEN, FrameKind.MESSAGE, FrameKind.END)
        longest = 10 if carries_message else 20
        longest = {FrameKind.PAYLOAD: 30, FrameKind.PIECE: CHUNK_BYTES}.get(kind, longest)
        encode_header(kind, valid_stream(kind), longest, limits, by_initiator=True)
        with pytest.raises(InvalidValueError, match=f"limit of {longest} bytes"):
            encode_header(kind, valid_stream(kind), longest + 1, limits, by_initiator=True)


def piece_header(piece: Piece, size: int | None = None) -> bytes:
    return struct.pack(
        ">BBIIQIQII",
        FrameKind.PIECE,
        0,
        piece.stream_id,
        piece.size if size is None else size,
        piece.home,
        piece.number,
        piece.tag,
        piece.total,
        piece.offset,
    )


@pytest.mark.parametrize("offset", [0, CHUNK_BYTES, 2 * CHUNK_BYTES])
def test_a_piece_is_put_where_the_sink_says_once_it_is_there(offset: int) -> None:
    piece = Piece(2**64 - 1, 3, 7, 2**63, 2 * CHUNK_BYTES + 5, offset)
    asked = []
    memory = bytearray(piece.size)

    def sink(what: Piece) -> memoryview:
        asked.append(what)
        return memoryview(memory)

    frames = decoder()
    frames.piece_sink = sink
    encoded = encode_piece_header(piece, DEFAULT_LIMITS, by_initiator=True)
    assert encoded == piece_header(piece)
    assert frames.receive_message(encoded) is None
    assert frames.in_frame
    assert not asked  # its bytes may take long, and the memory may serve something else by then
    frames.next_chunk(piece.size)[:] = bytes([1]) * piece.size
    assert asked == [piece]
    assert frames.chunk_received(piece.size) == PieceReceived(piece)
    assert memory == bytes([1]) * piece.size
    assert not frames.in_frame
    assert frames.bytes_held == 0


@pytest.mark.parametrize(
    ("message", "reason"),
    [
        (piece_header(Piece(1, 1, 0, 0, 10, 0)) + b"x", "begins a PIECE"),
        (piece_header(Piece(1, 1, 0, 0, 10, 0))[:-1], "begins a PIECE"),
        (piece_header(Piece(1, 1, 0, 0, 10, 0), 9), "of 9 bytes instead of 10"),
        (piece_header(Piece(1, 1, 0, 0, 2**17, 1), 10), "at byte 1 of a payload"),
        (piece_header(Piece(1, 1, 0, 0, CHUNK_BYTES, CHUNK_BYTES), 0), f"at byte {CHUNK_BYTES} of a payload"),
        (piece_header(Piece(1, 1, 0, 0, 2**26 + 1, 0)), "the limit is 67108864"),
        (piece_header(Piece(1, 0, 0, 0, 10, 0)), "cannot belong to stream 0"),
    ],
)
def test_bad_pieces(message: bytes, reason: str) -> None:
    with pytest.raises(ProtocolViolation, match=reason):
        decoder().receive_message(message)


def test_a_piece_of_another_size_than_announced_is_a_violation() -> None:
    frames = decoder()
    frames.receive_message(piece_header(Piece(1, 1, 0, 0, 10, 0)))
    with pytest.raises(ProtocolViolation, match="not 10, continues a PIECE"):
        frames.next_chunk(9)


def test_pieces_that_no_receiver_would_take_are_not_sent() -> None:
    with pytest.raises(InvalidValueError, match="the limit is 67108864"):
        encode_piece_header(Piece(1, 1, 0, 0, 2**26 + 1, 0), DEFAULT_LIMITS, by_initiator=True)
