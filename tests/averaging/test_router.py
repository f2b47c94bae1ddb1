"""Streams of one method find the averager that they are for."""

from __future__ import annotations

import random

import msgspec
import pytest

from shoal.averaging.codes import AveragingCode
from shoal.averaging.router import Router
from shoal.errors import InvalidValueError, ProtocolViolation, RemoteError
from shoal.p2p.host import Host
from shoal.p2p.rpc import Method, Stream
from shoal.testing.clock import run
from shoal.testing.network import SimulatedNetwork
from shoal.testing.peers import make_host


class Hello(msgspec.Struct, tag=True):
    prefix: str


class Anonymous(msgspec.Struct, tag=True):
    text: str


class Reply(msgspec.Struct):
    text: str


GREET: Method[Hello | Anonymous, Reply] = Method("greet", Hello | Anonymous, Reply)  # type: ignore[arg-type]


def answer(text: str):
    async def handler(stream: Stream, first: Hello) -> None:
        await stream.send(Reply(f"{text} to {first.prefix}"))

    return handler


async def greet(host: Host, to: Host, message: object) -> str:
    host.add_addresses(to.peer_id, to.listen_addresses)
    async with host.open_stream(to.peer_id, GREET, timeout=10) as stream:
        await stream.send(message)
        return (await stream.receive()).text


def on_two_hosts(story):
    async def main() -> None:
        network = SimulatedNetwork(random.Random(0))
        near, far = await make_host(network, "near"), await make_host(network, "far")
        try:
            await story(near, far)
        finally:
            await near.close()
            await far.close()

    run(main)


def test_each_prefix_has_its_handler():
    async def story(near: Host, far: Host) -> None:
        router = Router.of(far)
        assert Router.of(far) is router
        assert Router.of(near) is not router
        router.register(GREET, "a", answer("hello"))
        router.register(GREET, "b", answer("goodbye"))
        assert await greet(near, far, Hello("a")) == "hello to a"
        assert await greet(near, far, Hello("b")) == "goodbye to b"
        with pytest.raises(RemoteError, match="prefix 'c'") as caught:
            await greet(near, far, Hello("c"))
        assert caught.value.code == AveragingCode.UNKNOWN_PREFIX

    on_two_hosts(story)


def test_a_prefix_is_registered_once_at_a_time():
    async def story(near: Host, far: Host) -> None:
        router = Router.of(far)
        router.register(GREET, "a", answer("first"))
        with pytest.raises(InvalidValueError, match=r"prefix must be one that no .*, got 'a'"):
            router.register(GREET, "a", answer("second"))
        router.unregister(GREET, "a")
        router.unregister(GREET, "a")
        with pytest.raises(RemoteError):
            await greet(near, far, Hello("a"))
        router.register(GREET, "a", answer("third"))
        assert await greet(near, far, Hello("a")) == "third to a"

    on_two_hosts(story)


def test_a_first_message_without_a_prefix_is_refused():
    async def story(near: Host, far: Host) -> None:
        Router.of(far).register(GREET, "a", answer("hello"))
        with pytest.raises((RemoteError, ProtocolViolation), match="names no prefix"):
            await greet(near, far, Anonymous("hi"))

    on_two_hosts(story)
