"""Frames and descriptors over a socket pair, in any split and under back-pressure."""

from __future__ import annotations

import os
import socket

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shoal.runtime.channel import Channel, Frame, Kind


class Pair:
    """Two ends, and whether each wants to write."""

    def __init__(self) -> None:
        left, right = socket.socketpair()
        self.wants = {"left": False, "right": False}
        self.left = Channel(left, lambda wanted: self.wants.__setitem__("left", wanted))
        self.right = Channel(right, lambda wanted: self.wants.__setitem__("right", wanted))

    def close(self) -> None:
        self.left.close()
        self.right.close()


@pytest.fixture
def pair():
    made = Pair()
    yield made
    made.close()


def receive(channel: Channel, count: int) -> list[Frame]:
    frames: list[Frame] = []
    while len(frames) < count:
        frames += channel.receive()
    return frames


def test_frames_arrive_in_order_with_their_fields(pair):
    pair.left.send(Kind.CALL, call=7, service=3, body=b"command")
    pair.left.send(Kind.CANCEL, call=7)
    assert receive(pair.right, 2) == [
        Frame(Kind.CALL, 7, 3, b"command", ()),
        Frame(Kind.CANCEL, 7, 0, b"", ()),
    ]
    assert pair.right.receive() == []


@settings(max_examples=40, deadline=None)
@given(bodies=st.lists(st.binary(max_size=300), min_size=1, max_size=8), piece=st.integers(1, 97))
def test_frames_survive_any_split_of_the_stream(bodies, piece):
    source, sink = Pair(), Pair()
    try:
        for number, body in enumerate(bodies):
            source.left.send(Kind.CALL, call=number, body=body)
        raw = b""
        while len(raw) < sum(map(len, bodies)) + 22 * len(bodies):
            raw += source.right._socket.recv(65536)
        frames: list[Frame] = []
        for start in range(0, len(raw), piece):
            sink.left._socket.send(raw[start : start + piece])
            frames += sink.right.receive()
        assert [frame.body for frame in frames] == bodies
    finally:
        source.close()
        sink.close()


def test_more_than_the_socket_holds_is_queued_and_sent_later(pair):
    bodies = [bytes([index]) * 100_000 for index in range(30)]
    for body in bodies:
        pair.left.send(Kind.LOG, body=body)
    assert pair.wants["left"]
    assert pair.left.unsent_bytes > 0
    received: list[Frame] = []
    while len(received) < len(bodies):
        received += pair.right.receive()
        pair.left.flush()
    assert [frame.body for frame in received] == bodies
    assert not pair.wants["left"]
    assert pair.left.unsent_bytes == 0


@pytest.mark.parametrize("filler", [0, 3_000_000], ids=["at once", "behind a queue"])
def test_descriptors_arrive_with_their_frame(pair, filler):
    reader, writer = os.pipe()
    pair.left.send(Kind.LOG, body=bytes(filler))
    pair.left.send(Kind.CALL, call=1, body=b"x" * 1000, descriptors=[writer])
    os.close(writer)  # the sender may close it at once
    frames: list[Frame] = []
    while len(frames) < 2:
        frames += pair.right.receive()
        pair.left.flush()
    (received,) = frames[1].descriptors
    assert not os.get_inheritable(received)
    os.write(received, b"through")
    os.close(received)
    assert os.read(reader, 100) == b"through"
    assert os.read(reader, 100) == b""  # no copy of the writing end is left anywhere
    os.close(reader)


def test_the_end_of_the_other_side_is_noticed(pair):
    pair.left.send(Kind.READY)
    pair.left.close()
    pair.left.close()
    assert len(pair.right.receive()) == 1
    with pytest.raises(EOFError):
        pair.right.receive()
    with pytest.raises(BrokenPipeError):
        pair.right.send(Kind.READY)
    with pytest.raises(BrokenPipeError):
        pair.left.send(Kind.READY)


def test_closing_closes_descriptors_that_nobody_took(pair):
    reader, writer = os.pipe()
    pair.left.send(Kind.LOG, body=bytes(3_000_000))
    pair.left.send(Kind.CALL, descriptors=[writer])
    os.close(writer)
    pair.left.close()
    pair.right.close()
    assert os.read(reader, 1) == b""
    os.close(reader)
