"""Connections: who is at the other end, who dials, and how they end."""

from __future__ import annotations

import asyncio

from shoal.errors import (
    ConnectionLost,
    DialOutcome,
    InvalidStateError,
    InvalidValueError,
    PeerUnreachable,
)
from shoal.p2p.config import HostConfig
from shoal.p2p.rpc import Lane, Stream
from shoal.testing.conformance.world import (
    ECHO,
    STREAM,
    Number,
    Waiting,
    World,
    double,
    failure_of,
    lost_by,
    on_world,
    pair,
)


class ConnectionConformance:
    """Every test runs on a fresh world."""

    @on_world
    async def test_goodbye(self, world: World) -> None:
        server, client = await pair(world)
        handler = Waiting()
        server.serve(ECHO, handler)
        lost = lost_by(client)
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
        handler = Waiting()
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
        assert server.count_connections(client.peer_id) == {Lane.CONTROL: 1, Lane.BULK: 2, Lane.STRIPE: 0}
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
    async def test_addresses_that_can_be_dialed_back_stay_announced(self, world: World) -> None:
        server, client = await pair(world)
        found = await client.check_reachability([server.peer_id])
        assert found.reachable is True
        assert list(found.confirmed) == client.listen_addresses == client.announced_addresses
