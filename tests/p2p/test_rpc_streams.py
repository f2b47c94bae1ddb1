"""The sans-I/O protocol of streams: two multiplexers joined by lists of frames, and frames of any bytes."""

from __future__ import annotations

import contextlib

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shoal.errors import ConnectionLost, InvalidStateError, InvalidValueError, ProtocolViolation, RemoteError
from shoal.p2p.config import INITIAL_WINDOW
from shoal.p2p.protocol import wire
from shoal.p2p.protocol.frames import FrameKind
from shoal.p2p.protocol.stream_state import ITEM_COST, Payload
from shoal.p2p.protocol.streams import Multiplexer

MAX_INBOUND = 4
MAX_UNREAD = 2 * INITIAL_WINDOW


class Side:
    """One multiplexer and what it has sent."""

    def __init__(self, *, is_initiator):
        self.frames = []
        self.opened = []
        self.discarded = 0
        self.streams = Multiplexer(
            is_initiator=is_initiator,
            send_frame=lambda *frame: self.frames.append(frame),
            max_inbound=MAX_INBOUND,
            max_unread=MAX_UNREAD,
            discard_payload=self.note_discard,
        )

    def note_discard(self):
        self.discarded += 1

    def receive(self, kind, stream_id, body):
        if kind is FrameKind.OPEN:
            opened = self.streams.receive_open(stream_id, body)
            if opened is not None:
                self.opened.append(opened[0])
        else:
            self.streams.receive_frame(kind, stream_id, body)

    def receive_payload(self, stream_id, tag, data):
        memory = self.streams.payload_memory(stream_id, tag, len(data))
        memory[:] = data
        self.streams.receive_payload(stream_id, tag, memory)


@pytest.fixture
def sides():
    return Side(is_initiator=True), Side(is_initiator=False)


def move(source: Side, target: Side) -> None:
    frames, source.frames[:] = list(source.frames), []
    for frame in frames:
        target.receive(*frame)


def open_stream(left: Side, right: Side):
    near = left.streams.open("m", None, None, final=False)
    move(left, right)
    return near, right.opened[-1]


def test_a_unary_call_is_one_frame_each_way(sides):
    left, right = sides
    near = left.streams.open("m", 1.5, b"\x01", final=True)
    assert [frame[0] for frame in left.frames] == [FrameKind.OPEN]
    move(left, right)
    far = right.opened[0]
    assert far.take() == b"\x01"
    assert far.remote_finished
    far.finish(b"\x02")
    assert [frame[0] for frame in right.frames] == [FrameKind.END]
    move(right, left)
    assert near.is_closed
    assert near.take() == b"\x02"
    assert left.streams.open_streams == right.streams.open_streams == 0


def test_ids_are_of_the_openers_parity(sides):
    left, right = sides
    assert [left.streams.open("m", None, None, final=False).id for _ in range(3)] == [1, 3, 5]
    assert [right.streams.open("m", None, None, final=False).id for _ in range(3)] == [2, 4, 6]


def test_credit_runs_out_and_comes_back_when_items_are_taken(sides):
    left, right = sides
    near, far = open_stream(left, right)
    sent = 0
    while near.can_send_message():
        near.send_message(b"x" * 1000)
        sent += 1
    assert sent == -(-INITIAL_WINDOW // (1000 + ITEM_COST))
    move(left, right)
    taken = 0
    while not right.frames:
        assert far.take() is not None
        taken += 1
    assert sent // 2 - 1 <= taken <= sent // 2 + 1
    move(right, left)
    assert near.can_send_message()


def test_sending_without_credit_is_a_violation(sides):
    left, right = sides
    near, _ = open_stream(left, right)
    near.send_message(b"x" * (INITIAL_WINDOW + 10))
    near.send_message(b"one too many")
    with pytest.raises(ProtocolViolation, match="no credit"):
        move(left, right)


def test_a_payload_needs_credit_for_all_of_it(sides):
    left, right = sides
    near, far = open_stream(left, right)
    assert near.can_send_payload(INITIAL_WINDOW - ITEM_COST)
    assert not near.can_send_payload(INITIAL_WINDOW)
    with pytest.raises(ProtocolViolation, match="credit"):
        right.streams.payload_memory(far.id, 1, INITIAL_WINDOW)
    far.accept_payloads(None, 2 * INITIAL_WINDOW)
    move(right, left)
    assert near.can_send_payload(2 * INITIAL_WINDOW)


def test_a_receiver_that_waits_gives_back_all_credit(sides):
    left, right = sides
    near, far = open_stream(left, right)
    far.accept_payloads(None, 1_000_000)
    move(right, left)
    near.send_message(b"x" * 100)
    move(left, right)
    far.take()
    assert not right.frames
    far.is_waiting()
    move(right, left)
    assert near.can_send_payload(1_000_000)


def test_payloads_that_came_early_move_to_the_sink(sides):
    left, right = sides
    near, far = open_stream(left, right)
    right.receive_payload(near.id, 5, b"early")
    memory = bytearray(5)
    far.accept_payloads(lambda tag, length: memoryview(memory), 1000)
    item = far.take()
    assert isinstance(item, Payload)
    assert memory == b"early"


def test_a_sink_may_end_the_stream_while_early_payloads_move_to_it(sides):
    left, right = sides
    near, far = open_stream(left, right)
    for tag in (1, 2, 3):
        right.receive_payload(near.id, tag, b"early")

    def refuse(tag, length):
        far.reset("internal", "no place", InvalidStateError("reset"))
        return memoryview(bytearray(length))

    far.accept_payloads(refuse, 1000)
    assert isinstance(far.failure, InvalidStateError)
    assert far.take() is None


def test_a_payload_of_half_a_window_passes_whatever_was_taken_before(sides):
    for length in range(INITIAL_WINDOW // 2 - 3 * ITEM_COST, INITIAL_WINDOW // 2):
        near, far = open_stream(*sides)
        near.send_message(bytes(length))
        move(*sides)
        assert far.take() is not None
        far.is_waiting()
        move(sides[1], sides[0])
        assert near.can_send_payload(INITIAL_WINDOW // 2)
        near.reset("cancelled", "", InvalidStateError("reset"))
        sides[1].streams.release(far)
        move(*sides)


def test_memory_of_a_stream_that_is_reset_is_not_touched_any_more(sides):
    left, right = sides
    near, far = open_stream(left, right)
    far.accept_payloads(lambda tag, length: memoryview(bytearray(length)), 1000)
    memory = right.streams.payload_memory(near.id, 5, 100)
    far.reset("cancelled", "", InvalidStateError("reset"))
    assert right.discarded == 1
    right.streams.receive_payload(near.id, 5, memory)
    assert far.take() is None


def test_reset_fails_the_other_side_and_late_frames_are_ignored(sides):
    left, right = sides
    near, far = open_stream(left, right)
    far.reset("full", "no room", InvalidStateError("reset"))
    near.send_message(b"late")
    move(left, right)
    right.receive_payload(near.id, 1, b"late")
    move(right, left)
    assert isinstance(near.failure, RemoteError)
    assert near.failure.code == "full"
    near.finish()
    assert not left.frames


def test_what_arrived_before_a_reset_can_be_taken(sides):
    left, right = sides
    near, far = open_stream(left, right)
    far.send_message(b"1")
    far.reset("full", "", InvalidStateError("reset"))
    move(right, left)
    assert near.take() == b"1"


def held_by(side: Side) -> int:
    return side.streams._unread._used


MESSAGE = wire.encode(b"x" * (MAX_UNREAD // 5))


def test_unread_messages_of_all_streams_together_are_bounded(sides):
    left, right = sides
    streams = [open_stream(left, right) for _ in range(3)]
    for number in range(5):
        near, far = streams[number % 3]
        near.send_message(MESSAGE)
        move(left, right)
        move(right, left)
        assert (near.failure is None) == (number < 4)
    # Five did not fit, because each costs a little more than its length.
    assert near.failure.code == far.failure.code == "busy"
    assert far.take() is None
    assert held_by(right) == 3 * (len(MESSAGE) + ITEM_COST)
    # What is read makes room, and so does the end of a handler that reads nothing.
    assert streams[0][1].take() == MESSAGE
    assert held_by(right) == 2 * (len(MESSAGE) + ITEM_COST)
    for _, far in streams:
        far.reset("cancelled", "", InvalidStateError("reset"))
        right.streams.release(far)
    assert held_by(right) == 0


def test_requests_that_are_being_answered_count_as_unread(sides):
    left, right = sides
    request = wire.encode(b"x" * (MAX_UNREAD // 4))
    calls = [left.streams.open("m", None, request, final=True) for _ in range(3)]
    move(left, right)
    assert [far.take_request() for far in right.opened] == [request] * 3
    refused = left.streams.open("m", None, request, final=True)
    move(left, right)
    move(right, left)
    assert len(right.opened) == 3
    assert refused.failure.code == "busy"
    right.opened[0].finish(b"answer")
    right.streams.release(right.opened[0])
    move(right, left)
    assert calls[0].take() == b"answer"
    again = left.streams.open("m", None, request, final=True)
    move(left, right)
    assert (len(right.opened), again.failure) == (4, None)


def test_a_last_message_counts_as_unread(sides):
    left, right = sides
    streams = [open_stream(left, right) for _ in range(3)]
    for near, _ in streams:
        near.send_message(MESSAGE)
        near.finish(MESSAGE)
    move(left, right)
    assert [far.failure is None for _, far in streams] == [True, True, False]


def test_only_payloads_that_nobody_asked_for_count_as_unread(sides):
    left, right = sides
    size = INITIAL_WINDOW - ITEM_COST
    asked, unasked = open_stream(left, right), [open_stream(left, right) for _ in range(3)]
    asked[1].accept_payloads(None, 10 * MAX_UNREAD)
    right.receive_payload(asked[0].id, 1, bytes(3 * MAX_UNREAD))
    assert held_by(right) == 0
    for near, _ in unasked:
        right.receive_payload(near.id, 1, bytes(size))
    assert [far.failure is None for _, far in unasked] == [True, True, False]
    assert held_by(right) == MAX_UNREAD
    places = []
    unasked[0][1].accept_payloads(
        lambda tag, length: memoryview(places.append(bytearray(length)) or places[-1]), size
    )
    assert held_by(right) == MAX_UNREAD // 2
    assert len(asked[1].take().data) == 3 * MAX_UNREAD


def test_what_this_side_asked_for_is_not_bounded_by_what_the_peer_may_send(sides):
    left, right = sides
    streams = [open_stream(left, right) for _ in range(3)]
    for _, far in streams:
        far.send_message(b"x" * INITIAL_WINDOW)
    move(right, left)
    assert [len(near.take()) for near, _ in streams] == [INITIAL_WINDOW] * 3


def test_too_many_streams_are_refused(sides):
    left, right = sides
    streams = [left.streams.open("m", None, None, final=False) for _ in range(MAX_INBOUND + 1)]
    move(left, right)
    move(right, left)
    assert streams[-1].failure is not None
    assert streams[-1].failure.code == "busy"
    assert streams[0].failure is None
    right.streams.release(right.opened[0])
    left.streams.open("m", None, None, final=False)
    move(left, right)
    assert len(right.opened) == MAX_INBOUND + 1


def test_the_end_of_the_connection_fails_all(sides):
    left, right = sides
    near, _ = open_stream(left, right)
    changes = []
    near.on_change = lambda: changes.append(near.failure)
    left.streams.fail_all(lambda: ConnectionLost("gone"))
    assert isinstance(changes[0], ConnectionLost)


@pytest.mark.parametrize(
    ("kind", "stream_id", "body"),
    [
        (FrameKind.MESSAGE, 1, b"x"),
        (FrameKind.MESSAGE, 2, b"x"),
        (FrameKind.END, 7, b""),
        (FrameKind.CREDIT, 1, b"1234567"),
        (FrameKind.OPEN, 1, b"\xc0"),
        (FrameKind.OPEN, 1, wire.encode_open("m", -1.0, False, None)),
        (FrameKind.OPEN, 1, wire.encode_open("m", float("nan"), False, None)),
        (FrameKind.OPEN, 1, wire.encode_open("m" * 200, None, False, None)),
        (FrameKind.OPEN, 1, b"\x94\xa1m\xc0\xc2" + b"\x91" * 100_000),
    ],
)
def test_frames_that_break_the_protocol(sides, kind, stream_id, body):
    with pytest.raises(ProtocolViolation):
        sides[1].receive(kind, stream_id, body)


def test_frames_after_the_end_break_the_protocol(sides):
    left, right = sides
    near, _ = open_stream(left, right)
    near.finish()
    move(left, right)
    for kind in (FrameKind.MESSAGE, FrameKind.END):
        with pytest.raises(ProtocolViolation, match="after its END"):
            right.receive(kind, near.id, b"")
    with pytest.raises(ProtocolViolation, match="after its END"):
        right.streams.payload_memory(near.id, 1, 1)


def test_credit_has_a_limit(sides):
    left, right = sides
    near, _ = open_stream(left, right)
    with pytest.raises(ProtocolViolation, match="credit"):
        left.receive(FrameKind.CREDIT, near.id, wire.encode_credit(2**63))


BODIES = st.one_of(
    st.binary(max_size=40),
    st.builds(
        wire.encode_open,
        st.text(max_size=5),
        st.none() | st.floats(),
        st.booleans(),
        st.none() | st.just(b"\x01") | st.just(msgspec.msgpack.encode("x" * 5000)),
    ),
    st.builds(wire.encode_reset, st.text(max_size=5), st.text(max_size=5)),
    st.builds(wire.encode_credit, st.integers(0, 2**64 - 1)),
    st.builds(
        wire.encode_striped, st.integers(0, 2), st.integers(0, 1), st.sampled_from([1, 1000, 2**32 - 1])
    ),
    st.builds(wire.encode_received, st.integers(0, 2)),
    st.just(b"x" * 100_000),
)
FRAMES = st.tuples(
    st.sampled_from(
        [
            FrameKind.OPEN,
            FrameKind.MESSAGE,
            FrameKind.END,
            FrameKind.RESET,
            FrameKind.CREDIT,
            FrameKind.STRIPED,
            FrameKind.RECEIVED,
            FrameKind.PAYLOAD,
        ]
    ),
    st.integers(0, 12),
    BODIES,
)


@settings(max_examples=300, deadline=None)
@given(st.lists(st.tuples(FRAMES, st.integers(0, 5)), max_size=60))
def test_any_frames_in_any_order_break_the_protocol_at_most(frames):
    side = Side(is_initiator=False)
    for _ in range(3):
        side.streams.open("m", None, None, final=False)
    try:
        for (kind, stream_id, body), action in frames:
            if kind is FrameKind.PAYLOAD:
                side.receive_payload(stream_id, 0, body)
            else:
                side.receive(kind, stream_id, body)
            if side.opened and action == 0:
                side.opened[0].take()
            elif side.opened and action == 1:
                state = side.opened.pop(0)
                state.reset("cancelled", "", InvalidStateError("reset"))
                side.streams.release(state)
            assert side.streams.open_streams <= 3 + MAX_INBOUND + len(frames)
            assert len(side.opened) <= MAX_INBOUND
            for state in side.opened:
                held = sum(ITEM_COST + len(getattr(item, "data", item)) for item in state.received)
                assert held <= INITIAL_WINDOW + 100_000 + 2 * ITEM_COST
            assert held_by(side) <= MAX_UNREAD
        for state in side.opened:
            state.reset("cancelled", "", InvalidStateError("reset"))
            side.streams.release(state)
        assert held_by(side) == 0
    except ProtocolViolation:
        pass


@settings(max_examples=300, deadline=None)
@given(BODIES)
def test_any_bytes_as_a_body_break_the_protocol_at_most(body):
    for decode in (
        wire.decode_open,
        wire.decode_reset,
        wire.decode_hello,
        wire.decode_goodbye,
        wire.decode_credit,
        wire.decode_striped,
        wire.decode_received,
    ):
        with contextlib.suppress(ProtocolViolation):
            decode(body)


def test_the_text_of_any_error_can_be_sent():
    text = "no file caf\udce9" + "x" * 1000
    assert wire.decode_reset(wire.encode_reset("failed\udce9", text)).message.startswith("no file caf?xx")
    assert wire.decode_goodbye(wire.encode_goodbye(wire.Refusal(text))).reason.startswith("no file caf?xx")
    with pytest.raises(InvalidValueError, match="surrogates"):
        wire.encode(text)
