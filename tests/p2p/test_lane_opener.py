"""Which lanes for pieces are opened, for whom, and what is left of them when their peer is gone."""

from __future__ import annotations

import asyncio
import itertools

import pytest
from tests.p2p.test_host import Number, Swarm

from shoal.p2p.config import HostConfig
from shoal.p2p.connection import Connection
from shoal.p2p.host import Host
from shoal.p2p.identity import PeerID
from shoal.p2p.lane_requests import OPEN_LANE, OpenLane
from shoal.p2p.pool import PeerConnections
from shoal.p2p.rpc import Lane, Stream
from shoal.testing.clock import run
from shoal.testing.conformance.world import STREAM

SIZE = 200_000


async def take_all(stream: Stream) -> None:
    stream.accept_payloads(None, 20 * SIZE)
    await stream.send(Number(0))
    while True:
        await stream.receive()


async def send_without_end(sender: Host, receiver: Host) -> None:
    async with sender.open_stream(receiver.peer_id, STREAM, lane=Lane.BULK) as stream:
        await stream.receive()
        while True:
            await stream.send_payload(0, bytes(SIZE))


def lanes(one: Host, other: Host) -> int:
    return one.count_connections(other.peer_id)[Lane.STRIPE]


def entry(one: Host, other: Host) -> PeerConnections:
    found = one._connections.to(other.peer_id)
    assert found is not None
    return found


def test_a_client_opens_as_many_as_it_was_asked_for(monkeypatch: pytest.MonkeyPatch):
    """Also where they come one after the other."""

    async def main() -> None:
        async with Swarm() as swarm:
            server = await swarm.host("server", HostConfig(lanes_per_peer=8))
            client = await swarm.host("client", HostConfig(lanes_per_peer=8, client_mode=True))
            await client.connect(server.listen_addresses[0], timeout=10)
            opener, delays = client._connections._stripes, itertools.count()
            dial = opener._dial

            async def dial_later(peer: PeerID) -> bool:
                await asyncio.sleep(0.2 * next(delays))
                return await dial(peer)

            monkeypatch.setattr(opener, "_dial", dial_later)
            client.serve_stream(STREAM, take_all)
            async with server.open_stream(client.peer_id, STREAM, lane=Lane.BULK) as stream:
                await stream.receive()
                await asyncio.sleep(5.0)
                assert lanes(server, client) == 8

    run(main)


def test_who_asks_often_gets_no_more_than_the_limit():
    async def main() -> None:
        async with Swarm() as swarm:
            asker, asked = await swarm.pair(HostConfig(max_lanes=6))

            async def ask() -> bool:
                return (await asker.call(asked.peer_id, OPEN_LANE, OpenLane(255), timeout=5)).opened

            assert sorted(await asyncio.gather(*(ask() for _ in range(20)))) == 19 * [False] + [True]
            await asyncio.sleep(2.0)
            assert lanes(asked, asker) == 6
            assert not await ask()

    run(main)


def test_nobody_is_dialed_often_who_was_never_found_where_he_says_he_is():
    async def main() -> None:
        async with Swarm() as swarm:
            asked, asker = await swarm.pair()  # the second one has dialed
            answer = await asker.call(asked.peer_id, OPEN_LANE, OpenLane(64), timeout=5)
            assert not answer.opened
            assert not asked._connections._stripes.dials
            assert lanes(asked, asker) == 0

    run(main)


def test_nothing_is_kept_of_a_peer_that_promised_lanes(monkeypatch: pytest.MonkeyPatch):
    async def main() -> None:
        async with Swarm() as swarm:
            server = await swarm.host("server", HostConfig(lanes_per_peer=4))
            client = await swarm.host("client", HostConfig(client_mode=True))
            await client.connect(server.listen_addresses[0], timeout=10)
            monkeypatch.setattr(client._connections._stripes, "open_for", lambda peer, count: True)
            client.serve_stream(STREAM, take_all)
            sending = asyncio.ensure_future(send_without_end(server, client))
            await asyncio.sleep(2.0)
            assert entry(server, client).opening == 4
            sending.cancel()
            await client.close()
            await asyncio.sleep(15.0)
            assert server._connections.to(client.peer_id) is None
            assert not server._connections._stripes.dials

    run(main)


def test_each_process_of_a_peer_has_lanes_of_its_own():
    """The lanes to a process that is gone are not kept busy by the streams of the one that has come in its place."""

    async def main() -> None:
        async with Swarm() as swarm:
            a, b = await swarm.pair(HostConfig(lanes_per_peer=4))
            a.serve_stream(STREAM, take_all)
            async with b.open_stream(a.peer_id, STREAM, lane=Lane.BULK) as stream:
                await stream.receive()
                former = b._connections._stripes.bundle(a.peer_id, 1)
                former.prepare()
                await asyncio.sleep(3.0)
                assert not former.is_busy
                assert lanes(b, a) == 4
            connections = entry(b, a)
            assert len(connections.bundles) == 2
            connections.forget_process(1)
            await a.close()
            await asyncio.sleep(1.0)
            assert not connections.bundles

    run(main)


def test_a_host_may_be_closed_in_the_moment_in_which_lanes_are_dialed():
    async def main() -> None:
        async with Swarm() as swarm:
            a, b = await swarm.pair(HostConfig(lanes_per_peer=4))
            connections = entry(b, a)
            b._connections._stripes._open(a.peer_id, 4)
            assert connections.opening == 4
            await b.close()  # a coroutine that nobody awaited would be an error here
            assert connections.opening == 0
            assert not b._connections._stripes.dials

    run(main)


def stripe_of(one: Host, other: Host) -> Connection:
    return next(lane for lane in entry(one, other).all() if lane.lane is Lane.STRIPE)


def test_lanes_make_room_for_lanes_alone():
    async def main() -> None:
        async with Swarm() as swarm:
            a, b = await swarm.pair(HostConfig(max_connections_per_peer=5))
            a.serve_stream(STREAM, take_all)
            async with b.open_stream(a.peer_id, STREAM, lane=Lane.BULK) as stream:
                await stream.receive()
            await asyncio.sleep(5.0)
            for _ in range(3):
                b._connections._stripes._dial_often(a.peer_id, 3)
                await asyncio.sleep(3.0)
                counts = a.count_connections(b.peer_id)
                assert (counts[Lane.CONTROL], counts[Lane.BULK], counts[Lane.STRIPE]) == (1, 1, 3)

    run(main)


def test_a_lane_that_is_used_now_and_then_stays():
    async def main() -> None:
        async with Swarm() as swarm:
            a, b = await swarm.pair(HostConfig(lanes_per_peer=2, idle_lane_timeout=20))
            swarm.network.set_bandwidth("a", "b", 1e6)

            async def receive(stream: Stream) -> None:
                stream.accept_payloads(None, 20 * SIZE)
                await stream.send(Number(0))
                for _ in range(3):
                    await stream.receive()

            a.serve_stream(STREAM, receive)
            async with b.open_stream(a.peer_id, STREAM, lane=Lane.BULK) as stream:
                await stream.receive()
                await asyncio.sleep(1.0)
            kept = stripe_of(b, a)
            for _ in range(10):
                await asyncio.sleep(13.0)
                async with b.open_stream(a.peer_id, STREAM, lane=Lane.BULK) as stream:
                    await stream.receive()
                    for _ in range(3):
                        await stream.send_payload(0, bytes(SIZE))
            assert stripe_of(b, a) is kept

    run(main)


@pytest.mark.sweep
def test_lanes_leave_half_of_the_connections_to_others():
    async def main() -> None:
        async with Swarm() as swarm:
            server = await swarm.host("server", HostConfig(max_connections=20))
            server.serve_stream(STREAM, take_all)
            clients = [await swarm.host(f"c{number}", HostConfig(lanes_per_peer=6)) for number in range(4)]
            tasks = []
            for client in clients:
                client.add_addresses(server.peer_id, server.listen_addresses)
                await client.connect(server.peer_id, timeout=10)
                tasks.append(asyncio.ensure_future(send_without_end(client, server)))
            await asyncio.sleep(8.0)
            assert sum(lanes(server, client) for client in clients) == 10
            assert all(server.is_connected(client.peer_id) for client in clients)
            assert all(not task.done() for task in tasks)
            for task in tasks:
                task.cancel()

    run(main)


def test_a_client_opens_no_more_lanes_than_its_own_limit_for_all_that_ask_together():
    async def main() -> None:
        async with Swarm() as swarm:
            servers = [await swarm.host(f"server{number}") for number in range(4)]
            client = await swarm.host("client", HostConfig(client_mode=True, max_lanes=6))
            for server in servers:
                await client.connect(server.listen_addresses[0], timeout=10)
            for server in servers:
                await server.call(client.peer_id, OPEN_LANE, OpenLane(4), timeout=5)
            await asyncio.sleep(3.0)
            assert [lanes(client, server) for server in servers] == [4, 2, 0, 0]

    run(main)
