"""Payloads that come in pieces: over several connections, in any order, twice, changed, or after their stream's end."""

from __future__ import annotations

import asyncio
import contextlib
import random
from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.p2p.test_host import Swarm

from shoal.errors import ConnectionLost, DeadlineExceeded, InvalidValueError, ProtocolViolation, RemoteError
from shoal.p2p.config import INITIAL_WINDOW, HostConfig
from shoal.p2p.protocol import wire
from shoal.p2p.protocol.frames import CHUNK_BYTES, DEFAULT_LIMITS, FrameKind, Piece
from shoal.p2p.protocol.pieces import Assembly, Numbers
from shoal.p2p.protocol.stream_state import ITEM_COST, Payload, StreamState
from shoal.p2p.protocol.streams import Multiplexer
from shoal.p2p.rpc import DELIVERY_TIMEOUT, EndOfStream, Lane, Stream
from shoal.testing.clock import run
from shoal.testing.conformance.world import STREAM, Number

WINDOW = 1 << 20
TOTAL = 3 * CHUNK_BYTES + 7
DATA = random.Random(7).randbytes(TOTAL)


class Receiver:
    """A stream that takes payloads into memory of its own, and what it has sent."""

    def __init__(self) -> None:
        self.sent: list[tuple[FrameKind, int, bytes]] = []
        self.streams = Multiplexer(
            is_initiator=False,
            send_frame=lambda *frame: self.sent.append(frame),
            max_inbound=4,
            max_unread=2 * INITIAL_WINDOW,
            violate=self.violate,
        )
        self.violations: list[ProtocolViolation] = []
        self.sender = Multiplexer(
            is_initiator=True, send_frame=self.deliver, max_inbound=4, max_unread=2 * INITIAL_WINDOW
        )
        self.held: list[tuple[FrameKind, int, bytes]] | None = None
        self.memory: dict[int, bytearray] = {}
        self.stream: StreamState
        self.near = self.sender.open("m", None, None, final=False)
        self.stream.accept_payloads(self.place, WINDOW)
        self.give_back()

    def violate(self, violation: ProtocolViolation) -> None:
        self.violations.append(violation)

    def deliver(self, kind: FrameKind, stream_id: int, body: bytes) -> None:
        if self.held is not None:
            self.held.append((kind, stream_id, body))
        elif kind is FrameKind.OPEN:
            opened = self.streams.receive_open(stream_id, body)
            assert opened is not None
            self.stream = opened[0]
        else:
            self.streams.receive_frame(kind, stream_id, body)

    def give_back(self) -> None:
        frames, self.sent = self.sent, []
        for frame in frames:
            self.sender.receive_frame(*frame)

    def place(self, tag: int, length: int) -> memoryview:
        self.memory[tag] = bytearray(length)
        return memoryview(self.memory[tag])

    def announce(self, tag: int) -> int:
        assert self.near.may_stripe
        return self.near.begin_striped(tag, TOTAL)

    def announced_late(self, tag: int) -> int:
        """A payload whose pieces come first."""
        self.held = []
        return self.announce(tag)

    def bring(self, number: int, tag: int, index: int, data: bytes = DATA) -> bool:
        """A piece arrives; returns whether it was written."""
        piece = Piece(9, self.near.id, number, tag, TOTAL, index * CHUNK_BYTES)
        memory = self.streams.piece_memory(piece)
        if memory is not None:
            memory[:] = data[piece.offset : piece.offset + piece.size]
        self.streams.receive_piece(piece)
        return memory is not None

    def refuses(self, piece: Piece, reason: str) -> bool:
        """Whether a piece has no place, and ends the connection of its stream for that reason."""
        before = len(self.violations)
        place = self.streams.piece_memory(piece)
        found = [str(violation) for violation in self.violations[before:]]
        return place is None and len(found) == 1 and reason in found[0]

    def confirmed(self) -> list[int]:
        return [int.from_bytes(body) for kind, _, body in self.sent if kind is FrameKind.RECEIVED]


def test_a_payload_is_taken_when_all_its_pieces_are_there():
    receiver = Receiver()
    number = receiver.announce(5)
    for index in (3, 0, 2):
        receiver.bring(number, 5, index)
        assert receiver.stream.take() is None
        assert receiver.confirmed() == []
    receiver.bring(number, 5, 1)
    assert receiver.confirmed() == [number]
    item = receiver.stream.take()
    assert isinstance(item, Payload)
    assert (item.tag, bytes(item.data)) == (5, DATA)


@given(st.randoms(use_true_random=False))
def test_items_keep_their_order_whatever_comes_first(rng: random.Random):
    receiver = Receiver()
    receiver.held = []
    receiver.near.send_message(b"first")
    numbers = [receiver.announce(10), receiver.announce(11)]
    receiver.near.send_message(b"last")
    receiver.near.finish()
    frames, receiver.held = receiver.held, None
    events: list[object] = [(number, 10 + number, index) for number in numbers for index in range(4)]
    events += [event for event in events if rng.random() < 0.3]
    rng.shuffle(events)
    for frame in frames:  # frames keep their order; pieces come anywhere between them
        events.insert(rng.randint(0, len(events)), frame)
    order = iter(frames)
    for event in events:
        if isinstance(event[0], FrameKind):  # type: ignore[index]
            receiver.deliver(*next(order))
        else:
            receiver.bring(*event)  # type: ignore[misc]
    taken = [receiver.stream.take() for _ in range(4)]
    assert taken[0] == b"first"
    assert taken[3] == b"last"
    assert [(item.tag, bytes(item.data)) for item in taken[1:3]] == [(10, DATA), (11, DATA)]  # type: ignore[union-attr]
    assert receiver.stream.remote_finished


@pytest.mark.parametrize("total", [1, CHUNK_BYTES])
@pytest.mark.parametrize("what", ["STRIPED", "PIECE"])
def test_a_payload_of_one_piece_is_not_striped(what: str, total: int):
    """What the receiver keeps of each would be more than the credit that it costs."""
    receiver = Receiver()
    if what == "STRIPED":
        frame = FrameKind.STRIPED, receiver.near.id, wire.encode_striped(0, 5, total)
        with pytest.raises(ProtocolViolation, match="one piece"):
            receiver.streams.receive_frame(*frame)
    else:
        assert receiver.refuses(Piece(9, receiver.near.id, 0, 5, total, 0), "one piece")


def test_a_place_is_written_once():
    receiver = Receiver()
    number = receiver.announce(5)
    assert receiver.bring(number, 5, 0)
    assert not receiver.bring(number, 5, 0, bytes(TOTAL))
    for index in (1, 2, 3):
        receiver.bring(number, 5, index)
    for index in range(4):
        assert not receiver.bring(number, 5, index, bytes(TOTAL))
    item = receiver.stream.take()
    assert isinstance(item, Payload)
    assert bytes(item.data) == DATA
    for index in range(4):
        assert not receiver.bring(number, 5, index, bytes(TOTAL))
    assert bytes(item.data) == DATA
    assert receiver.confirmed() == [number]


def test_pieces_of_a_stream_that_has_ended_touch_nothing():
    receiver = Receiver()
    number = receiver.announce(5)
    receiver.bring(number, 5, 0)
    receiver.stream.reset("cancelled", "", RemoteError("cancelled", ""))
    before = bytes(receiver.memory[5])
    assert not receiver.bring(number, 5, 1)
    assert not receiver.bring(number, 5, 0, bytes(TOTAL))
    assert receiver.memory[5] == before


def test_a_sink_that_ends_the_stream_gets_nothing():
    receiver = Receiver()

    def refuse(tag: int, length: int) -> memoryview:
        receiver.stream.reset("cancelled", "", RemoteError("cancelled", ""))
        return memoryview(bytearray(length))

    receiver.stream.accept_payloads(refuse, WINDOW)
    number = receiver.announce(5)
    for index in range(4):
        receiver.bring(number, 5, index)
    assert receiver.confirmed() == []
    assert receiver.stream.take() is None


def test_credit_is_taken_once_and_given_back_when_the_payload_is_taken():
    receiver = Receiver()
    before = receiver.near.send_credit
    number = receiver.announce(5)
    assert receiver.near.send_credit == before - TOTAL - ITEM_COST
    for index in (0, 1, 2, 3, 0):
        receiver.bring(number, 5, index)
    receiver.stream.is_waiting()
    receiver.stream.take()
    receiver.stream.is_waiting()
    receiver.give_back()
    assert receiver.near.send_credit == before


def test_a_sender_that_is_finished_stays_until_all_is_confirmed():
    """Else it could not hear that nothing has to be sent again, and would give back the memory too early."""
    receiver = Receiver()
    numbers = [receiver.announce(5), receiver.announce(6)]
    receiver.near.finish()
    receiver.stream.finish()
    receiver.give_back()
    for number in numbers:
        assert receiver.near.remote_finished
        assert not receiver.near.is_closed
        assert receiver.sender.open_streams == 1
        for index in range(4):
            receiver.bring(number, 5 + number, index)
        receiver.give_back()
    assert receiver.near.is_closed
    assert receiver.sender.open_streams == receiver.streams.open_streams == 0


def test_a_sender_that_is_finished_can_still_give_up():
    receiver = Receiver()
    number = receiver.announce(5)
    receiver.bring(number, 5, 0)
    receiver.near.finish()
    receiver.stream.finish()
    receiver.give_back()
    receiver.near.reset("cancelled", "left", RemoteError("cancelled", ""))
    assert isinstance(receiver.stream.failure, RemoteError)
    assert not receiver.bring(number, 5, 1, bytes(TOTAL))


def test_the_end_comes_after_the_places_of_all_payloads():
    """Whatever waits to be taken: a reader would wait for ever for what has no place."""
    receiver = Receiver()
    number = receiver.announce(5)
    for index in range(4):
        receiver.bring(number, 5, index)
    receiver.bring(number + 1, 6, 0)
    with pytest.raises(ProtocolViolation, match="before a striped payload had its place"):
        receiver.near.finish()


def test_payloads_move_to_a_sink_that_comes_late():
    receiver = Receiver()
    receiver.stream.accept_payloads(None, WINDOW)
    receiver.give_back()
    numbers = [receiver.announce(tag) for tag in (5, 6)]
    for index in range(4):
        receiver.bring(numbers[0], 5, index)
    receiver.bring(numbers[1], 6, 2)
    receiver.bring(2, 7, 1)  # its place is not known yet
    receiver.stream.accept_payloads(receiver.place, WINDOW)
    assert receiver.announce(7) == 2
    for number in (1, 2):
        assert receiver.bring(number, 5 + number, 3 - number, bytes(TOTAL)) is False
        for index in range(4):
            receiver.bring(number, 5 + number, index)
    for tag in (5, 6, 7):
        item = receiver.stream.take()
        assert isinstance(item, Payload)
        assert item.tag == tag
        assert receiver.memory[tag] == DATA
        assert item.data.obj is receiver.memory[tag]


def test_a_late_sink_may_end_the_stream():
    receiver = Receiver()
    receiver.stream.accept_payloads(None, WINDOW)
    receiver.give_back()
    for number in range(2):
        receiver.bring(number, 5, 0)

    def refuse(tag: int, length: int) -> memoryview:
        receiver.stream.reset("cancelled", "", RemoteError("cancelled", ""))
        return memoryview(bytearray(length))

    receiver.stream.accept_payloads(refuse, WINDOW)
    assert receiver.stream.failure is not None
    assert not receiver.bring(0, 5, 1)


def test_nothing_is_striped_when_all_numbers_are_used():
    receiver = Receiver()
    receiver.near._striped_sent = 2**32 - 1
    assert receiver.near.may_stripe
    receiver.held = []
    assert receiver.announce(5) == 2**32 - 1
    assert not receiver.near.may_stripe


@pytest.mark.parametrize(
    ("piece", "reason"),
    [
        (Piece(9, 1, 0, 6, TOTAL, 0), "goes on with tag 6"),
        (Piece(9, 1, 0, 5, TOTAL + 1, 0), f"goes on with tag 5 and {TOTAL + 1} bytes"),
        (Piece(9, 1, 1, 6, 4 * WINDOW, 0), "which has credit for"),
        (Piece(9, 3, 0, 5, TOTAL, 0), "never opened"),
    ],
)
def test_pieces_that_no_honest_peer_sends(piece: Piece, reason: str):
    receiver = Receiver()
    receiver.announce(5)
    assert receiver.refuses(piece, reason)


def test_a_refused_payload_takes_no_credit():
    """Its pieces may come again, and with each another one would be refused."""
    receiver = Receiver()

    def refuse(tag: int, length: int) -> memoryview:
        raise ProtocolViolation("no such payload")

    receiver.stream.accept_payloads(refuse, WINDOW)
    before = receiver.stream._receive_credit
    number = receiver.announced_late(5)
    for index in range(4):
        assert receiver.refuses(
            Piece(9, receiver.near.id, number, 5, TOTAL, index * CHUNK_BYTES), "no such payload"
        )
    assert receiver.stream._receive_credit == before


def test_only_a_payload_that_was_begun_is_confirmed_and_only_once():
    receiver = Receiver()
    number = receiver.announce(5)
    for index in range(4):
        receiver.bring(number, 5, index)
    confirmation = FrameKind.RECEIVED, receiver.near.id, wire.encode_received(number)
    with pytest.raises(ProtocolViolation, match="no such payload"):
        receiver.sender.receive_frame(*confirmation[:2], wire.encode_received(number + 1))
    receiver.give_back()
    assert not receiver.near.unconfirmed
    with pytest.raises(ProtocolViolation, match="no such payload"):
        receiver.sender.receive_frame(*confirmation)


@pytest.mark.parametrize("end", ["reset", "failed"])
def test_a_confirmation_for_a_stream_that_was_left_is_late_at_most(end: str):
    receiver = Receiver()
    number = receiver.announce(5)
    for index in range(4):
        receiver.bring(number, 5, index)
    failure = RemoteError("cancelled", "")
    if end == "reset":
        receiver.near.reset("cancelled", "", failure)
    else:
        receiver.near.fail(failure)
    receiver.give_back()
    assert receiver.confirmed() == []
    assert receiver.near.failure is failure


def test_striped_payloads_of_a_stream_that_gave_no_window_are_a_violation():
    receiver = Receiver()
    other = receiver.sender.open("m", None, None, final=False)
    assert not other.may_stripe
    assert receiver.refuses(Piece(9, other.id, 0, 5, 1000, 0), "where there can be none")


def test_frames_of_striped_payloads_are_checked():
    receiver = Receiver()
    receiver.announce(5)
    for kind, body in (
        (FrameKind.STRIPED, b"short"),
        (FrameKind.STRIPED, (0).to_bytes(4) + bytes(8) + TOTAL.to_bytes(4)),  # that number has come
        (FrameKind.STRIPED, (1).to_bytes(4) + bytes(12)),  # of no bytes
        (FrameKind.RECEIVED, b"short"),
    ):
        with pytest.raises(ProtocolViolation):
            receiver.streams.receive_frame(kind, receiver.near.id, body)
    receiver.near.finish()
    with pytest.raises(ProtocolViolation, match="after its END"):
        receiver.streams.receive_frame(
            FrameKind.STRIPED, receiver.near.id, (1).to_bytes(4) + bytes(8) + TOTAL.to_bytes(4)
        )


def test_numbers_take_memory_only_out_of_order():
    numbers = Numbers()
    for number in (0, 1, 3, 2, 7):
        assert number not in numbers
        numbers.add(number)
        assert number in numbers
    assert numbers._all_below == 4
    assert numbers._beyond == {7}


def test_an_assembly_of_one_byte_has_one_piece():
    assembly = Assembly(1, memoryview(bytearray(1)))
    assert assembly.note_written(Piece(1, 1, 0, 1, 1, 0))


TOTALS = (1, CHUNK_BYTES, CHUNK_BYTES + 1, TOTAL)
EVENTS = st.one_of(
    st.tuples(
        st.just("piece"), st.integers(0, 3), st.integers(0, 1), st.sampled_from(TOTALS), st.integers(0, 3)
    ),
    st.tuples(st.just("striped"), st.integers(0, 3), st.integers(0, 1), st.sampled_from(TOTALS)),
    st.tuples(st.sampled_from(["take", "wait", "accept", "message", "END", "finish", "RESET", "leave"])),
)


class Attacked:
    """A stream to which a peer says whatever it likes. Each piece that it brings is all ones."""

    def __init__(self) -> None:
        self.receiver = Receiver()
        self.stream = self.receiver.stream
        self.given: list[bytearray] = []
        self.outstanding = 0
        self.acts: dict[str, Callable[..., None]] = {
            "piece": self.bring,
            "striped": lambda *rest: self.hear(FrameKind.STRIPED, wire.encode_striped(*rest)),
            "message": lambda: self.hear(FrameKind.MESSAGE, b"m"),
            "END": lambda: self.hear(FrameKind.END, b""),
            "RESET": lambda: self.hear(FrameKind.RESET, wire.encode_reset("left", "")),
            "take": self.take,
            "wait": self.stream.is_waiting,
            "accept": lambda: self.stream.accept_payloads(self.place, WINDOW),
            "finish": self.stream.finish,
            "leave": lambda: self.stream.reset("cancelled", "", RemoteError("cancelled", "")),
        }
        self.acts["accept"]()

    def place(self, tag: int, length: int) -> memoryview:
        self.given.append(bytearray(length))
        self.outstanding += length
        return memoryview(self.given[-1])

    def bring(self, number: int, tag: int, total: int, index: int) -> None:
        piece = Piece(9, 1, number, tag, total, index * CHUNK_BYTES)
        memory = self.receiver.streams.piece_memory(piece) if piece.offset < piece.total else None
        if self.receiver.violations:
            raise self.receiver.violations[0]
        if memory is not None:
            assert not any(memory), "a place was written twice"
            memory[:] = b"\1" * len(memory)
            self.receiver.streams.receive_piece(piece)

    def hear(self, kind: FrameKind, body: bytes) -> None:
        self.receiver.streams.receive_frame(kind, 1, body)

    def take(self) -> None:
        item = self.stream.take()
        if isinstance(item, Payload):
            assert all(item.data)
            self.outstanding -= len(item.data)


@settings(max_examples=100, deadline=None)
@given(st.lists(EVENTS, max_size=40))
def test_any_pieces_and_frames_in_any_order(events: list[tuple[str, *tuple[int, ...]]]):
    """They break the protocol at most: no place is written twice or after the end, the window bounds the memory, and
    what is taken is whole.
    """
    attacked = Attacked()
    stream, frozen = attacked.stream, None
    with contextlib.suppress(ProtocolViolation):
        for event, *rest in events:
            attacked.acts[event](*rest)
            assert attacked.outstanding <= WINDOW
            if stream.failure is not None:
                frozen = frozen or list(map(bytes, attacked.given))
                assert attacked.given == frozen
            elif stream.remote_finished:
                assert all(map(all, attacked.given))
    confirmed = attacked.receiver.confirmed()
    assert len(confirmed) == len(set(confirmed))


# ---- whole hosts ----

COUNT, SIZE = 20, 300_000


def test_a_lane_that_dies_in_the_middle_costs_nothing_but_time():
    """Connections of lanes are cut while they carry pieces; the streams live on their home."""

    async def main() -> None:
        swarm = Swarm()
        async with swarm:
            a, b = await swarm.pair(HostConfig(lanes_per_peer=4))
            swarm.network.set_bandwidth("a", "b", 1e6)
            got = bytearray(COUNT * SIZE)
            cuts = 0

            async def receive(stream: Stream) -> None:
                stream.accept_payloads(lambda tag, n: memoryview(got)[tag * SIZE : tag * SIZE + n], 4 * SIZE)
                await stream.send(Number(0))
                for index in range(COUNT):
                    assert (await stream.receive()).tag == index
                await stream.send(Number(1))

            async def cut_lanes() -> None:
                nonlocal cuts
                while True:
                    await asyncio.sleep(0.7)
                    connections = b._connections.to(a.peer_id)
                    assert connections is not None
                    lanes = [one for one in connections.all() if one.lane is Lane.STRIPE and one.is_open]
                    if lanes:
                        lanes[cuts % len(lanes)].abort("cut")
                        cuts += 1

            a.serve_stream(STREAM, receive)
            cutting = asyncio.ensure_future(cut_lanes())
            data = random.Random(3).randbytes(COUNT * SIZE)
            async with b.open_stream(a.peer_id, STREAM, lane=Lane.BULK) as stream:
                await stream.receive()
                await asyncio.sleep(0.5)  # the lanes are open
                for index in range(COUNT):
                    await stream.send_payload(index, memoryview(data)[index * SIZE : (index + 1) * SIZE])
                assert (await stream.receive()).value == 1
            cutting.cancel()
            assert cuts >= 3
            assert got == data

    run(main)


def test_memory_is_its_senders_again_when_the_stream_was_left():
    """The receiver had finished its own direction before; lanes are cut when the sender has left."""

    async def main() -> None:
        async with Swarm() as swarm:
            a, b = await swarm.pair(HostConfig(lanes_per_peer=4))
            swarm.network.set_bandwidth("a", "b", 1e6)
            got, done = bytearray(4 * SIZE), asyncio.Event()

            async def receive(stream: Stream) -> None:
                stream.accept_payloads(lambda tag, n: memoryview(got)[tag * SIZE : tag * SIZE + n], 4 * SIZE)
                await stream.send(Number(0))
                await stream.finish()
                for index in range(4):
                    assert (await stream.receive()).tag == index
                done.set()

            a.serve_stream(STREAM, receive)
            data = random.Random(3).randbytes(4 * SIZE)
            memory = bytearray(data)
            async with b.open_stream(a.peer_id, STREAM, lane=Lane.BULK) as stream:
                await stream.receive()
                await asyncio.sleep(0.5)  # the lanes are open
                for index in range(4):
                    await stream.send_payload(index, memoryview(memory)[index * SIZE : (index + 1) * SIZE])
            memory[:] = bytes(len(memory))
            connections = b._connections.to(a.peer_id)
            assert connections is not None
            for lane in connections.all():
                if lane.lane is Lane.STRIPE:
                    lane.abort("cut")
            await asyncio.wait_for(done.wait(), 30)
            assert got == data

    run(main)


def test_memory_is_let_go_of_when_a_stream_fails_and_nothing_else_is_sent():
    """The lanes are not looked at any more then."""

    async def main() -> None:
        async with Swarm() as swarm:
            a, b = await swarm.pair(HostConfig(lanes_per_peer=4))
            swarm.network.set_bandwidth("a", "b", 1e5)

            async def receive(stream: Stream) -> None:
                stream.accept_payloads(None, 4 * SIZE)
                await stream.send(Number(0))
                await stream.receive()

            a.serve_stream(STREAM, receive)
            memory = bytearray(SIZE)
            async with b.open_stream(a.peer_id, STREAM, lane=Lane.BULK) as stream:
                await stream.receive()
                await asyncio.sleep(0.5)  # the lanes are open
                await stream.send_payload(0, memory)
                assert not stream.is_delivered
                stream.reset()
            await asyncio.sleep(1.0)
            memory.append(0)  # BufferError while anything refers to it

    run(main)


def test_a_payload_that_is_too_long_is_refused_before_anything_is_said_of_it():
    async def main() -> None:
        async with Swarm() as swarm:
            a, b = await swarm.pair(HostConfig(lanes_per_peer=4))
            longest = DEFAULT_LIMITS.max_payload
            asked: list[int] = []

            def place(tag: int, length: int) -> memoryview:
                asked.append(tag)
                return memoryview(bytearray(length))

            async def receive(stream: Stream) -> None:
                stream.accept_payloads(place, 2 * longest)
                await stream.send(Number(0))
                await stream.receive()

            a.serve_stream(STREAM, receive)
            async with b.open_stream(a.peer_id, STREAM, lane=Lane.BULK) as stream:
                await stream.receive()
                await asyncio.sleep(0.5)  # the lanes are open
                with pytest.raises(InvalidValueError, match="longer than the limit"):
                    await stream.send_payload(1, bytes(longest + 1))
                await stream.send_payload(2, DATA)
            assert asked == [2]

    run(main)


def test_the_end_of_the_home_fails_the_stream():
    async def main() -> None:
        swarm = Swarm()
        async with swarm:
            a, b = await swarm.pair(HostConfig(lanes_per_peer=4))

            async def receive(stream: Stream) -> None:
                stream.accept_payloads(None, 4 * SIZE)
                await stream.send(Number(0))
                await asyncio.sleep(1000)

            a.serve_stream(STREAM, receive)

            async def send_for_ever() -> None:
                async with b.open_stream(a.peer_id, STREAM, lane=Lane.BULK) as stream:
                    await stream.receive()
                    connections = b._connections.to(a.peer_id)
                    assert connections is not None
                    asyncio.get_running_loop().call_later(1.0, connections.bulk()[0].abort, "aborted")
                    while True:
                        await stream.send_payload(1, bytes(SIZE))

            with pytest.raises(ConnectionLost, match="aborted"):
                await send_for_ever()

    run(main)


def test_a_stream_is_left_at_its_deadline_whatever_is_unconfirmed(monkeypatch: pytest.MonkeyPatch):
    async def main() -> None:
        async with Swarm() as swarm:
            a, b = await swarm.pair(HostConfig(lanes_per_peer=2))
            monkeypatch.setattr(Multiplexer, "receive_piece", lambda self, piece: None)

            async def receive(stream: Stream) -> None:
                stream.accept_payloads(None, WINDOW)
                await stream.send(Number(0))
                await stream.receive()

            a.serve_stream(STREAM, receive)
            loop = asyncio.get_running_loop()
            began = loop.time()
            async with b.open_stream(a.peer_id, STREAM, timeout=5, lane=Lane.BULK) as stream:
                await stream.receive()
                await asyncio.sleep(1.0)  # the lanes are open
                await stream.send_payload(0, DATA)
            assert loop.time() - began == pytest.approx(5.0)
            assert isinstance(stream.failure, DeadlineExceeded)

    run(main)


class Withheld:
    """Keeps back the confirmations of a stream's receiver."""

    def __init__(self, stream: Stream) -> None:
        self._state = stream._state
        self._send_frame = self._state._send_frame
        self.confirmations: list[bytes] = []
        self._state._send_frame = self._send

    def _send(self, kind: FrameKind, stream_id: int, body: bytes) -> None:
        if kind is FrameKind.RECEIVED:
            self.confirmations.append(body)
        else:
            self._send_frame(kind, stream_id, body)

    def confirm_one(self) -> None:
        self._send_frame(FrameKind.RECEIVED, self._state.id, self.confirmations.pop(0))

    def give_credit(self) -> None:
        self._send_frame(FrameKind.CREDIT, self._state.id, wire.encode_credit(1))


@pytest.mark.parametrize("confirms", [True, False], ids=["confirmations", "credit alone"])
def test_only_confirmations_keep_a_stream_that_was_left(confirms: bool):
    """Else credit now and then would hold the sender's memory for ever."""

    async def main() -> None:
        async with Swarm() as swarm:
            a, b = await swarm.pair(HostConfig(lanes_per_peer=2))
            pause = DELIVERY_TIMEOUT - 10

            async def receive(stream: Stream) -> None:
                withheld = Withheld(stream)
                stream.accept_payloads(None, 4 * SIZE)
                await stream.send(Number(0))
                for _ in range(3):
                    await stream.receive()
                for _ in range(3):
                    await asyncio.sleep(pause)
                    (withheld.confirm_one if confirms else withheld.give_credit)()
                with contextlib.suppress(EndOfStream):
                    await stream.receive()

            a.serve_stream(STREAM, receive)
            loop = asyncio.get_running_loop()
            async with b.open_stream(a.peer_id, STREAM, lane=Lane.BULK) as stream:
                await stream.receive()
                await asyncio.sleep(0.5)  # the lanes are open
                for index in range(3):
                    await stream.send_payload(index, bytes(SIZE))
                left_at = loop.time()
                await stream.delivered()
                waited, failure = loop.time() - left_at, stream.failure
            assert waited == pytest.approx(3 * pause if confirms else DELIVERY_TIMEOUT, abs=1)
            assert (failure is None) == confirms

    run(main)


def test_a_sink_that_refuses_a_piece_ends_the_home_and_no_lane():
    """The piece comes before the home has said where it belongs."""

    async def main() -> None:
        async with Swarm() as swarm:
            a, b = await swarm.pair(HostConfig(lanes_per_peer=4))
            asked: list[int] = []

            def refuse(tag: int, length: int) -> memoryview:
                asked.append(tag)
                raise ProtocolViolation("no such payload")

            async def receive(stream: Stream) -> None:
                stream.accept_payloads(refuse, 4 * SIZE)
                await stream.send(Number(0))
                await stream.receive()

            a.serve_stream(STREAM, receive)
            async with b.open_stream(a.peer_id, STREAM, lane=Lane.BULK) as stream:
                await stream.receive()
                await asyncio.sleep(0.5)  # the lanes are open
                connections = a._connections.to(b.peer_id)
                assert connections is not None
                (home,), lanes = connections.bulk(), [*connections.all()]
                send_frame, loop = stream._state._send_frame, asyncio.get_running_loop()
                stream._state._send_frame = lambda *frame: loop.call_later(1.0, send_frame, *frame)
                await stream.send_payload(5, bytes(SIZE))
                with pytest.raises(ConnectionLost, match="no such payload"):
                    await stream.receive()
            assert asked == [5]
            assert "no such payload" in str(home.close_reason)
            await asyncio.sleep(5.0)
            assert [lane for lane in lanes if not lane.is_open] == [home]

    run(main)


def test_a_confirmation_of_what_was_not_sent_ends_the_connection():
    """Else the sender would wait for ever: no piece of it is sent any more."""

    async def main() -> None:
        async with Swarm() as swarm:
            a, b = await swarm.pair(HostConfig(lanes_per_peer=2))
            swarm.network.set_bandwidth("a", "b", 1e5)

            async def receive(stream: Stream) -> None:
                stream.accept_payloads(None, 8 * SIZE)
                await stream.send(Number(0))
                await asyncio.sleep(3.0)
                stream._state._send_frame(FrameKind.RECEIVED, stream._state.id, wire.encode_received(0))
                await stream.receive()

            a.serve_stream(STREAM, receive)
            async with b.open_stream(a.peer_id, STREAM, lane=Lane.BULK) as stream:
                await stream.receive()
                await asyncio.sleep(0.5)  # the lanes are open
                with pytest.raises(ProtocolViolation, match=f"of {8 * SIZE - 100} bytes were sent"):
                    await stream.send_payload(0, bytes(8 * SIZE - 100))

    run(main)


def test_a_piece_that_names_the_stream_of_another_peer_is_thrown_away():
    async def main() -> None:
        async with Swarm() as swarm:
            a, b = await swarm.pair(HostConfig(lanes_per_peer=2))
            c = await swarm.host("c")
            c.add_addresses(a.peer_id, a.listen_addresses)
            memory = bytearray(TOTAL)
            asked: list[int] = []

            def place(tag: int, length: int) -> memoryview:
                asked.append(tag)
                return memoryview(memory)[:length]

            async def receive(stream: Stream) -> None:
                stream.accept_payloads(place, WINDOW)
                await stream.send(Number(0))
                await stream.receive()
                await stream.send(Number(1))

            a.serve_stream(STREAM, receive)
            async with (
                b.open_stream(a.peer_id, STREAM, lane=Lane.BULK) as honest,
                c.open_stream(a.peer_id, STREAM, lane=Lane.BULK) as other,
            ):
                await honest.receive()
                await other.receive()
                homes, lies = b._connections.to(a.peer_id), c._connections.to(a.peer_id)
                assert homes is not None
                assert lies is not None
                forged = Piece(homes.bulk()[0].channel_id, 1, 0, 5, TOTAL, 0)
                lies.bulk()[0].writer.send_piece(forged, memoryview(bytes(CHUNK_BYTES)))
                await asyncio.sleep(1.0)
                assert asked == []
                await honest.send_payload(5, DATA)
                assert (await honest.receive()).value == 1
                assert memory == DATA
                await other.send_payload(5, b"x")  # its connection stands
                assert (await other.receive()).value == 1

    run(main)
