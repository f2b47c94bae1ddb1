"""What every network must let hosts do: one suite that the real and the simulated network both pass.

Derive a test class from :class:`HostConformance` and give it a ``world`` fixture that returns a :class:`World`.
"""

from __future__ import annotations

import asyncio
import functools
import itertools
from collections.abc import Awaitable, Callable
from typing import Any, Protocol, TypeVar

import msgspec

from shoal.errors import (
    ConnectionLost,
    DeadlineExceeded,
    DialOutcome,
    InvalidStateError,
    InvalidValueError,
    PeerUnreachable,
    ProtocolViolation,
    RemoteError,
)
from shoal.p2p.config import INITIAL_WINDOW, HostConfig
from shoal.p2p.host import Host
from shoal.p2p.identity import PeerID
from shoal.p2p.protocol.violations import Ending
from shoal.p2p.rpc import EndOfStream, Lane, Method, Payload, Stream

__all__ = ["HostConformance", "Number", "Text", "World"]

ErrorT = TypeVar("ErrorT", bound=BaseException)


class World(Protocol):
    """Makes hosts that can reach each other, and ends them."""

    def run(self, main: Callable[[], Awaitable[None]]) -> None:
        """Run ``main`` on an event loop of this world, then close the hosts that were made."""

    async def host(self, name: str, config: HostConfig = HostConfig()) -> Host:
        """A started host; it listens unless it is in client mode."""

    async def kill(self, name: str) -> None:
        """End a host as the death of its process would: without a word."""


class Number(msgspec.Struct):
    """A message."""

    value: int


class Text(msgspec.Struct):
    """Another message, which no Number decodes to."""

    text: str


ECHO = Method("test.echo", Number, Number)
STREAM = Method("test.stream", Number, Number)


def on_world(check: Callable[[Any, World], Awaitable[None]]) -> Callable[[Any, World], None]:
    """Make a test method of a coroutine function."""

    @functools.wraps(check)
    def test(self: Any, world: World) -> None:
        world.run(lambda: asyncio.wait_for(check(self, world), 60))

    del test.__wrapped__  # or pytest would look at the parameters of ``check``
    return test


async def failure_of(awaitable: Awaitable[Any], kind: type[ErrorT]) -> ErrorT:
    """The error of ``kind`` that ``awaitable`` must raise."""
    try:
        result = await awaitable
    except kind as error:
        return error
    raise AssertionError(f"expected {kind.__name__}, got {result!r}")


async def pair(world: World, config: HostConfig = HostConfig()) -> tuple[Host, Host]:
    """A server that listens, and a client that is connected to it."""
    server, client = await world.host("server", config), await world.host("client", config)
    client.add_addresses(server.peer_id, server.listen_addresses)
    await client.connect(server.peer_id, timeout=10)
    return server, client


async def double(peer: PeerID, request: Number) -> Number:
    """A handler."""
    return Number(request.value * 2)


class _Handler:
    """A handler that waits until it is cancelled, and tells about it."""

    def __init__(self) -> None:
        self.started = asyncio.Event()
        self.cancelled = asyncio.Event()

    async def __call__(self, *args: Any) -> Any:
        self.started.set()
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            self.cancelled.set()
            raise
        raise AssertionError


class HostConformance:
    """Every test runs on a fresh world."""

    @on_world
    async def test_calls(self, world: World) -> None:
        server, client = await pair(world)
        server.serve(ECHO, double)
        assert (await client.call(server.peer_id, ECHO, Number(21), timeout=10)).value == 42
        answers = await asyncio.gather(
            *(client.call(server.peer_id, ECHO, Number(n), timeout=10) for n in range(100))
        )
        assert [answer.value for answer in answers] == [2 * n for n in range(100)]
        assert client.rtt(server.peer_id) is not None

    @on_world
    async def test_failures_of_handlers_arrive_with_their_codes(self, world: World) -> None:
        server, client = await pair(world)
        error: Exception = RemoteError("full", "no room")

        async def fail(peer: PeerID, request: Number) -> Number:
            raise error

        call = functools.partial(client.call, server.peer_id, ECHO, Number(1), timeout=10)
        assert (await failure_of(call(), RemoteError)).code == "unknown_method"
        server.serve(ECHO, fail)
        refused = await failure_of(call(), RemoteError)
        assert (refused.code, refused.message) == ("full", "no room")
        error = DeadlineExceeded("too slow")
        failed = await failure_of(call(), RemoteError)
        assert (failed.code, failed.message) == ("failed", "too slow")
        error = KeyError("secret")
        internal = await failure_of(call(), RemoteError)
        assert internal.code == "internal"
        assert "secret" not in internal.message
        server.stop_serving(ECHO)
        assert (await failure_of(call(), RemoteError)).code == "unknown_method"
        assert client.is_connected(server.peer_id)

    @on_world
    async def test_streams_in_all_directions(self, world: World) -> None:
        server, client = await pair(world)

        async def total(stream: Stream) -> None:
            await stream.send(Number(sum([message.value async for message in stream])))

        async def count(stream: Stream) -> None:
            for value in range((await stream.receive()).value):
                await stream.send(Number(value))

        async def echo(stream: Stream) -> None:
            async for message in stream:
                await stream.send(message)

        for number, handler in enumerate((total, count, echo)):
            method = Method(f"test.{number}", Number, Number)
            server.serve_stream(method, handler)
        async with client.open_stream(server.peer_id, Method("test.0", Number, Number), timeout=10) as stream:
            for value in range(100):
                await stream.send(Number(value))
            await stream.finish()
            assert (await stream.receive()).value == 4950
            await failure_of(stream.receive(), EndOfStream)
            await failure_of(stream.send(Number(1)), InvalidStateError)
        async with client.open_stream(server.peer_id, Method("test.1", Number, Number), timeout=10) as stream:
            await stream.send(Number(50))
            assert [message.value async for message in stream] == list(range(50))
        async with client.open_stream(server.peer_id, Method("test.2", Number, Number), timeout=10) as stream:
            for value in range(20):
                await stream.send(Number(value))
                assert (await stream.receive()).value == value

    @on_world
    async def test_deadlines_end_both_sides(self, world: World) -> None:
        server, client = await pair(world)
        for method, serve in ((ECHO, server.serve), (STREAM, server.serve_stream)):
            handler = _Handler()
            serve(method, handler)
            if method is ECHO:
                await failure_of(client.call(server.peer_id, ECHO, Number(1), timeout=0.2), DeadlineExceeded)
            else:
                async with client.open_stream(server.peer_id, STREAM, timeout=0.2) as stream:
                    await failure_of(stream.receive(), DeadlineExceeded)
            await handler.cancelled.wait()
        assert client.is_connected(server.peer_id)

    @on_world
    async def test_cancelling_the_caller_cancels_the_handler(self, world: World) -> None:
        server, client = await pair(world)
        handler = _Handler()
        server.serve(ECHO, handler)
        call = asyncio.ensure_future(client.call(server.peer_id, ECHO, Number(1), timeout=30))
        await handler.started.wait()
        call.cancel()
        await failure_of(call, asyncio.CancelledError)
        # Well before the deadline, which would cancel it too.
        await asyncio.wait_for(handler.cancelled.wait(), 10)

        in_stream = _Handler()
        server.serve_stream(STREAM, in_stream)
        try:
            async with client.open_stream(server.peer_id, STREAM) as stream:
                await stream.send(Number(1))
                await in_stream.started.wait()
                raise KeyError
        except KeyError:
            await in_stream.cancelled.wait()

    @on_world
    async def test_a_handler_that_ends_stops_its_sender(self, world: World) -> None:
        server, client = await pair(world)

        async def take_one(stream: Stream) -> None:
            await stream.receive()

        server.serve_stream(STREAM, take_one)

        async def send_for_ever(stream: Stream) -> None:
            while True:
                await stream.send(Number(1))
                await asyncio.sleep(0)

        async with client.open_stream(server.peer_id, STREAM, timeout=30) as stream:
            assert (await failure_of(send_for_ever(stream), RemoteError)).code == "finished"
            await failure_of(stream.receive(), EndOfStream)

    @on_world
    async def test_a_slow_reader_holds_back_its_own_sender_alone(self, world: World) -> None:
        server, client = await pair(world)
        texts = Method("test.texts", Text, Number)
        may_read = asyncio.Event()

        async def read_late(stream: Stream) -> None:
            await may_read.wait()
            await stream.send(Number(len([message async for message in stream])))

        server.serve_stream(texts, read_late)
        server.serve(ECHO, double)
        piece = Text("x" * 10_000)
        sent = 0

        async def send_much(stream: Stream) -> None:
            nonlocal sent
            for _ in range(200):
                await stream.send(piece)
                sent += 1
            await stream.finish()

        async with client.open_stream(server.peer_id, texts, timeout=30) as stream:
            sending = asyncio.ensure_future(send_much(stream))
            for n in range(50):
                assert (await client.call(server.peer_id, ECHO, Number(n), timeout=10)).value == 2 * n
            assert 20 <= sent <= INITIAL_WINDOW // 10_000 + 1
            may_read.set()
            await sending
            assert (await stream.receive()).value == 200

    @on_world
    async def test_payloads_arrive_in_the_memory_given_for_them(self, world: World) -> None:
        server, client = await pair(world)
        memory = bytearray(5_000_000)
        tags: list[int] = []

        def place(tag: int, length: int) -> memoryview:
            tags.append(tag)
            return memoryview(memory)[tag : tag + length]

        async def receive(stream: Stream) -> None:
            await stream.receive()
            stream.accept_payloads(place, 3_000_000)
            received = [item.data.nbytes async for item in stream]
            await stream.send(Number(sum(received)))

        server.serve_stream(STREAM, receive)
        data = bytes(range(251)) * 20_000
        cuts = [0, 1000, 1000, 2_000_000, 4_900_000, 5_000_000]
        async with client.open_stream(server.peer_id, STREAM, timeout=30, lane=Lane.BULK) as stream:
            await stream.send(Number(1))
            # The first ones may arrive before the receiver has said where they belong.
            for begin, end in itertools.pairwise(cuts):
                await stream.send_payload(begin, memoryview(data)[begin:end])
            await stream.finish()
            assert (await stream.receive()).value == 5_000_000
        assert memory == data[:5_000_000]
        assert tags == cuts[:-1]

    @on_world
    async def test_payloads_without_a_sink_get_memory_of_their_own(self, world: World) -> None:
        server, client = await pair(world)

        async def answer(stream: Stream) -> None:
            stream.accept_payloads(None, 1_000_000)
            payload = await stream.receive()
            assert isinstance(payload, Payload)
            await stream.send_payload(payload.tag + 1, bytes(payload.data[:100_000]))

        server.serve_stream(STREAM, answer)
        async with client.open_stream(server.peer_id, STREAM, timeout=30) as stream:
            await stream.send_payload(2**64 - 2, b"z" * 900_000)
            payload = await stream.receive()
            assert payload.tag == 2**64 - 1
            assert bytes(payload.data) == b"z" * 100_000

    @on_world
    async def test_a_refused_payload_ends_the_connection(self, world: World) -> None:
        server, client = await pair(world)

        def refuse(tag: int, length: int) -> memoryview:
            raise ProtocolViolation(f"tag {tag} is not expected")

        async def receive(stream: Stream) -> None:
            stream.accept_payloads(refuse, 1_000_000)
            await stream.send(Number(0))
            await stream.receive()

        lost = _lost(client)
        server.serve_stream(STREAM, receive)
        async with client.open_stream(server.peer_id, STREAM, timeout=30) as stream:
            await stream.receive()
            await stream.send_payload(77, b"data")
            error = await failure_of(stream.receive(), ConnectionLost)
            assert "tag 77 is not expected" in str(error)
        assert "tag 77" in (await lost)[1].reason

    @on_world
    async def test_a_body_that_does_not_decode_ends_the_connection(self, world: World) -> None:
        server, client = await pair(world)
        server.serve(ECHO, double)
        lost = _lost(server)
        wrong = Method(ECHO.name, Text, Text)
        error = await failure_of(client.call(server.peer_id, wrong, Text("?"), timeout=10), ConnectionLost)
        assert "does not decode" in str(error)
        assert (await lost)[0] == client.peer_id
        misread = Method(ECHO.name, Number, Text)
        await failure_of(client.call(server.peer_id, misread, Number(1), timeout=10), ProtocolViolation)
        assert (await client.call(server.peer_id, ECHO, Number(1), timeout=10)).value == 2

    @on_world
    async def test_more_streams_than_allowed_are_refused(self, world: World) -> None:
        server, client = await pair(world, HostConfig(max_inbound_streams=3))
        handler = _Handler()
        server.serve(ECHO, handler)
        calls = [
            asyncio.ensure_future(client.call(server.peer_id, ECHO, Number(n), timeout=30)) for n in range(3)
        ]
        await handler.started.wait()
        assert (
            await failure_of(client.call(server.peer_id, ECHO, Number(3), timeout=30), RemoteError)
        ).code == "busy"
        for call in calls:
            call.cancel()
        await asyncio.gather(*calls, return_exceptions=True)
        await asyncio.wait_for(handler.cancelled.wait(), 10)
        server.stop_serving(ECHO)
        server.serve(ECHO, double)
        assert (await client.call(server.peer_id, ECHO, Number(3), timeout=30)).value == 6

    @on_world
    async def test_goodbye(self, world: World) -> None:
        server, client = await pair(world)
        handler = _Handler()
        server.serve(ECHO, handler)
        lost = _lost(client)
        call = asyncio.ensure_future(client.call(server.peer_id, ECHO, Number(1), timeout=30))
        await handler.started.wait()
        await server.close()
        await server.close()
        assert "goodbye: the host is closing" in str(await failure_of(call, ConnectionLost))
        assert handler.cancelled.is_set()
        peer, ending = await lost
        assert peer == server.peer_id
        assert "the host is closing" in ending.reason
        assert not client.is_connected(server.peer_id)
        refused = await failure_of(client.call(server.peer_id, ECHO, Number(1), timeout=30), PeerUnreachable)
        assert list(refused.failures.values()) == ["refused"]
        await failure_of(server.call(client.peer_id, ECHO, Number(1), timeout=30), InvalidStateError)

    @on_world
    async def test_the_death_of_a_peer_ends_its_calls(self, world: World) -> None:
        server, client = await pair(world)
        handler = _Handler()
        server.serve(ECHO, handler)
        call = asyncio.ensure_future(client.call(server.peer_id, ECHO, Number(1), timeout=30))
        await handler.started.wait()
        await world.kill("server")
        await failure_of(call, ConnectionLost)

    @on_world
    async def test_a_peer_in_client_mode_is_called_over_its_own_connection(self, world: World) -> None:
        server = await world.host("server")
        client = await world.host("client", HostConfig(client_mode=True))
        assert client.listen_addresses == client.announced_addresses == []
        assert not client.reachability.is_full
        client.serve(ECHO, double)
        unknown = await failure_of(server.call(client.peer_id, ECHO, Number(1), timeout=10), PeerUnreachable)
        assert "no address" in str(unknown)
        assert await client.connect(server.listen_addresses[0], timeout=10) == server.peer_id
        assert (await server.call(client.peer_id, ECHO, Number(4), timeout=10)).value == 8
        assert server.connected_peers() == [client.peer_id]

    @on_world
    async def test_bulk_lanes_are_separate_and_are_opened_by_whoever_can_dial(self, world: World) -> None:
        server = await world.host("server", HostConfig(bulk_lanes=2))
        client = await world.host("client", HostConfig(bulk_lanes=2, client_mode=True))

        async def echo(stream: Stream) -> None:
            async for message in stream:
                await stream.send(message)

        client.serve_stream(STREAM, echo)
        await client.connect(server.listen_addresses[0], timeout=10)
        streams = [server.open_stream(client.peer_id, STREAM, timeout=30, lane=Lane.BULK) for _ in range(4)]
        opened = [await stream.__aenter__() for stream in streams]
        for number, stream in enumerate(opened):
            await stream.send(Number(number))
            assert (await stream.receive()).value == number
        assert server.count_connections(client.peer_id) == {Lane.CONTROL: 1, Lane.BULK: 2}
        for stream_context in streams:
            await stream_context.__aexit__(None, None, None)

    @on_world
    async def test_whoever_answers_must_be_the_one_expected(self, world: World) -> None:
        server, client = await world.host("server"), await world.host("client")
        other = await world.host("other")
        address = server.listen_addresses[0]
        error = await failure_of(
            client.connect(address.with_peer_id(other.peer_id), timeout=10), PeerUnreachable
        )
        assert str(server.peer_id) in error.failures[str(address)]
        itself = await failure_of(server.connect(address, timeout=10), PeerUnreachable)
        assert "this host itself" in itself.failures[str(address)]
        assert [dial.outcome for dial in itself.dials] == [DialOutcome.ITSELF]
        await failure_of(server.connect(server.peer_id, timeout=10), InvalidValueError)
        await failure_of(server.connect(address.with_peer_id(server.peer_id), timeout=10), InvalidValueError)
        assert server.connected_peers() == client.connected_peers() == []

    @on_world
    async def test_dials_are_shared_and_may_cross(self, world: World) -> None:
        left, right = await world.host("left"), await world.host("right")
        left.add_addresses(right.peer_id, right.listen_addresses)
        right.add_addresses(left.peer_id, left.listen_addresses)
        left.serve(ECHO, double)
        right.serve(ECHO, double)
        calls = [left.call(right.peer_id, ECHO, Number(n), timeout=10) for n in range(10)]
        calls += [right.call(left.peer_id, ECHO, Number(n), timeout=10) for n in range(10)]
        assert [answer.value for answer in await asyncio.gather(*calls)] == 2 * list(range(0, 20, 2))
        assert sum(left.count_connections(right.peer_id).values()) <= 2

    @on_world
    async def test_messages_have_a_limit(self, world: World) -> None:
        server, client = await pair(world)
        texts = Method("test.text", Text, Text)

        async def same(peer: PeerID, request: Text) -> Text:
            return request

        server.serve(texts, same)
        large = Text("x" * 1_000_000)
        assert await client.call(server.peer_id, texts, large, timeout=10) == large
        await failure_of(
            client.call(server.peer_id, texts, Text("x" * 1_100_000), timeout=10), InvalidValueError
        )

    @on_world
    async def test_addresses_that_can_be_dialed_back_stay_announced(self, world: World) -> None:
        server, client = await pair(world)
        found = await client.check_reachability([server.peer_id])
        assert found.reachable is True
        assert list(found.confirmed) == client.listen_addresses == client.announced_addresses


def _lost(host: Host) -> asyncio.Future[tuple[PeerID, Ending]]:
    """Resolved when ``host`` has lost its last connection to some peer."""
    future: asyncio.Future[tuple[PeerID, Ending]] = asyncio.get_running_loop().create_future()

    def note(peer: PeerID, ending: Ending) -> None:
        if not future.done():
            future.set_result((peer, ending))

    host.on_disconnect(note)
    return future
