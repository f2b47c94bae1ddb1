"""Calls: answers, errors, deadlines, and what a peer may ask for."""

from __future__ import annotations

import asyncio
import functools

from shoal.errors import (
    ConnectionLost,
    DeadlineExceeded,
    InvalidValueError,
    ProtocolViolation,
    RemoteError,
)
from shoal.p2p.config import HostConfig
from shoal.p2p.identity import PeerID
from shoal.p2p.rpc import Method
from shoal.testing.conformance.world import (
    ECHO,
    STREAM,
    Number,
    Text,
    Waiting,
    World,
    double,
    failure_of,
    lost_by,
    on_world,
    pair,
)


class CallConformance:
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
    async def test_deadlines_end_both_sides(self, world: World) -> None:
        server, client = await pair(world)
        for method, serve in ((ECHO, server.serve), (STREAM, server.serve_stream)):
            handler = Waiting()
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
        handler = Waiting()
        server.serve(ECHO, handler)
        call = asyncio.ensure_future(client.call(server.peer_id, ECHO, Number(1), timeout=30))
        await handler.started.wait()
        call.cancel()
        await failure_of(call, asyncio.CancelledError)
        # Well before the deadline, which would cancel it too.
        await asyncio.wait_for(handler.cancelled.wait(), 10)

        in_stream = Waiting()
        server.serve_stream(STREAM, in_stream)
        try:
            async with client.open_stream(server.peer_id, STREAM) as stream:
                await stream.send(Number(1))
                await in_stream.started.wait()
                raise KeyError
        except KeyError:
            await in_stream.cancelled.wait()

    @on_world
    async def test_a_body_that_does_not_decode_ends_the_connection(self, world: World) -> None:
        server, client = await pair(world)
        server.serve(ECHO, double)
        lost = lost_by(server)
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
        handler = Waiting()
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
