"""Which lanes for pieces are opened, for whom, and what is left of them when their peer is gone."""

from __future__ import annotations

import asyncio
import itertools
from typing import Any

import pytest
from tests.p2p.test_host import Number, Swarm

from shoal.p2p.config import HostConfig
from shoal.p2p.connection import Connection
from shoal.p2p.host import Host
from shoal.p2p.identity import PeerID
from shoal.p2p.lane_opener import AT_ONCE
from shoal.p2p.lane_requests import OPEN_LANE, OpenLane
from shoal.p2p.multiaddr import Multiaddr
from shoal.p2p.pool import PeerConnections
from shoal.p2p.reach.dialback import ANNOUNCE, Announcement
from shoal.p2p.rpc import Lane, Stream
from shoal.testing.clock import run
from shoal.testing.conformance.world import STREAM
from shoal.testing.network import HostNetwork

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

            assert all(await asyncio.gather(*(ask() for _ in range(20))))
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


async def send_some(sender: Host, receiver: Host) -> None:
    async with sender.open_stream(receiver.peer_id, STREAM, lane=Lane.BULK) as stream:
        await stream.receive()
        await asyncio.sleep(1.0)
        for _ in range(10):
            await stream.send_payload(0, bytes(SIZE))


def test_lanes_are_dialed_where_the_peer_has_proven_to_be_and_nowhere_else(monkeypatch: pytest.MonkeyPatch):
    """A peer announces the addresses of strangers, asks for lanes, and answers late."""

    async def main() -> None:
        async with Swarm() as swarm:
            asker, asked = await swarm.pair()  # the second one has dialed
            dialed: set[str] = set()
            at_once = most_at_once = 0
            connect = HostNetwork.connect

            async def count(self: HostNetwork, factory: Any, address: Multiaddr) -> Any:
                nonlocal at_once, most_at_once
                dialed.add(address.host)
                at_once += 1
                most_at_once = max(most_at_once, at_once)
                try:
                    return await connect(self, factory, address)
                finally:
                    at_once -= 1

            monkeypatch.setattr(HostNetwork, "connect", count)
            strangers = [f"/ip4/203.0.113.7/tcp/{port}" for port in range(1, 16)]
            own = [str(address) for address in asker.listen_addresses]
            await asker.call(asked.peer_id, ANNOUNCE, Announcement(False, own + strangers), timeout=5)
            assert len(asked.addresses_of(asker.peer_id)) == 16
            for _ in range(3):
                assert (await asker.call(asked.peer_id, OPEN_LANE, OpenLane(64), timeout=5)).opened
                swarm.network.hold("a", "b", 9.0)
                await asyncio.sleep(25.0)
            assert lanes(asked, asker) == 3 * AT_ONCE
            assert dialed == {asker.listen_addresses[0].host}
            assert most_at_once == AT_ONCE

    run(main)


def test_lanes_that_are_not_used_make_room_for_those_of_others():
    async def main() -> None:
        async with Swarm() as swarm:
            server = await swarm.host("server", HostConfig(max_connections=20))
            server.serve_stream(STREAM, take_all)
            first, second, third = [
                await swarm.host(f"c{number}", HostConfig(lanes_per_peer=5)) for number in range(3)
            ]
            for client in (first, second, third):
                client.add_addresses(server.peer_id, server.listen_addresses)
            await send_some(first, server)
            await send_some(second, server)
            await asyncio.sleep(5.0)
            assert [lanes(server, client) for client in (first, second)] == [5, 5]
            task = asyncio.ensure_future(send_without_end(third, server))
            await asyncio.sleep(5.0)
            assert lanes(server, third) == 5
            task.cancel()

    run(main)


def test_a_client_gives_lanes_that_are_not_used_to_another_owner():
    async def main() -> None:
        async with Swarm() as swarm:
            servers = [await swarm.host(f"s{number}", HostConfig(lanes_per_peer=4)) for number in range(2)]
            client = await swarm.host("client", HostConfig(client_mode=True, max_lanes=4))
            client.serve_stream(STREAM, take_all)
            for server in servers:
                await client.connect(server.listen_addresses[0], timeout=10)
            for server in servers:
                await send_some(server, client)
                await asyncio.sleep(5.0)
            assert [lanes(client, server) for server in servers] == [0, 4]

    run(main)


@pytest.mark.parametrize(("max_lanes", "files"), [(8, 1024), (64, 8)])
def test_no_more_lanes_are_dialed_than_there_may_be(
    max_lanes: int, files: int, monkeypatch: pytest.MonkeyPatch
):
    async def main() -> None:
        async with Swarm() as swarm:
            config = HostConfig(max_lanes=max_lanes, lanes_per_peer=3)
            sender = await swarm.host("sender", config)
            others = [await swarm.host(f"o{number}") for number in range(5)]
            monkeypatch.setattr("shoal.p2p.lane_opener.files_for_lanes", lambda: files)
            tasks = []
            for other in others:
                other.serve_stream(STREAM, take_all)
                sender.add_addresses(other.peer_id, other.listen_addresses)
                tasks.append(asyncio.ensure_future(send_without_end(sender, other)))
            for _ in range(6):
                await asyncio.sleep(1.0)
                assert sum(lanes(sender, other) for other in others) <= 8
            assert sum(lanes(sender, other) for other in others) == 8
            assert not any(task.done() for task in tasks)
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            await asyncio.sleep(5.0)
            for other in others:
                await send_some(sender, other)
                assert sum(lanes(sender, one) for one in others) <= 8
                assert lanes(sender, other) == 3
                await asyncio.sleep(5.0)

    run(main)


def test_incoming_lanes_take_no_more_than_a_part_of_the_open_files(monkeypatch: pytest.MonkeyPatch):
    async def main() -> None:
        async with Swarm() as swarm:
            monkeypatch.setattr("shoal.p2p.room.files_for_lanes", lambda: 4)
            a, b = await swarm.pair(HostConfig(lanes_per_peer=8))
            a.serve_stream(STREAM, take_all)
            task = asyncio.ensure_future(send_without_end(b, a))
            await asyncio.sleep(5.0)
            assert lanes(a, b) == 4
            task.cancel()

    run(main)


def test_several_peers_behind_one_router_open_their_lanes_at_once():
    async def main() -> None:
        async with Swarm(latency=(0.05, 0.05)) as swarm:
            names = [f"c{number}" for number in range(3)]
            swarm.network.site(*names)
            server = await swarm.host("server")
            server.serve_stream(STREAM, take_all)
            config = HostConfig(lanes_per_peer=32, client_mode=True)
            clients = [await swarm.host(name, config) for name in names]
            for client in clients:
                await client.connect(server.listen_addresses[0], timeout=10)
            tasks = [asyncio.ensure_future(send_without_end(client, server)) for client in clients]
            await asyncio.sleep(3.0)
            assert [lanes(server, client) for client in clients] == [32, 32, 32]
            for task in tasks:
                task.cancel()

    run(main)


def test_a_peer_that_refuses_lanes_is_asked_again_after_a_pause():
    """Several refusals may come in one moment."""

    async def main() -> None:
        async with Swarm() as swarm:
            server = await swarm.host("server", HostConfig(max_connections=8))
            client = await swarm.host("client", HostConfig(lanes_per_peer=16))
            client.add_addresses(server.peer_id, server.listen_addresses)
            server.serve_stream(STREAM, take_all)
            dials = 0
            dial = client._connections._dialer.dial_one

            async def count(address: Multiaddr, expected: PeerID | None, lane: Lane) -> Any:
                nonlocal dials
                dials += lane is Lane.STRIPE
                return await dial(address, expected, lane)

            client._connections._dialer.dial_one = count  # type: ignore[method-assign]
            task = asyncio.ensure_future(send_without_end(client, server))
            await asyncio.sleep(4.0)
            assert lanes(client, server) == 4
            assert dials == AT_ONCE
            await asyncio.sleep(26.0)
            assert dials <= AT_ONCE + 6 * 12
            task.cancel()

    run(main)


def test_nobody_takes_all_lanes_of_a_host():
    """A peer that asks again and again, and uses all that it gets."""

    async def main() -> None:
        async with Swarm() as swarm:
            greedy, *others = [await swarm.host(f"p{number}") for number in range(4)]
            host = await swarm.host("host", HostConfig(max_lanes=12, lanes_per_peer=3))
            for peer in (greedy, *others):
                peer.serve_stream(STREAM, take_all)
                host.add_addresses(peer.peer_id, peer.listen_addresses)
                await host.connect(peer.peer_id, timeout=10)

            async def ask() -> None:
                while True:
                    await greedy.call(host.peer_id, OPEN_LANE, OpenLane(64), timeout=5)
                    for lane in entry(host, greedy).dialed_stripes:
                        lane.last_piece = asyncio.get_running_loop().time()
                    await asyncio.sleep(0.5)

            tasks = [asyncio.ensure_future(ask())]
            await asyncio.sleep(3.0)
            assert lanes(host, greedy) == 12
            tasks += [asyncio.ensure_future(send_without_end(host, other)) for other in others]
            await asyncio.sleep(5.0)
            assert [lanes(host, peer) for peer in (greedy, *others)] == [3, 3, 3, 3]
            assert not any(task.done() for task in tasks)
            for task in tasks:
                task.cancel()

    run(main)


def test_lanes_that_were_promised_do_not_count_as_dialed(monkeypatch: pytest.MonkeyPatch):
    async def main() -> None:
        async with Swarm() as swarm:
            host = await swarm.host("host", HostConfig(max_lanes=8, lanes_per_peer=8))
            client = await swarm.host("client", HostConfig(client_mode=True))
            other = await swarm.host("other")
            await client.connect(host.listen_addresses[0], timeout=10)
            monkeypatch.setattr(client._connections._stripes, "open_for", lambda peer, count: True)
            host.add_addresses(other.peer_id, other.listen_addresses)
            tasks = []
            for peer in (client, other):
                peer.serve_stream(STREAM, take_all)
                tasks.append(asyncio.ensure_future(send_without_end(host, peer)))
                await asyncio.sleep(1.0)
            assert entry(host, client).asked_for == 8
            assert lanes(host, other) == 8
            for task in tasks:
                task.cancel()

    run(main)


def test_lanes_of_streams_that_go_on_are_not_closed_for_others():
    """At a low rate each lane carries a piece now and then."""

    async def main() -> None:
        async with Swarm() as swarm:
            sender = await swarm.host(
                "sender", HostConfig(lanes_per_peer=3, max_lanes=6, max_upload_rate=60_000)
            )
            others = [await swarm.host(f"o{number}") for number in range(3)]
            tasks = []
            for other in others:
                other.serve_stream(STREAM, take_all)
                sender.add_addresses(other.peer_id, other.listen_addresses)
                tasks.append(asyncio.ensure_future(send_without_end(sender, other)))
            await asyncio.sleep(10.0)
            before = sender._connections.dialed_stripes()
            assert len(before) == 6
            await asyncio.sleep(15.0)
            assert sender._connections.dialed_stripes() == before
            for task in tasks:
                task.cancel()

    run(main)
