"""Any bytes, in any split, at any stage of a session: nothing but ProtocolViolation, and memory within its limit."""

from __future__ import annotations

import os
import struct

from hypothesis import given, settings
from hypothesis import strategies as st

from shoal.errors import ProtocolViolation
from shoal.p2p.identity import Identity
from shoal.p2p.protocol.frames import CHUNK_BYTES, FrameKind, Limits, Piece, PieceReceived
from shoal.p2p.protocol.preamble import Versions
from shoal.p2p.protocol.sealing import seal_message
from shoal.p2p.protocol.session import Role, Session
from shoal.testing.sessions import connect, deliver, take

ALICE = Identity.generate(b"a" * 32)
BOB = Identity.generate(b"b" * 32)
PREAMBLE = Versions(1, 0, 0).to_preamble()
LIMITS = Limits(
    max_message_body=100_000, max_payload=200_000, max_control_body=1000, max_receive_buffer=70_000
)

splits = st.lists(st.integers(1, 5000), max_size=20)


def assert_harmless(session: Session, data: bytes, pieces: list[int]) -> None:
    """Deliver ``data``; whatever happens is a violation or nothing, and the memory stays within its limit."""
    rest = memoryview(data)
    for size in [*pieces, len(data)]:
        try:
            deliver(session, rest[:size])
        except ProtocolViolation:
            return
        finally:
            assert session.bytes_held <= LIMITS.max_bytes_held
        rest = rest[size:]


def deterministic(role: Role) -> Session:
    identity = ALICE if role is Role.INITIATOR else BOB
    session = Session(role, identity, limits=LIMITS, secret=role.value.encode().ljust(32))
    session.start()
    return session


def flights() -> list[bytes]:
    """What the two sides of the deterministic sessions say to each other."""
    initiator, responder = deterministic(Role.INITIATOR), deterministic(Role.RESPONDER)
    first = take(initiator)
    deliver(responder, first)
    second = take(responder)
    deliver(initiator, second)
    return [first, second, take(initiator)]


FLIGHTS = flights()

first_bytes = st.one_of(
    st.binary(max_size=300),
    st.binary(max_size=100).map(lambda data: b"shoal/" + data),
    st.from_regex(rb"shoal/[0-9]{1,5} [0-9]{1,5}-[0-9]{1,5}\n", fullmatch=True),
    st.tuples(st.sampled_from([PREAMBLE, *FLIGHTS]), st.binary(max_size=300)).map(b"".join),
)


@given(st.sampled_from(Role), first_bytes, splits)
def test_any_first_bytes(role: Role, data: bytes, pieces: list[int]) -> None:
    assert_harmless(deterministic(role), data, pieces)


@st.composite
def damaged(draw: st.DrawFn, data: bytes) -> bytes:
    """``data`` with some bytes changed, cut out or put in."""
    position = draw(st.integers(0, len(data)))
    removed = draw(st.integers(0, 40))
    return (
        data[:position]
        + draw(st.binary(max_size=40))
        + data[position + removed :]
        + draw(st.binary(max_size=40))
    )


@given(st.sampled_from(Role), st.data(), splits)
def test_any_damage_to_the_handshake(role: Role, data: st.DataObject, pieces: list[int]) -> None:
    session = deterministic(role)
    if role is Role.INITIATOR:
        assert_harmless(session, data.draw(damaged(FLIGHTS[1])), pieces)
    elif data.draw(st.booleans()):
        assert_harmless(session, data.draw(damaged(FLIGHTS[0])), pieces)
    else:
        deliver(session, FLIGHTS[0])
        assert_harmless(session, data.draw(damaged(FLIGHTS[2])), pieces)


def connected(role: Role) -> tuple[Session, Session]:
    """A session to attack, and its peer, whose keys the attacker has."""
    initiator = Session(Role.INITIATOR, ALICE, os.urandom(32), limits=LIMITS)
    responder = Session(Role.RESPONDER, BOB, os.urandom(32), limits=LIMITS)
    connect(initiator, responder)
    return (initiator, responder) if role is Role.INITIATOR else (responder, initiator)


@given(st.sampled_from(Role), st.binary(max_size=300), splits)
@settings(max_examples=50)
def test_any_bytes_after_the_handshake(role: Role, data: bytes, pieces: list[int]) -> None:
    assert_harmless(connected(role)[0], data, pieces)


lengths = st.one_of(
    st.integers(0, 50),
    st.sampled_from(
        [CHUNK_BYTES, 65_501, 65_509, 65_510, 99_999, 100_000, 100_001, 200_000, 200_001, 2**32 - 1]
    ),
)
headers = st.builds(
    lambda kind, flags, stream, length, tag: struct.pack(">BBII", kind, flags, stream, length) + tag,
    st.one_of(st.sampled_from(FrameKind), st.integers(0, 255)),
    st.sampled_from([0, 0, 0, 1, 255]),
    st.one_of(st.integers(0, 3), st.sampled_from([2**31 - 1, 2**31, 2**32 - 1])),
    lengths,
    st.one_of(st.just(b""), st.binary(min_size=8, max_size=8)),
)
bodies = st.one_of(
    st.binary(max_size=60),
    st.sampled_from([CHUNK_BYTES - 1, CHUNK_BYTES, CHUNK_BYTES + 1, 65_519, 100_000 - CHUNK_BYTES]).map(
        bytes
    ),
)
piece_headers = st.builds(
    lambda length, home, number, tag, total, offset: struct.pack(
        ">BBIIQIQII", FrameKind.PIECE, 0, 1, length, home, number, tag, total, offset
    ),
    lengths,
    st.integers(0, 2**64 - 1),
    st.integers(0, 2**32 - 1),
    st.integers(0, 2**64 - 1),
    lengths,
    st.one_of(lengths, st.integers(0, 3).map(lambda index: index * CHUNK_BYTES)),
)
plaintexts = st.one_of(
    st.binary(max_size=60),
    headers,
    st.tuples(headers, bodies).map(b"".join),
    bodies,
    piece_headers,
    st.tuples(piece_headers, bodies).map(b"".join),
)


@given(
    st.sampled_from(Role), st.lists(plaintexts.filter(lambda text: len(text) <= 65_519), max_size=6), splits
)
@settings(max_examples=200)
def test_any_plaintext_that_is_well_encrypted(role: Role, texts: list[bytes], pieces: list[int]) -> None:
    victim, peer = connected(role)
    cipher = peer._sender
    assert cipher is not None
    assert_harmless(victim, b"".join(seal_message(cipher, text) for text in texts), pieces)


@given(
    st.lists(
        st.tuples(
            st.integers(0, 3),
            st.sampled_from([1, CHUNK_BYTES - 1, CHUNK_BYTES, CHUNK_BYTES + 1, 200_000]),
            st.sampled_from(["piece", "message", "payload"]),
        ),
        max_size=6,
    ),
    st.lists(st.integers(1, 70_000), max_size=30),
)
@settings(max_examples=50)
def test_pieces_pass_between_frames_in_any_split(
    frames: list[tuple[int, int, str]], pieces: list[int]
) -> None:
    victim, peer = connected(Role.RESPONDER)
    written: list[tuple[Piece, bytearray]] = []

    def place(piece: Piece) -> memoryview:
        written.append((piece, bytearray(piece.size)))
        return memoryview(written[-1][1])

    victim.piece_sink = place
    sent: list[Piece] = []
    for index, total, kind in frames:
        if kind == "piece" and index * CHUNK_BYTES < total:
            sent.append(Piece(2**64 - 1, 1, 2**32 - 1, 2**64 - 1, total, index * CHUNK_BYTES))
            peer.send_piece(sent[-1], memoryview(bytes([len(sent)]) * sent[-1].size))
        elif kind == "message":
            peer.send_frame(FrameKind.MESSAGE, 1, b"x" * min(total, 100_000))
        else:
            peer.send_payload(1, 0, bytes(total))
    events = deliver(victim, take(peer), pieces)
    assert len(events) == len(frames)
    assert [event.piece for event in events if isinstance(event, PieceReceived)] == sent
    assert [(one, bytes(data)) for one, data in written] == [
        (one, bytes([number + 1]) * one.size) for number, one in enumerate(sent)
    ]
    victim.receive_eof()


@given(
    st.lists(
        st.tuples(st.sampled_from([FrameKind.MESSAGE, FrameKind.PAYLOAD]), st.integers(0, 100_000)),
        max_size=5,
    ),
    st.lists(st.integers(1, 70_000), max_size=30),
)
@settings(max_examples=50)
def test_any_frames_pass_in_any_split(frames: list[tuple[FrameKind, int]], pieces: list[int]) -> None:
    victim, peer = connected(Role.RESPONDER)
    sent = []
    for number, (kind, size) in enumerate(frames):
        body = bytes([number + 1]) * size
        if kind is FrameKind.PAYLOAD:
            peer.send_payload(1, number, body)
        else:
            peer.send_frame(kind, 1, body)
        sent.append(body)
    events = deliver(victim, take(peer), pieces)
    assert [bytes(getattr(event, "data", None) or getattr(event, "body", b"")) for event in events] == sent
    victim.receive_eof()
