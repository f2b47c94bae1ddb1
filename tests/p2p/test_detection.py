"""How soon a host finds that a peer has left, died or fallen silent, and that it is back as another process."""

from __future__ import annotations

import asyncio
import functools
import random
import time

import msgspec
import pytest
import uvloop

from shoal.errors import ConnectionLost
from shoal.p2p import tcp_info
from shoal.p2p.config import HostConfig
from shoal.p2p.host import Host
from shoal.p2p.multiaddr import Multiaddr
from shoal.p2p.network import TcpNetwork
from shoal.p2p.protocol.violations import EndKind
from shoal.p2p.rpc import Lane, Method
from shoal.p2p.tcp_info import TcpInfo
from shoal.testing import clock
from shoal.testing.network import SimulatedNetwork
from shoal.testing.peers import make_host, make_identity


class Number(msgspec.Struct):
    value: int


ECHO = Method("test.echo", Number, Number)
STREAM = Method("test.stream", Number, Number)


async def echo(peer, request):
    return request


async def wait_for_ever(stream):
    await asyncio.Event().wait()


def now() -> float:
    return asyncio.get_running_loop().time()


class Pair:
    """Two hosts; ``b`` is connected to ``a``, has a bulk lane in use, and notes how its connections to ``a`` end."""

    def __init__(self, network):
        self.network = network
        self.endings = []
        self.ended = asyncio.Event()

    @classmethod
    async def make(cls, config_of_a=HostConfig(), **options):
        pair = cls(SimulatedNetwork(random.Random(3), **{"latency": (0.02, 0.02), **options}))
        pair.a, pair.b = await make_host(pair.network, "a", config_of_a), await make_host(pair.network, "b")
        for host in (pair.a, pair.b):
            host.serve(ECHO, echo)
            host.serve_stream(STREAM, wait_for_ever)
        pair.b.on_disconnect(pair.note)
        pair.b.add_addresses(pair.a.peer_id, pair.a.listen_addresses)
        await pair.b.connect(pair.a.peer_id, timeout=10)
        pair.lane = pair.b.open_stream(pair.a.peer_id, STREAM, lane=Lane.BULK)
        pair.stream = await pair.lane.__aenter__()
        assert pair.b.count_connections(pair.a.peer_id) == {Lane.CONTROL: 1, Lane.BULK: 1, Lane.STRIPE: 0}
        return pair

    def note(self, peer, ending):
        self.endings.append((now(), ending))
        self.ended.set()

    async def seconds_to_the_end(self):
        begin = now()
        await self.ended.wait()
        ((when, _),) = self.endings
        return when - begin

    async def close(self):
        await self.b.close()
        await self.a.close()


def with_pair(**options):
    def decorate(check):
        @functools.wraps(check)
        def test():
            async def main():
                pair = await Pair.make(**options)
                try:
                    await check(pair)
                finally:
                    await pair.close()

            clock.run(main)

        del test.__wrapped__
        return test

    return decorate


@with_pair()
async def test_a_peer_that_closes_says_that_it_leaves(pair):
    closing = asyncio.ensure_future(pair.a.close())
    assert await pair.seconds_to_the_end() < 0.1
    ((_, ending),) = pair.endings
    assert (ending.kind, ending.by_peer, ending.peer_has_left) == (EndKind.LEAVING, True, True)
    await closing


@with_pair()
async def test_closing_oneself_is_not_the_peers_leaving(pair):
    await pair.b.close()
    ((_, ending),) = pair.endings
    assert (ending.kind, ending.peer_has_left) == (EndKind.LEAVING, False)


@with_pair(bandwidth=1_000_000.0)
async def test_a_goodbye_ends_the_lane_too_in_the_middle_of_a_payload(pair):
    """On that lane there is no place for a goodbye, and what is queued there still travels for a second."""

    async def send(stream):
        await stream.receive()
        await stream.send_payload(1, bytes(4_000_000))

    pair.a.stop_serving(STREAM)
    pair.a.serve_stream(STREAM, send)
    async with pair.b.open_stream(pair.a.peer_id, STREAM, lane=Lane.BULK) as stream:
        stream.accept_payloads(None, 4_000_000)
        await stream.send(Number(1))
        await asyncio.sleep(1)
        closing = asyncio.ensure_future(pair.a.close())
        assert await pair.seconds_to_the_end() < 0.5
        assert pair.endings[0][1].peer_has_left
        await closing


@with_pair()
async def test_the_death_of_a_process_is_no_goodbye(pair):
    pair.network.kill("a")
    assert await pair.seconds_to_the_end() < 0.1
    ((_, ending),) = pair.endings
    assert (ending.kind, ending.by_peer) == (EndKind.LOST, False)


@with_pair()
async def test_an_unused_connection_falls_with_the_one_in_use(pair):
    """The control connection was used a moment ago, and would be asked after 30 s only."""
    pair.network.kill("a", silently=True)
    assert await pair.seconds_to_the_end() <= 5.0
    assert pair.endings[0][1].kind is EndKind.SILENCE
    assert not pair.b.is_connected(pair.a.peer_id)


@pytest.mark.parametrize("pause", [0.0, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0])
def test_a_peer_behind_a_long_path_is_found_within_fifteen_seconds(pause):
    """On each of its connections it was heard at another time, and one of them is not in use."""

    @with_pair(latency=(0.3, 0.3))
    async def check(pair):
        await asyncio.sleep(pause)
        pair.network.kill("a", silently=True)
        assert await pair.seconds_to_the_end() <= 15.0
        assert pair.endings[0][1].kind is EndKind.SILENCE

    check()


@pytest.mark.parametrize("lasted", [1.6, 3.0])
@pytest.mark.parametrize("pause", [0.1, 3.0])
def test_a_link_that_is_cut_twice_is_found_dead_as_soon_as_the_first_time(lasted, pause):
    """The answer that came after the first cut took as long as the cut, and not as long as the way."""

    @with_pair(latency=(0.001, 0.001))
    async def check(pair):
        await asyncio.sleep(1.0)
        pair.network.hold("a", "b", lasted)
        await asyncio.sleep(lasted + pause)
        assert not pair.endings
        begin = now()
        pair.network.hold("a", "b", 12.0)
        await pair.ended.wait()
        assert now() - begin <= 5.0

    check()


@with_pair(config_of_a=HostConfig(min_answer_time=13.0))
async def test_a_peer_that_is_heard_but_does_not_hear_is_told_so(pair):
    """Of a connection that carries one way, the side that hears nothing finds the end first, and says it."""
    pair.network.silence("a", "b", one_way=True)
    at_a = []
    pair.a.on_disconnect(lambda peer, ending: at_a.append((now(), ending)))
    begin = now()
    assert await pair.seconds_to_the_end() <= 5.0
    await asyncio.sleep(0.1)
    ((when, ending),) = at_a
    assert when - begin <= 5.1
    assert (ending.kind, ending.by_peer) == (EndKind.SILENCE, True)


@with_pair()
async def test_a_peer_that_was_away_is_back_when_the_network_is(pair):
    """Asleep, or in a network that was down, for 40 s."""
    pair.network.partition(["a"], ["b"])
    await asyncio.sleep(40)
    assert pair.endings[0][1].kind is EndKind.SILENCE
    pair.network.heal()
    before = now()
    assert (await pair.b.call(pair.a.peer_id, ECHO, Number(7), timeout=30)).value == 7
    assert now() - before < 1.0
    assert pair.b.incarnation(pair.a.peer_id) == pair.a.tenancy.incarnation, "it is the same process"


@pytest.mark.parametrize("silently", [False, True], ids=["killed", "power lost"])
def test_a_new_process_of_a_peer_is_let_in_at_once(silently):
    """The old one's connection may still seem to stand: its machine, which is back, knows nothing of it."""

    @with_pair()
    async def check(pair):
        old = pair.a.tenancy.incarnation
        assert pair.b.incarnation(pair.a.peer_id) == old
        pair.network.kill("a", silently=silently)
        await pair.a.close()
        pair.network.revive("a")
        pair.a = await make_host(pair.network, "a")
        assert pair.a.tenancy.incarnation != old
        begin = now()
        await pair.a.connect(pair.b.listen_addresses[0], timeout=10)
        assert now() - begin < 0.5
        assert [ending.kind for _, ending in pair.endings] == [EndKind.LOST]
        assert pair.b.is_connected(pair.a.peer_id)
        assert pair.b.incarnation(pair.a.peer_id) == pair.a.tenancy.incarnation

    check()


@with_pair()
async def test_nothing_is_known_of_a_peer_that_was_never_met(pair):
    assert pair.b.incarnation(make_identity("stranger").peer_id) is None


@pytest.mark.parametrize("run", [uvloop.run, asyncio.run], ids=["uvloop", "asyncio"])
def test_a_machine_that_stood_still_gives_nobody_up(run):
    """Both processes were suspended after one had asked the other for a sign of life."""

    async def main():
        patience = HostConfig(probe_after=0.05, min_answer_time=0.3, max_answer_time=0.3)
        one = Host(make_identity("one"), TcpNetwork(), patience)
        other = Host(make_identity("other"), TcpNetwork())
        hosts = [one, other]
        for host in hosts:
            host.serve(ECHO, echo)
            host.serve_stream(STREAM, wait_for_ever)
            await host.start([Multiaddr.parse("/ip4/127.0.0.1/tcp/0")])
        endings = []
        one.on_disconnect(lambda peer, ending: endings.append(ending))
        try:
            await one.connect(other.listen_addresses[0], timeout=10)
            (connection,) = one._connections_to(other.peer_id)
            asks = asyncio.Event()
            send_ping = connection.liveness._send_ping

            def note_ping():
                send_ping()
                asks.set()

            connection.liveness._send_ping = note_ping
            async with one.open_stream(other.peer_id, STREAM), asyncio.timeout(10):
                await asks.wait()
                time.sleep(1.0)  # noqa: ASYNC251 - the loop of both stands still
                await one.call(other.peer_id, ECHO, Number(1), timeout=10)
            assert endings == []
        finally:
            for host in hosts:
                await host.close()

    run(main())


@pytest.mark.parametrize(("kernels_rtt", "limit"), [(0.002, 5.0), (None, 15.0)])
def test_a_handshake_that_took_long_does_not_make_a_peer_long_dead(monkeypatch, kernels_rtt, limit):
    """A busy machine takes a second for a handshake over a short path, and is gone before it has answered anything."""

    def read(transport):
        return None if kernels_rtt is None else TcpInfo(kernels_rtt, kernels_rtt, 1, 0, 1)

    monkeypatch.setattr(tcp_info, "read", read)

    async def main():
        network = SimulatedNetwork(random.Random(1), latency=(0.001, 0.001))
        a, b = await make_host(network, "a"), await make_host(network, "b")
        b.add_addresses(a.peer_id, a.listen_addresses)

        a.serve_stream(STREAM, wait_for_ever)
        asyncio.get_running_loop().call_later(
            0.0025, network.hold, "a", "b", 1.0
        )  # connected, and nothing more
        async with b.open_stream(a.peer_id, STREAM) as stream:
            begin = now()
            network.kill("a", silently=True)
            with pytest.raises(ConnectionLost, match="no sign of life"):
                await stream.receive()
            assert now() - begin <= limit
            if kernels_rtt is None:
                assert now() - begin > 5.0  # else the other case shows nothing
        await b.close()

    clock.run(main)
