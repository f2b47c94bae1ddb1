"""Sessions: two of them talk in memory, and each thing that can be wrong ends them with its reason."""

from __future__ import annotations

import array
import os
import re
import weakref
from collections.abc import Callable

import pytest

from shoal.errors import InvalidStateError, InvalidTypeError, InvalidValueError, ProtocolViolation
from shoal.p2p.identity import Identity
from shoal.p2p.protocol.frames import CHUNK_BYTES, MAX_PLAINTEXT_BYTES
from shoal.p2p.protocol.handshake import Handshake
from shoal.p2p.protocol.preamble import Versions
from shoal.p2p.protocol.session import (
    FrameKind,
    FrameReceived,
    HandshakeCompleted,
    Limits,
    PayloadReceived,
    Role,
    Session,
)
from shoal.p2p.protocol.violations import (
    NotShoalPeer,
    OtherIdentity,
    OtherVersion,
    TamperedMessage,
    TruncatedStream,
)
from shoal.testing.sessions import connect, connected_pair, deliver, exchange, take

ALICE = Identity.generate(b"a" * 32)
BOB = Identity.generate(b"b" * 32)
CAROL = Identity.generate(b"c" * 32)

PREAMBLE = Versions(1, 0, 0).to_preamble()


class Memory(bytearray):
    """Memory that a weak reference can watch."""


def new_pair() -> tuple[Session, Session]:
    return Session(Role.INITIATOR, ALICE, os.urandom(32)), Session(Role.RESPONDER, BOB, os.urandom(32))


def started_pair() -> tuple[Session, Session]:
    initiator, responder = new_pair()
    initiator.start()
    responder.start()
    return initiator, responder


def assert_dead(session: Session, error: type[Exception]) -> None:
    """Whatever is asked of it, a session that failed fails the same way."""
    session.get_buffer()
    for call in (
        lambda: session.buffer_updated(0),
        lambda: session.receive_eof(),
        lambda: session.start(),
        lambda: session.send_frame(FrameKind.PING, 0),
        lambda: session.send_payload(1, 0, b""),
    ):
        with pytest.raises(error) as caught:
            call()
        assert type(caught.value) is error


# ---- what works ----


def test_a_handshake_proves_both_peers_and_takes_one_and_a_half_round_trips() -> None:
    initiator, responder = started_pair()
    assert initiator.remote is None
    assert deliver(responder, take(initiator)) == []
    assert deliver(initiator, take(responder)) == [HandshakeCompleted(BOB.peer_id)]
    assert initiator.remote == BOB.peer_id
    assert responder.remote is None
    assert deliver(responder, take(initiator)) == [HandshakeCompleted(ALICE.peer_id)]
    assert responder.remote == ALICE.peer_id
    assert initiator.version == responder.version == (1, 0)
    assert take(initiator) == take(responder) == b""


def test_a_handshake_with_the_expected_peers() -> None:
    connect(
        Session(Role.INITIATOR, ALICE, os.urandom(32), expected_peer=BOB.peer_id),
        Session(Role.RESPONDER, BOB, os.urandom(32), expected_peer=ALICE.peer_id),
    )


@pytest.mark.parametrize(
    ("initiator", "responder", "agreed"), [((0, 1), (0, 2), 1), ((0, 0), (0, 5), 0), ((1, 3), (2, 3), 3)]
)
def test_adjacent_minor_versions_agree_on_the_highest_common_one(
    initiator: tuple[int, int], responder: tuple[int, int], agreed: int
) -> None:
    first = Session(Role.INITIATOR, ALICE, os.urandom(32), versions=Versions(1, *initiator))
    second = Session(Role.RESPONDER, BOB, os.urandom(32), versions=Versions(1, *responder))
    connect(first, second)
    assert first.version == second.version == (1, agreed)


@pytest.mark.parametrize("piece", [1, 2, 3, 7, 100, 1000, 70_000])
def test_frames_pass_in_any_split_both_ways(piece: int) -> None:
    initiator, responder = connected_pair()
    bodies = [b"", b"x", bytes(1000), bytes(range(256)) * 300]
    for sender, receiver in ((initiator, responder), (responder, initiator)):
        for kind in FrameKind:
            if kind in (FrameKind.PING, FrameKind.PONG, FrameKind.HELLO, FrameKind.GOODBYE):
                sender.send_frame(kind, 0, b"said")
        sender.send_frame(FrameKind.OPEN, 1 if sender is initiator else 2, b"method")
        for number, body in enumerate(bodies):
            sender.send_frame(FrameKind.MESSAGE, 1, body)
            sender.send_payload(1, number, body)
        wire = take(sender)
        events = deliver(receiver, wire, [piece] * (len(wire) // piece))
        assert [event.kind for event in events[:5] if isinstance(event, FrameReceived)] == [
            FrameKind.PING,
            FrameKind.PONG,
            FrameKind.HELLO,
            FrameKind.GOODBYE,
            FrameKind.OPEN,
        ]
        expected: list[object] = []
        for number, body in enumerate(bodies):
            expected += [FrameReceived(FrameKind.MESSAGE, 1, body), (1, number, body)]
        received = [
            (event.stream_id, event.tag, bytes(event.data)) if isinstance(event, PayloadReceived) else event
            for event in events[5:]
        ]
        assert received == expected
        receiver.receive_eof()


@pytest.mark.parametrize(
    "size",
    [
        0,
        1,
        MAX_PLAINTEXT_BYTES - 18,
        MAX_PLAINTEXT_BYTES - 17,
        CHUNK_BYTES,
        9 * CHUNK_BYTES,
        9 * CHUNK_BYTES + 1,
    ],
)
def test_a_payload_is_put_into_the_very_memory_of_the_sink(size: int) -> None:
    initiator, responder = connected_pair()
    data = bytearray(index * 7 & 0xFF for index in range(size))
    memory = bytearray(size)
    asked = []

    def sink(*what: int) -> memoryview:
        asked.append(what)
        return memoryview(memory)

    responder.payload_sink = sink
    assert responder.payload_sink is sink
    initiator.send_payload(5, 2**40, data)
    sent = bytes(data)
    data[:] = bytes(size)  # the sender's memory is free again
    (event,) = exchange(initiator, responder)[1]
    assert isinstance(event, PayloadReceived)
    assert event.data.obj is memory
    assert (event.stream_id, event.tag) == (5, 2**40)
    assert memory == sent
    assert asked == [(5, 2**40, size)]


@pytest.mark.parametrize("read", [1, 700, 1 << 20])
def test_bytes_of_payloads_are_counted_and_those_of_messages_are_not(read: int) -> None:
    """However they come: a rate bounds payloads alone."""
    alice, bob = connected_pair()
    sizes = [10, CHUNK_BYTES // 2, CHUNK_BYTES + 1, 3 * CHUNK_BYTES]
    for number, size in enumerate(sizes):
        alice.send_frame(FrameKind.MESSAGE, 1, bytes(100))
        deliver(bob, take(alice))
        before = bob.payload_bytes
        alice.send_payload(1, number, bytes(size))
        alice.send_frame(FrameKind.MESSAGE, 1, bytes(2 * CHUNK_BYTES))
        wire, counts = take(alice), [before]
        for begin in range(0, len(wire), max(read, len(wire) // 100)):
            deliver(bob, wire[begin : begin + max(read, len(wire) // 100)])
            counts.append(bob.payload_bytes)
        assert counts == sorted(counts)
        assert size <= counts[-1] - before <= size + 100 * (1 + size // CHUNK_BYTES)


def test_long_payloads_are_sent_in_few_pieces_of_wire_bytes() -> None:
    initiator, _ = connected_pair()
    initiator.send_payload(1, 0, bytes(512 * 1024))
    assert [len(piece) for piece in initiator.data_to_send()] == [2 + 18 + 16, 512 * 1024 + 9 * 18]
    assert initiator.data_to_send() == []


def test_a_payload_can_be_sent_piece_by_piece() -> None:
    initiator, responder = connected_pair()
    data = bytes(range(256)) * 4096  # 1 MiB
    events = []
    for number, _ in enumerate(initiator.send_payload_pieces(1, 9, data, 300_000), start=1):
        wire = take(initiator)
        assert len(wire) < 300_100
        events += deliver(responder, wire)
        if number < 5:
            with pytest.raises(InvalidStateError, match="payload under way"):
                initiator.send_frame(FrameKind.PING, 0)
            with pytest.raises(InvalidStateError):
                next(initiator.send_payload_pieces(1, 9, b"", 1))
    assert number == 5
    assert [bytes(event.data) for event in events if isinstance(event, PayloadReceived)] == [data]
    initiator.send_frame(FrameKind.PING, 0)
    assert exchange(initiator, responder)[1] == [FrameReceived(FrameKind.PING, 0, b"")]


def test_two_payloads_are_never_mixed() -> None:
    initiator, _ = connected_pair()
    first = initiator.send_payload_pieces(1, 1, bytes(2**20), 2**16)
    second = initiator.send_payload_pieces(3, 2, bytes(2**20), 2**16)
    next(first)
    with pytest.raises(InvalidStateError):
        next(second)


def test_payloads_of_any_plain_memory() -> None:
    initiator, responder = connected_pair()
    numbers = array.array("d", range(20_000))
    initiator.send_payload(1, 0, numbers)
    (event,) = exchange(initiator, responder)[1]
    assert isinstance(event, PayloadReceived)
    assert bytes(event.data) == numbers.tobytes()
    for bad in (memoryview(bytes(100))[::2], "text", 5):
        with pytest.raises(InvalidTypeError):
            initiator.send_payload(1, 0, bad)  # type: ignore[arg-type]
    assert exchange(initiator, responder) == ([], [])


def test_one_event_is_dealt_with_before_the_next_message_is_read() -> None:
    """A sink may depend on the frames before its payload, though all came in one read."""
    initiator, responder = connected_pair()
    initiator.send_frame(FrameKind.OPEN, 1)
    initiator.send_payload(1, 0, b"tensor")
    known: set[int] = set()

    def sink(stream_id: int, _tag: int, length: int) -> memoryview:
        if stream_id not in known:
            raise ProtocolViolation("unknown stream")
        return memoryview(bytearray(length))

    responder.payload_sink = sink
    wire = take(initiator)
    responder.get_buffer()[: len(wire)] = wire
    seen = []
    for event in responder.buffer_updated(len(wire)):
        seen.append(type(event))
        if isinstance(event, FrameReceived):
            known.add(event.stream_id)
    assert seen == [FrameReceived, PayloadReceived]


def test_both_directions_rekey_while_frames_pass() -> None:
    initiator = Session(Role.INITIATOR, ALICE, os.urandom(32), rekey_bytes=100_000)
    responder = Session(Role.RESPONDER, BOB, os.urandom(32), rekey_bytes=100_000)
    connect(initiator, responder)
    for sender, receiver in ((initiator, responder), (responder, initiator)):
        for number in range(20):
            data = bytes([number]) * 70_000
            sender.send_payload(2, number, data)
            sender.send_frame(FrameKind.MESSAGE, 2, data)
            wire = take(sender)
            payload, message = deliver(receiver, wire)
            assert isinstance(payload, PayloadReceived)
            assert bytes(payload.data) == data
            assert message == FrameReceived(FrameKind.MESSAGE, 2, data)


def test_a_peer_that_rekeys_at_another_time_is_not_understood() -> None:
    initiator = Session(Role.INITIATOR, ALICE, os.urandom(32), rekey_bytes=1000)
    responder = Session(Role.RESPONDER, BOB, os.urandom(32), rekey_bytes=2000)
    connect(initiator, responder)
    initiator.send_frame(FrameKind.MESSAGE, 1, bytes(1200))
    initiator.send_frame(FrameKind.MESSAGE, 1)
    with pytest.raises(TamperedMessage):
        exchange(initiator, responder)


def test_one_secret_makes_the_same_bytes_and_another_one_others() -> None:
    def first_flight(secret: bytes) -> bytes:
        session = Session(Role.INITIATOR, ALICE, secret)
        session.start()
        return take(session)

    assert first_flight(b"s" * 32) == first_flight(b"s" * 32)
    assert first_flight(b"s" * 32) != first_flight(b"t" * 32)


def test_nothing_recognisable_is_on_the_wire() -> None:
    initiator, responder = started_pair()
    wire = take(initiator) + take(responder)
    deliver(responder, wire[: len(PREAMBLE) + 34])
    wire += (answer := take(responder))
    deliver(initiator, PREAMBLE + answer)
    initiator.send_payload(1, 0, b"tensor" * 20_000)
    wire += take(initiator)
    for secret in (ALICE.peer_id.public_key, BOB.peer_id.public_key, b"tensor"):
        assert secret not in wire


# ---- memory ----


def test_a_quiet_session_holds_little_and_a_busy_one_what_its_limits_say() -> None:
    initiator, responder = connected_pair()
    assert responder.bytes_held <= 4096
    initiator.send_payload(1, 0, bytes(8 * 2**20))
    events = exchange(initiator, responder)[1]
    assert len(events) == 1
    assert responder.bytes_held == responder.limits.max_receive_buffer
    for _ in range(200):
        initiator.send_frame(FrameKind.PING, 0)
        exchange(initiator, responder)
    assert responder.bytes_held <= 4096


def test_a_session_that_is_over_holds_nothing() -> None:
    initiator, responder = connected_pair()
    sinks: list[weakref.ref[Memory]] = []

    def sink(_stream: int, _tag: int, length: int) -> memoryview:
        memory = Memory(length)
        sinks.append(weakref.ref(memory))
        return memoryview(memory)

    responder.payload_sink = sink
    initiator.send_payload(1, 0, bytes(8 * 2**20))
    wire = take(initiator)
    deliver(responder, wire[: len(wire) // 2])
    assert sinks[0]() is not None
    responder.release()
    assert responder.bytes_held == 0
    assert sinks[0]() is None


def test_the_receive_buffer_keeps_its_limit() -> None:
    limits = Limits(max_receive_buffer=66_000, max_payload=2**20)
    initiator = Session(Role.INITIATOR, ALICE, os.urandom(32))
    responder = Session(Role.RESPONDER, BOB, os.urandom(32), limits=limits)
    connect(initiator, responder)
    for _ in range(3):
        initiator.send_payload(1, 0, bytes(2**20))
    wire = take(initiator)
    received = 0
    while wire:
        space = responder.get_buffer()
        count = min(len(space), len(wire))
        assert count > 0
        space[:count] = wire[:count]
        wire = wire[count:]
        received += len(list(responder.buffer_updated(count)))
        assert responder.bytes_held <= limits.max_bytes_held
    assert received == 3


@pytest.mark.parametrize(
    ("kind", "size"),
    [(FrameKind.MESSAGE, 2**17 + 1), (FrameKind.HELLO, 2**17 + 1), (FrameKind.PAYLOAD, 2**17 + 1)],
)
def test_a_frame_over_the_limit_is_refused_before_memory_is_taken(kind: FrameKind, size: int) -> None:
    limit = 2**17
    initiator = Session(Role.INITIATOR, ALICE, os.urandom(32), limits=Limits(max_control_body=2**20))
    responder = Session(
        Role.RESPONDER,
        BOB,
        os.urandom(32),
        limits=Limits(max_message_body=limit, max_control_body=limit, max_payload=limit),
    )
    connect(initiator, responder)

    def sink(*_: int) -> memoryview:
        raise AssertionError("memory was asked for")

    responder.payload_sink = sink
    if kind is FrameKind.PAYLOAD:
        initiator.send_payload(1, 0, bytes(size))
    else:
        initiator.send_frame(kind, 0 if kind is FrameKind.HELLO else 1, bytes(size))
    header, *_ = initiator.data_to_send()
    held = responder.bytes_held
    with pytest.raises(ProtocolViolation, match="longer than the limit of 131072"):
        deliver(responder, header)
    assert responder.bytes_held == held
    assert_dead(responder, ProtocolViolation)


# ---- the preamble ----


@pytest.mark.parametrize("role", list(Role))
@pytest.mark.parametrize(
    ("sent", "reason"),
    [
        (b"GET / HTTP/1.1\r\nHost: example.org\r\n\r\n", "looks like an HTTP request"),
        (b"HTTP/1.1 400 Bad Request\r\n", "looks like an HTTP response"),
        (bytes.fromhex("1603010200010001fc0303"), "looks like TLS"),
        (b"SSH-2.0-OpenSSH_9.6\r\n", "looks like SSH"),
        (b"\x13/multistream/1.0.0\n", "looks like libp2p"),
        (b"\0" * 1000, re.escape(repr(b"\0" * 48)) + "..."),
        (b"s", None),
        (b"shoa", None),
        (b"shoal\n", "does not speak Shoal"),
        (b"shoal/1 0-0 \n", "malformed"),
        (b"shoal/01 0-0\n", "malformed"),
        (b"shoal/1 0\n", "malformed"),
        (b"shoal/1 " + b"0" * 40, "malformed"),
        (b"shoal/1 -1-0\n", "malformed"),
        (b"shoal/99999 0-0\n", "malformed"),
        (b"shoal/1 5-4\n", "empty range"),
        (b"shoal/2 0-0\n", r"version 2\.0 of the protocol"),
        (b"shoal/2 0-0\n", "this side 1.0"),
        (b"shoal/2 quite another form\n", "version 2 "),
        (b"shoal/10 0-0\n", "version 10"),
        (b"shoal/1 1-7\n", "version 1.1 to 1.7 of the protocol, this side 1.0"),
    ],
)
def test_other_programs_and_versions_are_told_apart(role: Role, sent: bytes, reason: str | None) -> None:
    session = Session(role, ALICE, os.urandom(32))
    session.start()
    if reason is None:
        assert deliver(session, sent) == []
        return
    with pytest.raises(ProtocolViolation, match=reason) as caught:
        deliver(session, sent)
    empty_range = reason == "empty range"
    expected = (
        ProtocolViolation
        if empty_range
        else OtherVersion
        if "this side" in str(caught.value)
        else NotShoalPeer
    )
    assert type(caught.value) is expected
    # What was queued before can still be said, so that the other side understands too.
    assert take(session).startswith(PREAMBLE)
    assert_dead(session, expected)


def test_the_first_wrong_byte_is_enough() -> None:
    session = Session(Role.RESPONDER, ALICE, os.urandom(32))
    with pytest.raises(NotShoalPeer):
        deliver(session, b"G")
    session = Session(Role.RESPONDER, ALICE, os.urandom(32))
    with pytest.raises(NotShoalPeer):
        deliver(session, b"shoaL")


def test_versions_without_a_common_one_fail_on_both_sides() -> None:
    old = Session(Role.INITIATOR, ALICE, os.urandom(32), versions=Versions(1, 0, 1))
    new = Session(Role.RESPONDER, BOB, os.urandom(32), versions=Versions(1, 2, 3))
    old.start()
    new.start()
    from_old, from_new = take(old), take(new)
    with pytest.raises(OtherVersion, match=r"version 1\.0 to 1\.1 of the protocol, this side 1\.2 to 1\.3"):
        deliver(new, from_old)
    with pytest.raises(OtherVersion, match=r"version 1\.2 to 1\.3 of the protocol, this side 1\.0 to 1\.1"):
        deliver(old, from_new)


@pytest.mark.parametrize("victim", list(Role))
def test_a_downgrade_fails(victim: Role) -> None:
    """Somebody between the two changes a preamble, so that they agree on a version that neither would choose."""
    initiator = Session(Role.INITIATOR, ALICE, os.urandom(32), versions=Versions(1, 0, 1))
    responder = Session(Role.RESPONDER, BOB, os.urandom(32), versions=Versions(1, 0, 1))
    initiator.start()
    responder.start()
    forth, back = take(initiator), take(responder)
    honest, forged = Versions(1, 0, 1).to_preamble(), Versions(1, 0, 0).to_preamble()
    if victim is Role.RESPONDER:
        forth = forth.replace(honest, forged)
    else:
        back = back.replace(honest, forged)
    deliver(responder, forth)
    back += take(responder)
    with pytest.raises(TamperedMessage, match="message 2 is not authentic"):
        deliver(initiator, back)
    assert_dead(initiator, TamperedMessage)


@pytest.mark.parametrize("values", [(1, 2, 1), (-1, 0, 0), (1, 0, 10_000)])
def test_versions_are_checked_where_they_are_made(values: tuple[int, int, int]) -> None:
    with pytest.raises(InvalidValueError):
        Versions(*values)


# ---- the handshake ----


def flights() -> tuple[Session, Session, list[bytes]]:
    """A new pair, and what an undisturbed handshake of other sessions of the same peers says."""
    initiator, responder = started_pair()
    first = take(initiator)
    deliver(responder, first)
    second = take(responder)
    deliver(initiator, second)
    third = take(initiator)
    deliver(responder, third)
    return *started_pair(), [first, second, third]


def run_handshake(change: Callable[[int, bytes], bytes]) -> None:
    """A handshake whose flights (0, 1, 2) are changed on their way."""
    initiator, responder = started_pair()
    deliver(responder, change(0, take(initiator)))
    deliver(initiator, change(1, take(responder)))
    deliver(responder, change(2, take(initiator)))


@pytest.mark.parametrize("flight", [0, 1, 2])
def test_every_byte_of_the_handshake_counts(flight: int) -> None:
    lengths = {}
    run_handshake(lambda number, data: (lengths.update({number: len(data)}), data)[1])
    initiator, responder = new_pair()

    def spoil(position: int, bit: int) -> Callable[[int, bytes], bytes]:
        def change(number: int, data: bytes) -> bytes:
            if number != flight:
                return data
            changed = bytearray(data)
            changed[position] ^= bit
            return bytes(changed)

        return change

    assert lengths == {0: 13 - 1 + 34, 1: 13 - 1 + 194, 2: 162}
    for position in range(lengths[flight]):
        # The top bit of an X25519 key is ignored by the curve, but not by the handshake hash.
        with pytest.raises(ProtocolViolation):
            run_handshake(spoil(position, 0x80 if position % 2 else 0x01))
    assert (initiator.remote, responder.remote) == (None, None)


@pytest.mark.parametrize("flight", [1, 2])
def test_a_handshake_message_of_another_connection_is_refused(flight: int) -> None:
    initiator, responder, old = flights()
    deliver(responder, take(initiator))
    if flight == 1:
        with pytest.raises(TamperedMessage, match="belong to another"):
            deliver(initiator, old[1])
        return
    deliver(initiator, take(responder))
    with pytest.raises(TamperedMessage):
        deliver(responder, old[2])


def test_a_replayed_first_flight_gets_no_further() -> None:
    _, responder, old = flights()
    assert deliver(responder, old[0]) == []
    with pytest.raises(TamperedMessage, match="message 3"):
        deliver(responder, old[2])
    assert responder.remote is None


@pytest.mark.parametrize("flight", [0, 1, 2])
@pytest.mark.parametrize("size", [0, 1, 31, 33, 95, 65_535])
def test_a_handshake_message_of_another_size_is_refused_by_its_length(flight: int, size: int) -> None:
    def change(number: int, data: bytes) -> bytes:
        if number != flight:
            return data
        preamble = b"" if number == 2 else PREAMBLE
        return preamble + size.to_bytes(2, "big")

    with pytest.raises(ProtocolViolation, match=f"handshake message {flight + 1} has {size} bytes"):
        run_handshake(change)


def test_messages_in_the_wrong_order_are_refused() -> None:
    initiator, responder, old = flights()
    with pytest.raises(ProtocolViolation, match="handshake message 1 has 160 bytes"):
        deliver(responder, PREAMBLE + old[2])
    with pytest.raises(ProtocolViolation, match="handshake message 2 has 32 bytes"):
        deliver(initiator, old[0])  # one's own first flight, reflected


def test_a_key_of_low_order_is_refused() -> None:
    initiator, responder = started_pair()
    with pytest.raises(ProtocolViolation, match="low order"):
        deliver(responder, PREAMBLE + b"\0\x20" + bytes(32))
    with pytest.raises(ProtocolViolation, match="low order"):
        deliver(initiator, PREAMBLE + b"\0\xc0" + bytes(192))


def test_another_peer_answers_than_the_one_that_was_dialed() -> None:
    initiator = Session(Role.INITIATOR, ALICE, os.urandom(32), expected_peer=CAROL.peer_id)
    responder = Session(Role.RESPONDER, BOB, os.urandom(32))
    initiator.start()
    responder.start()
    with pytest.raises(OtherIdentity, match=f"{BOB.peer_id} answers where {CAROL.peer_id} was expected"):
        exchange(initiator, responder)
    assert take(initiator) == b""  # it has not said who it is
    assert initiator.remote is None
    assert_dead(initiator, OtherIdentity)


def test_another_peer_dials_than_the_one_that_was_expected() -> None:
    initiator = Session(Role.INITIATOR, ALICE, os.urandom(32))
    responder = Session(Role.RESPONDER, BOB, os.urandom(32), expected_peer=CAROL.peer_id)
    initiator.start()
    responder.start()
    with pytest.raises(OtherIdentity):
        exchange(initiator, responder)
    assert responder.remote is None
    assert_dead(responder, OtherIdentity)


class Impostor(Identity):
    """Says that it is somebody else, and signs with its own key."""

    __slots__ = ()

    @classmethod
    def of(cls, claimed: Identity) -> Impostor:
        impostor = cls.generate(b"i" * 32)
        assert isinstance(impostor, Impostor)
        impostor.peer_id = claimed.peer_id
        return impostor


@pytest.mark.parametrize("role", list(Role))
def test_who_cannot_sign_is_not_believed(role: Role) -> None:
    liar = Session(role, Impostor.of(CAROL), os.urandom(32))
    victim = Session(role.other, ALICE, os.urandom(32), expected_peer=CAROL.peer_id)
    liar.start()
    victim.start()
    with pytest.raises(OtherIdentity, match="cannot prove"):
        exchange(liar, victim)
    assert victim.remote is None


class Parrot(Identity):
    """Signs for the other role, as one who passes on a peer's own proof would."""

    __slots__ = ()

    def sign(self, domain: bytes, message: bytes) -> bytes:
        roles = (Role.INITIATOR.value.encode(), Role.RESPONDER.value.encode())
        for role, other in (roles, roles[::-1]):
            if role in domain:
                return super().sign(domain.replace(role, other), message)
        raise AssertionError(f"no role in {domain!r}")


@pytest.mark.parametrize("role", list(Role))
def test_a_proof_holds_for_one_role_only(role: Role) -> None:
    liar = Session(role, Parrot.generate(b"p" * 32), os.urandom(32))
    victim = Session(role.other, ALICE, os.urandom(32))
    liar.start()
    victim.start()
    with pytest.raises(OtherIdentity, match="cannot prove"):
        exchange(liar, victim)


class Repeater(Identity):
    """Shows the first proof that it ever made again and again, as one who has but a copy of it would."""

    __slots__ = ("first",)

    def sign(self, domain: bytes, message: bytes) -> bytes:
        if not hasattr(self, "first"):
            self.first = super().sign(domain, message)
        return self.first


@pytest.mark.parametrize("role", list(Role))
def test_a_proof_holds_for_one_handshake_only(role: Role) -> None:
    repeater = Repeater.generate(b"r" * 32)
    pairs = [
        (Session(role, repeater, secret=b"s" * 32), Session(role.other, ALICE, os.urandom(32)))
        for _ in range(2)
    ]
    for session in (*pairs[0], *pairs[1]):
        session.start()
    exchange(*pairs[0])
    assert pairs[0][1].remote == repeater.peer_id
    with pytest.raises(OtherIdentity, match="cannot prove"):
        exchange(*pairs[1])


def test_a_handshake_alone_reports_what_it_took() -> None:
    handshake = Handshake(Role.RESPONDER, BOB, os.urandom(32))
    assert handshake.start() == PREAMBLE
    assert handshake.receive(memoryview(PREAMBLE[:5])) == (0, b"")
    assert handshake.receive(memoryview(PREAMBLE + b"more")) == (len(PREAMBLE), b"")
    assert handshake.receive(memoryview(b"\0")) == (0, b"")
    assert not handshake.finished


# ---- after the handshake ----


def messages_of(wire: bytes) -> list[bytes]:
    """Wire bytes, cut into Noise messages with their lengths."""
    messages = []
    while wire:
        end = 2 + int.from_bytes(wire[:2], "big")
        messages.append(wire[:end])
        wire = wire[end:]
    return messages


def sent_messages(count: int = 3) -> tuple[Session, list[bytes]]:
    """A responder, and messages for it."""
    initiator, responder = connected_pair()
    for number in range(count):
        initiator.send_frame(FrameKind.MESSAGE, 1, bytes([number]))
    return responder, messages_of(take(initiator))


def test_every_byte_of_a_message_counts() -> None:
    _, (message, *_) = sent_messages()
    for position in range(2, len(message)):
        responder, (again, *_) = sent_messages()
        changed = bytearray(again)
        changed[position] ^= 1
        with pytest.raises(TamperedMessage):
            deliver(responder, changed)
        assert_dead(responder, TamperedMessage)


def test_a_message_with_another_length() -> None:
    responder, (message, following, *_) = sent_messages()
    size = int.from_bytes(message[:2], "big")
    with pytest.raises(TamperedMessage):
        deliver(responder, (size - 1).to_bytes(2, "big") + message[2:] + following)
    responder, (message, following, *_) = sent_messages()
    with pytest.raises(TamperedMessage):
        deliver(responder, (size + 1).to_bytes(2, "big") + message[2:] + following)
    for short in (0, 1, 15):
        responder, _ = sent_messages()
        with pytest.raises(ProtocolViolation, match=f"{short} bytes is shorter than its tag"):
            deliver(responder, short.to_bytes(2, "big"))


@pytest.mark.parametrize("order", [[0, 0], [1], [0, 2], [0, 1, 0], [2, 1, 0]])
def test_replayed_reordered_or_missing_messages(order: list[int]) -> None:
    responder, messages = sent_messages()
    good = 0
    while order[: good + 1] == list(range(good + 1)):
        assert deliver(responder, messages[good]) == [FrameReceived(FrameKind.MESSAGE, 1, bytes([good]))]
        good += 1
    with pytest.raises(TamperedMessage):
        deliver(responder, messages[order[good]])
    assert_dead(responder, TamperedMessage)


def test_a_message_of_the_other_direction_is_refused() -> None:
    initiator, _ = connected_pair()
    initiator.send_frame(FrameKind.MESSAGE, 1)
    with pytest.raises(TamperedMessage):
        deliver(initiator, take(initiator))


def test_a_message_of_another_connection_is_refused() -> None:
    _, messages = sent_messages()
    _, stranger = connected_pair(1, 2)
    with pytest.raises(TamperedMessage):
        deliver(stranger, messages[0])


def test_a_payload_with_one_bad_chunk_is_no_payload() -> None:
    initiator, responder = connected_pair()
    initiator.send_payload(1, 0, bytes(3 * CHUNK_BYTES))
    wire = bytearray(take(initiator))
    wire[-1] ^= 1
    assert deliver(responder, wire[:-1], [1000] * 100) == []
    with pytest.raises(TamperedMessage):
        deliver(responder, wire[-1:])


def test_events_before_a_bad_message_are_seen() -> None:
    responder, messages = sent_messages()
    wire = messages[0] + b"\0\x10" + bytes(16)
    responder.get_buffer()[: len(wire)] = wire
    events = responder.buffer_updated(len(wire))
    assert next(events) == FrameReceived(FrameKind.MESSAGE, 1, b"\0")
    with pytest.raises(TamperedMessage):
        next(events)
    assert_dead(responder, TamperedMessage)


def test_a_dead_session_gives_no_more_events() -> None:
    responder, messages = sent_messages()
    wire = b"".join(messages)
    responder.get_buffer()[: len(wire)] = wire
    events = responder.buffer_updated(len(wire))
    next(events)
    with pytest.raises(TruncatedStream):
        responder.receive_eof()
    with pytest.raises(TruncatedStream):
        next(events)


@pytest.mark.parametrize("error", [ProtocolViolation("no such stream"), KeyError("a mistake of the caller")])
@pytest.mark.parametrize("size", [10, 100_000])
def test_a_sink_that_raises_ends_the_session(error: Exception, size: int) -> None:
    initiator, responder = connected_pair()

    def sink(*_: int) -> memoryview:
        raise error

    responder.payload_sink = sink
    initiator.send_payload(1, 0, bytes(size))
    with pytest.raises(type(error)) as caught:
        exchange(initiator, responder)
    assert caught.value is error
    assert_dead(responder, type(error))


# ---- the end ----


def test_a_connection_that_ends_during_the_handshake_is_truncated() -> None:
    _, _, old = flights()
    for session, data in (
        (Session(Role.RESPONDER, BOB, os.urandom(32)), b""),
        (Session(Role.RESPONDER, BOB, os.urandom(32)), b"sho"),
        (Session(Role.RESPONDER, BOB, os.urandom(32)), old[0]),
        (Session(Role.INITIATOR, ALICE, os.urandom(32)), PREAMBLE),
        (Session(Role.INITIATOR, ALICE, os.urandom(32)), PREAMBLE + b"\0\xc0" + bytes(100)),
    ):
        session.start()
        deliver(session, data)
        with pytest.raises(TruncatedStream, match="during the handshake"):
            session.receive_eof()
        assert_dead(session, TruncatedStream)


def test_a_connection_may_end_between_frames_only() -> None:
    def long_frames() -> tuple[Session, bytes]:
        initiator, responder = connected_pair()
        initiator.send_frame(FrameKind.MESSAGE, 1, bytes(2 * CHUNK_BYTES))
        initiator.send_payload(1, 0, bytes(2 * CHUNK_BYTES))
        return responder, take(initiator)

    _, wire = long_frames()
    messages = messages_of(wire)
    assert len(messages) == 6
    borders = {len(b"".join(messages[:count])) for count in range(len(messages) + 1)}
    clean = {len(b"".join(messages[:count])) for count in (0, 3, 6)}
    for border in sorted(borders | set(range(1, len(wire), 7001))):
        responder, wire = long_frames()
        deliver(responder, wire[:border])
        if border in clean:
            responder.receive_eof()
            continue
        with pytest.raises(TruncatedStream, match="middle of a frame"):
            responder.receive_eof()
        assert_dead(responder, TruncatedStream)


# ---- misuse ----


def test_nothing_can_be_sent_before_the_handshake() -> None:
    initiator, _ = started_pair()
    with pytest.raises(InvalidStateError, match="before the handshake"):
        initiator.send_frame(FrameKind.PING, 0)
    with pytest.raises(InvalidStateError):
        initiator.send_payload(1, 0, b"")


def test_frames_that_no_peer_would_take_are_not_sent() -> None:
    initiator, responder = connected_pair()
    for kind, stream_id, body in (
        (FrameKind.PAYLOAD, 1, b""),
        (FrameKind.OPEN, 2, b""),
        (FrameKind.MESSAGE, 0, b""),
        (FrameKind.PING, 1, b""),
        (FrameKind.MESSAGE, 1, bytes(2**20 + 1)),
    ):
        with pytest.raises(InvalidValueError):
            initiator.send_frame(kind, stream_id, body)
    with pytest.raises(InvalidValueError, match="not the responder's to open"):
        responder.send_frame(FrameKind.OPEN, 1)
    with pytest.raises(InvalidValueError):
        initiator.send_payload(1, 2**64, b"")
    # Nothing of it was sent, and no nonce was used for it.
    initiator.send_frame(FrameKind.PING, 0)
    assert exchange(initiator, responder)[1] == [FrameReceived(FrameKind.PING, 0, b"")]
