"""A connection against a peer that speaks the encrypted protocol, but sends any frames that it likes."""

from __future__ import annotations

import asyncio
import math
import os

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shoal.errors import ProtocolViolation
from shoal.p2p.calls import Served
from shoal.p2p.config import HostConfig
from shoal.p2p.connection import Connection
from shoal.p2p.pacing import ReadingTurns
from shoal.p2p.protocol import wire
from shoal.p2p.protocol.frames import FrameKind
from shoal.p2p.protocol.session import FrameReceived, Role, Session
from shoal.p2p.rpc import Lane, Method
from shoal.p2p.turns import SendingTurns
from shoal.testing import clock
from shoal.testing.peers import make_identity

HELLO = wire.encode(wire.Hello(lane=0, agent="x", is_client=True, addresses=[], clock=0.0))


class Owner:
    """A host that serves nothing."""

    def __init__(self, config=HostConfig()):
        self.identity = make_identity("owner")
        self.config = config
        self.upload_turns, self.download_turns = SendingTurns(None), ReadingTurns(None)
        self.closed = []
        self.confirmed = []

    def bundle_of(self, connection):
        return self

    def receive_confirmation(self, home, stream_id, number):
        self.confirmed.append((home, stream_id, number))

    def home_of(self, connection, piece):
        return connection.streams if piece.home == connection.channel_id else None

    def make_hello(self, connection):
        return wire.Hello(lane=int(connection.lane), agent="o", is_client=False, addresses=[], clock=0.0)

    def find_served(self, name):
        return None

    def connection_made(self, connection):
        return None

    def contest(self, connection):
        return None

    def connection_opened(self, connection):
        return None

    def connection_ended(self, connection):
        pass

    def peer_left(self, connection):
        pass

    def ask_others(self, connection):
        pass

    def connection_closed(self, connection):
        self.closed.append(connection)

    def seen_elsewhere(self, connection):
        return -math.inf

    def may_close_idle(self, connection):
        return False


class Wire(asyncio.Transport):
    """A transport that keeps what was written, and takes as much as it is told to."""

    def __init__(self):
        super().__init__()
        self.written = bytearray()
        self.protocol = None
        self.closing = False

    def set_write_buffer_limits(self, high=None, low=None):
        pass

    def get_write_buffer_size(self):
        return 0

    def writelines(self, pieces):
        for piece in pieces:
            self.written += piece

    def is_closing(self):
        return self.closing

    def close(self):
        if not self.closing:
            self.closing = True
            asyncio.get_running_loop().call_soon(self.protocol.connection_lost, None)

    abort = close


class Stranger:
    """The other side: a bare session."""

    def __init__(self, owner):
        self.connection = Connection(owner, Role.RESPONDER)
        self.transport = Wire()
        self.transport.protocol = self.connection
        self.session = Session(Role.INITIATOR, make_identity("stranger"), os.urandom(32))
        self.received = []
        self.session.start()
        self.connection.connection_made(self.transport)
        for _ in range(3):
            self.exchange()

    def exchange(self):
        """Move all bytes that either side has for the other."""
        incoming = bytes(self.transport.written)
        self.transport.written.clear()
        while incoming:
            room = self.session.get_buffer(-1)
            count = min(len(room), len(incoming))
            room[:count] = incoming[:count]
            incoming = incoming[count:]
            self.received += list(self.session.buffer_updated(count))
        self.give(b"".join(self.session.data_to_send()))

    def give(self, outgoing):
        while outgoing and not self.transport.closing:
            room = memoryview(self.connection.get_buffer(-1))
            count = min(len(room), len(outgoing))
            room[:count] = outgoing[:count]
            outgoing = outgoing[count:]
            self.connection.buffer_updated(count)

    def send(self, kind, stream_id, body):
        if kind is FrameKind.PAYLOAD:
            self.session.send_payload(stream_id, 0, body)
        else:
            self.session.send_frame(kind, stream_id, body)
        self.exchange()

    def frames(self, kind):
        return [
            event.body for event in self.received if isinstance(event, FrameReceived) and event.kind is kind
        ]


def with_stranger(check, config=HostConfig()):
    async def main():
        owner = Owner(config)
        stranger = Stranger(owner)
        rest = check(stranger)
        if rest is not None:
            await rest
        stranger.connection.abort("the test is over")
        await stranger.connection.closed
        assert owner.closed == [stranger.connection]

    clock.run(main)


def test_hello_comes_first():
    def check(stranger):
        stranger.send(FrameKind.OPEN, 1, wire.encode_open("m", None, True, b"\x01"))
        assert "OPEN before HELLO" in stranger.connection.close_reason
        stranger.exchange()
        (goodbye,) = stranger.frames(FrameKind.GOODBYE)
        assert "OPEN before HELLO" in wire.decode_goodbye(goodbye).reason

    with_stranger(check)


def test_a_dialer_is_answered_only_after_its_hello():
    def check(stranger):
        assert not stranger.frames(FrameKind.HELLO)
        stranger.send(FrameKind.HELLO, 0, HELLO)
        stranger.exchange()
        assert stranger.frames(FrameKind.HELLO)
        assert stranger.connection.is_open
        stranger.send(FrameKind.HELLO, 0, HELLO)
        assert "second HELLO" in stranger.connection.close_reason

    with_stranger(check)


def test_pings_are_answered_and_lanes_must_be_known():
    def check(stranger):
        stranger.send(FrameKind.HELLO, 0, HELLO)
        stranger.send(FrameKind.PING, 0, b"12345678")
        stranger.exchange()
        assert stranger.frames(FrameKind.PONG) == [b"12345678"]
        assert stranger.connection.lane is Lane.CONTROL

    with_stranger(check)

    def check_lane(stranger):
        stranger.send(FrameKind.HELLO, 0, wire.encode(wire.Hello(77, "x", True, [], 0.0)))
        assert "unknown kind of lane: 77" in stranger.connection.close_reason

    with_stranger(check_lane)


@pytest.mark.parametrize("lane", [Lane.PROBE, Lane.STRIPE])
def test_lanes_for_probes_and_pieces_carry_no_streams(lane: Lane):
    def check(stranger):
        stranger.send(FrameKind.HELLO, 0, wire.encode(wire.Hello(int(lane), "x", True, [], 0.0)))
        assert stranger.connection.is_open
        stranger.send(FrameKind.OPEN, 1, wire.encode_open("m", None, True, b"\x01"))
        assert "OPEN on a lane that carries no streams" in stranger.connection.close_reason

    with_stranger(check)


def test_a_peer_that_asks_but_does_not_read_is_cut():
    def check(stranger):
        stranger.send(FrameKind.HELLO, 0, HELLO)
        stranger.connection.pause_writing()
        for _ in range(5000):
            stranger.session.send_frame(FrameKind.PING, 0, b"12345678")
        stranger.give(b"".join(stranger.session.data_to_send()))
        assert "does not read" in stranger.connection.close_reason

    with_stranger(check)


def test_credit_without_reading_takes_no_memory():
    """A sender that waits for the socket is woken by each CREDIT, and must not leave anything behind."""

    def check(stranger):
        stranger.send(FrameKind.HELLO, 0, HELLO)
        connection = stranger.connection
        connection.pause_writing()

        async def flood():
            stream, _ = connection.calls.open_stream(Method("m", int, int), None)
            sending = asyncio.ensure_future(stream.send(1))
            for _ in range(200):
                await asyncio.sleep(0.001)
                stranger.session.send_frame(FrameKind.CREDIT, 2, wire.encode_credit(1))
                stranger.give(b"".join(stranger.session.data_to_send()))
            assert not sending.done()
            assert len(connection.writer._write_waiters) <= 2
            sending.cancel()
            await asyncio.wait([sending])
            assert not connection.writer._write_waiters

        return flood()

    with_stranger(check)


def test_answers_for_a_peer_that_does_not_read_are_not_encoded_ahead(monkeypatch):
    """Hundreds of calls may wait for the socket; each encoded answer may be close to 1 MiB."""
    encoded = []
    encode = wire.encode
    monkeypatch.setattr(wire, "encode", lambda message: encoded.append(message) or encode(message))

    class Answer(msgspec.Struct):
        value: int

    async def answer(peer, request):
        return Answer(request.value)

    served = Served(Method("m", Answer, Answer), unary=answer)

    def check(stranger):
        stranger.connection.calls._find_served = lambda name: served
        stranger.send(FrameKind.HELLO, 0, HELLO)
        stranger.connection.pause_writing()
        for number in range(50):
            body = wire.encode_open("m", None, True, encode(Answer(number)))
            stranger.session.send_frame(FrameKind.OPEN, 2 * number + 1, body)
        stranger.give(b"".join(stranger.session.data_to_send()))
        encoded.clear()

        async def read_again():
            await asyncio.sleep(1)
            assert not encoded
            stranger.connection.resume_writing()
            await asyncio.sleep(1)
            assert len(encoded) == 50

        return read_again()

    with_stranger(check)


BODIES = st.one_of(
    st.binary(max_size=40),
    st.just(HELLO),
    st.just(b"12345678"),
    st.builds(
        wire.encode_open,
        st.text(max_size=5),
        st.none() | st.floats(),
        st.booleans(),
        st.none() | st.just(b"\x01"),
    ),
    st.builds(wire.encode_reset, st.text(max_size=5), st.text(max_size=5)),
    st.builds(wire.encode_credit, st.integers(0, 2**64 - 1)),
    st.builds(wire.encode_goodbye, st.builds(wire.Refusal, st.text(max_size=5))),
)
CONNECTION_FRAMES = st.sampled_from([FrameKind.HELLO, FrameKind.PING, FrameKind.PONG, FrameKind.GOODBYE])
STREAM_FRAMES = st.sampled_from(
    [FrameKind.OPEN, FrameKind.MESSAGE, FrameKind.END, FrameKind.RESET, FrameKind.CREDIT, FrameKind.PAYLOAD]
)
FRAMES = st.tuples(STREAM_FRAMES, st.integers(1, 9), BODIES) | st.tuples(
    CONNECTION_FRAMES, st.just(0), BODIES
)


@settings(max_examples=150, deadline=None)
@given(st.booleans(), st.lists(FRAMES, max_size=30))
def test_any_frames_close_the_connection_at_most(says_hello, frames):
    def check(stranger):
        if says_hello:
            stranger.send(FrameKind.HELLO, 0, HELLO)
        for kind, stream_id, body in frames:
            if stranger.transport.closing:
                break
            if kind is not FrameKind.OPEN or stream_id % 2:
                stranger.send(kind, stream_id, body)
        if stranger.connection.close_reason is not None:
            stranger.exchange()
            reason = stranger.connection.close_reason
            if "the peer said goodbye" not in reason:
                told = wire.decode_goodbye(stranger.frames(FrameKind.GOODBYE)[0]).reason
                assert told.removeprefix("protocol violation: ") == reason.removeprefix(
                    "broke the protocol: "
                )

    with_stranger(check)


FORGED = "done\n2026-11-23 12:00:00 [ERROR] [shoal] all keys are lost\x1b[2J\u202e"


def test_no_text_of_a_peer_forges_lines_of_a_log():
    def check(stranger):
        stranger.send(FrameKind.HELLO, 0, wire.encode(wire.Hello(0, "a\nb\x1b[2J", True, [], 0.0)))
        assert stranger.connection.hello.agent == "a\\nb\\x1b[2J"
        method = Method("m", msgspec.Struct, msgspec.Struct)
        _, state = stranger.connection.calls.open_stream(method, None)
        stranger.send(FrameKind.RESET, state.id, wire.encode_reset("x\ny", FORGED))
        stranger.send(FrameKind.GOODBYE, 0, wire.encode_goodbye(wire.Refusal(FORGED)))
        for text in (str(state.failure), stranger.connection.close_reason):
            assert "all keys are lost" in text
            assert text.isprintable()

    with_stranger(check)


class Tagged(msgspec.Struct, tag="a"):
    pass


class OtherTag(msgspec.Struct, tag="b"):
    pass


def test_what_does_not_decode_is_not_quoted_as_it_came():
    with pytest.raises(ProtocolViolation, match="all keys are lost") as caught:
        wire.decode(msgspec.msgpack.encode({"type": FORGED}), Tagged | OtherTag, "request")
    assert str(caught.value).isprintable()
