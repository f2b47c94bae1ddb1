"""Hosts on the simulated network: dialing, keep-alive, limits, dial-back, the end."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import random

import msgspec
import pytest

from shoal.errors import (
    ConnectionLost,
    DeadlineExceeded,
    DialOutcome,
    InvalidStateError,
    InvalidValueError,
    PeerUnreachable,
    RemoteError,
)
from shoal.p2p.config import HostConfig
from shoal.p2p.host import Host
from shoal.p2p.multiaddr import Multiaddr
from shoal.p2p.reach.dialback import ANNOUNCE, DIAL_BACK, Announcement, DialBackRequest
from shoal.p2p.reach.vantage import Interface, likely_first
from shoal.p2p.rpc import Lane, Method
from shoal.p2p.sockets import origin_of
from shoal.testing import clock
from shoal.testing.network import SimulatedNetwork
from shoal.testing.peers import make_host, make_identity


class Number(msgspec.Struct):
    value: int


ECHO = Method("test.echo", Number, Number)
STREAM = Method("test.stream", Number, Number)


def now() -> float:
    return asyncio.get_running_loop().time()


async def echo(peer, request):
    return request


class Swarm:
    """A simulated network whose hosts are closed at the end."""

    def __init__(self, **options):
        self.network = SimulatedNetwork(random.Random(3), **{"latency": (0.02, 0.02), **options})
        self.hosts = []

    async def host(self, name, config=HostConfig(), **options):
        host = await make_host(self.network, name, config, **options)
        host.serve(ECHO, echo)
        self.hosts.append(host)
        return host

    async def pair(self, config=HostConfig()):
        a, b = await self.host("a", config), await self.host("b", config)
        b.add_addresses(a.peer_id, a.listen_addresses)
        await b.call(a.peer_id, ECHO, Number(1), timeout=10)
        return a, b

    async def __aenter__(self):
        return self

    async def __aexit__(self, *exc):
        for host in self.hosts:
            await host.close()


def simulated(**options):
    """Run a test's coroutine on a fresh swarm and virtual time."""

    def decorate(test):
        def run(caplog):
            async def main():
                async with Swarm(**options) as swarm:
                    await test(swarm, caplog)

            clock.run(main)

        run.__name__ = test.__name__
        return run

    return decorate


async def wait_for_ever(peer, request):
    await asyncio.Event().wait()


# ---- dialing ----


@simulated()
async def test_a_silent_address_holds_up_the_next_one_only_shortly(swarm, caplog):
    a, b = await swarm.host("a"), await swarm.host("b")
    b.add_addresses(a.peer_id, [Multiaddr.parse("/ip4/10.9.9.9/tcp/1"), *a.listen_addresses])
    await b.connect(a.peer_id, timeout=5)
    assert now() < 0.6
    # What worked comes first the next time.
    assert b.addresses_of(a.peer_id)[0] == a.listen_addresses[0]


@simulated()
async def test_an_address_that_is_not_spoken_is_passed_over_and_told(swarm, caplog):
    a, b = await swarm.host("a"), await swarm.host("b")
    relayed = Multiaddr(f"/ip4/10.9.9.9/tcp/1/p2p/{make_identity('relay').peer_id}/p2p-circuit")
    b.add_addresses(a.peer_id, [relayed])
    with pytest.raises(PeerUnreachable, match="Shoal has no relays") as caught:
        await b.connect(a.peer_id, timeout=5)
    assert [dial.outcome for dial in caught.value.dials] == [DialOutcome.UNSUPPORTED]
    b.add_addresses(a.peer_id, [relayed, *a.listen_addresses])
    assert b.addresses_of(a.peer_id)[0] == relayed
    assert await b.connect(a.peer_id, timeout=5) == a.peer_id


@simulated()
async def test_a_host_listens_at_addresses_that_it_speaks_only(swarm, caplog):
    host = Host(make_identity("quic"), swarm.network.host("quic"))
    with pytest.raises(InvalidValueError, match="'quic' cannot be used"):
        await host.start([Multiaddr("/ip4/0.0.0.0/udp/1/quic")])


@simulated()
async def test_every_address_is_listed_with_its_reason(swarm, caplog):
    a, b, other = await swarm.host("a"), await swarm.host("b"), await swarm.host("other")
    addresses = [
        Multiaddr.parse("/ip4/10.9.9.9/tcp/1"),
        swarm.network.host("a").address(1),
        *other.listen_addresses,
    ]
    b.add_addresses(a.peer_id, addresses)
    with pytest.raises(PeerUnreachable) as caught:
        await b.call(a.peer_id, ECHO, Number(1), timeout=60)
    failures = caught.value.failures
    assert set(failures) == {str(address) for address in addresses}
    assert failures[str(addresses[0])] == "timed out"
    assert failures[str(addresses[1])] == "refused"
    assert str(other.peer_id) in failures[str(addresses[2])]
    assert all(reason in str(caught.value) for reason in failures.values())
    assert [dial.outcome for dial in sorted(caught.value.dials, key=lambda dial: dial.outcome.value)] == [
        DialOutcome.REFUSED,
        DialOutcome.TIMED_OUT,
        DialOutcome.WRONG_PEER,
    ]
    assert not caught.value.is_refused


@simulated()
async def test_another_peer_at_an_old_address_is_an_error_of_the_dial_and_no_warning(swarm, caplog):
    caplog.set_level(logging.INFO, "shoal")
    a, b = await swarm.host("a"), await swarm.host("b")
    gone = make_identity("gone").peer_id
    a.add_addresses(gone, b.listen_addresses)
    with pytest.raises(PeerUnreachable, match=r"answers where .* was expected"):
        await a.call(gone, ECHO, Number(1), timeout=5)
    assert not [record for record in caplog.records if "broke the protocol" in record.getMessage()]


@simulated()
async def test_a_deadline_shorter_than_the_dial(swarm, caplog):
    a, b = await swarm.host("a"), await swarm.host("b")
    b.add_addresses(a.peer_id, [Multiaddr.parse("/ip4/10.9.9.9/tcp/1")])
    for dial in (a.peer_id, Multiaddr.parse("/ip4/10.9.9.9/tcp/1")):
        begin = now()
        with pytest.raises(DeadlineExceeded):
            await b.connect(dial, timeout=1)
        assert now() - begin == pytest.approx(1)


@simulated()
async def test_whoever_does_not_speak_the_protocol_is_named_so(swarm, caplog):
    class Web(asyncio.BufferedProtocol):
        def connection_made(self, transport):
            self.transport = transport
            transport.write(b"HTTP/1.1 400 Bad Request\r\n\r\n" + b" " * 100)

        def get_buffer(self, hint):
            return memoryview(bytearray(1000))

        def buffer_updated(self, count):
            pass

        def eof_received(self):
            return False

    b = await swarm.host("b")
    listener = await swarm.network.host("web").listen(Web, swarm.network.host("web").address(80))
    with pytest.raises(PeerUnreachable, match="HTTP") as caught:
        await b.connect(listener.address, timeout=5)
    assert [dial.outcome for dial in caught.value.dials] == [DialOutcome.NOT_SHOAL]


@simulated()
async def test_a_silent_dialer_is_cut_within_the_handshakes_time(swarm, caplog):
    class Silent(asyncio.BufferedProtocol):
        def __init__(self):
            self.ended = asyncio.get_running_loop().create_future()

        def get_buffer(self, hint):
            return memoryview(bytearray(1000))

        def buffer_updated(self, count):
            pass

        def eof_received(self):
            return False

        def connection_lost(self, error):
            self.ended.set_result(now())

    a = await swarm.host("a")
    silent = Silent()
    await swarm.network.host("x").connect(lambda: silent, a.listen_addresses[0])
    assert await silent.ended == pytest.approx(10, abs=0.2)


@simulated()
async def test_unknown_peers_and_oneself(swarm, caplog):
    a, b = await swarm.host("a"), await swarm.host("b")
    with pytest.raises(PeerUnreachable, match="no address is known"):
        await a.call(b.peer_id, ECHO, Number(1), timeout=5)
    with pytest.raises(InvalidValueError, match="this host itself"):
        await a.call(a.peer_id, ECHO, Number(1), timeout=5)
    a.add_addresses(a.peer_id, a.listen_addresses)
    assert a.addresses_of(a.peer_id) == []


@simulated()
async def test_addresses_travel_with_hello(swarm, caplog):
    a, b = await swarm.pair()
    assert a.addresses_of(b.peer_id) == b.listen_addresses
    assert a.connected_peers() == [b.peer_id]


def test_no_more_addresses_are_announced_than_peers_accept():
    addresses = [Multiaddr("ip4", "10.0.0.1", port) for port in range(1, 18)]
    HostConfig(announce=addresses[:16])
    with pytest.raises(InvalidValueError, match="announce must be at most 16 addresses, got 17"):
        HostConfig(announce=addresses)


def interface(name, ip, prefix_length=24):
    return Interface(name, ip, prefix_length)


async def host_everywhere(swarm, name, interfaces):
    """A host that listens on all interfaces of its machine, IPv4 and IPv6."""
    place = swarm.network.host(name)
    place.interface_list = interfaces
    host = Host(make_identity(name), place)
    swarm.hosts.append(host)
    await host.start([Multiaddr("ip4", "0.0.0.0", 4000), Multiaddr("ip6", "::", 4001)])
    return host


@simulated()
async def test_a_listener_on_all_interfaces_announces_the_likely_ones_first(swarm, caplog):
    found = [
        interface("lo", "127.0.0.1", 8),
        interface("docker0", "172.17.0.1", 16),
        interface("eth1", "10.9.0.1"),
        interface("eth0", "198.51.100.7"),
        interface("eth0", "fe80::1", 64),
        interface("eth0", "2a00:1::7", 64),
        interface("lo", "::1", 128),
    ]
    host = await host_everywhere(swarm, "all", likely_first(found, ["198.51.100.7"]))
    announced = ["198.51.100.7", "2a00:1::7", "10.9.0.1", "172.17.0.1"]
    assert [address.host for address in host.announced_addresses] == announced
    assert [address.host for address in host.visible_addresses] == [*announced, "127.0.0.1", "::1"]
    assert [address.port for address in host.announced_addresses] == [4000, 4001, 4000, 4000]


@simulated()
async def test_a_machine_without_any_other_interface_announces_loopback(swarm, caplog):
    host = await host_everywhere(swarm, "lonely", [interface("lo", "127.0.0.1", 8)])
    assert [str(address) for address in host.announced_addresses] == [
        "/ip4/127.0.0.1/tcp/4000",
        "/ip6/::1/tcp/4001",
    ]


@simulated()
async def test_a_machine_that_moves_announces_where_it_is_now(swarm, caplog):
    host = await host_everywhere(swarm, "moving", [interface("wlan0", "10.9.0.1")])
    assert [address.host for address in host.announced_addresses] == ["10.9.0.1"]
    host._network.interface_list = [interface("wlan0", "10.9.5.1")]
    await asyncio.sleep(3)
    assert [address.host for address in host.announced_addresses] == ["10.9.5.1"]


@simulated()
async def test_a_lost_connection_is_dialed_again(swarm, caplog):
    a, b = await swarm.pair()
    lost = []
    unsubscribe = b.on_disconnect(lambda peer, ending: lost.append((peer, ending)))
    assert swarm.network.drop_connections("a", "b") == 1
    await asyncio.sleep(0.1)
    assert [peer for peer, _ in lost] == [a.peer_id]
    assert not b.is_connected(a.peer_id)
    assert (await b.call(a.peer_id, ECHO, Number(2), timeout=5)).value == 2
    unsubscribe()
    swarm.network.drop_connections("a", "b")
    await asyncio.sleep(0.1)
    assert len(lost) == 1


# ---- keep-alive ----


@simulated()
async def test_a_silent_peer_is_found_within_five_seconds(swarm, caplog):
    a, b = await swarm.pair()
    a.stop_serving(ECHO)
    a.serve(ECHO, wait_for_ever)
    call = asyncio.ensure_future(b.call(a.peer_id, ECHO, Number(1), timeout=100))
    await asyncio.sleep(1)
    begin = now()
    swarm.network.silence("a", "b")
    with pytest.raises(ConnectionLost, match="no sign of life"):
        await call
    assert now() - begin <= 5.0


@simulated()
async def test_a_silent_peer_is_found_by_a_call_on_a_connection_that_was_idle(swarm, caplog):
    a, b = await swarm.pair()
    await asyncio.sleep(100)
    assert b.is_connected(a.peer_id)
    swarm.network.silence("a", "b")
    begin = now()
    with pytest.raises(ConnectionLost, match="no sign of life"):
        await b.call(a.peer_id, ECHO, Number(1), timeout=100)
    assert now() - begin <= 5.0


@simulated()
async def test_a_caller_that_falls_silent_is_found_on_a_connection_that_was_idle(swarm, caplog):
    a, b = await swarm.pair()
    ended = []

    async def receive(stream):
        try:
            await stream.receive()
        except asyncio.CancelledError:
            ended.append(now())
            raise

    a.serve_stream(STREAM, receive)
    await asyncio.sleep(5)  # the next look at the idle connection is 25 s ahead
    async with b.open_stream(a.peer_id, STREAM, timeout=1000):
        await asyncio.sleep(1)
        swarm.network.silence("a", "b")
        begin = now()
        await asyncio.sleep(20)
    assert [when - begin <= 5.0 for when in ended] == [True]


@simulated(latency=(0.6, 0.6))
async def test_a_silent_peer_behind_a_long_path_is_found_within_fifteen_seconds(swarm, caplog):
    a, b = await swarm.pair()
    a.stop_serving(ECHO)
    a.serve(ECHO, wait_for_ever)
    call = asyncio.ensure_future(b.call(a.peer_id, ECHO, Number(1), timeout=100))
    await asyncio.sleep(60)
    assert not call.done()
    begin = now()
    swarm.network.silence("a", "b")
    with pytest.raises(ConnectionLost):
        await call
    assert now() - begin <= 15.0


@simulated()
async def test_an_idle_connection_to_a_silent_peer_ends_too(swarm, caplog):
    a, b = await swarm.pair()
    swarm.network.kill("a", silently=True)
    await asyncio.sleep(60)
    assert not b.is_connected(a.peer_id)


@simulated(bandwidth=50_000.0)
async def test_a_slow_full_link_is_no_reason_to_give_a_peer_up(swarm, caplog):
    a, b = await swarm.pair()
    received = []

    async def receive(stream):
        stream.accept_payloads(None, 3_000_000)
        payload = await stream.receive()
        received.append(len(payload.data))

    a.serve_stream(STREAM, receive)
    async with b.open_stream(a.peer_id, STREAM, timeout=1000) as stream:
        begin = now()
        await stream.send_payload(1, bytes(2_000_000))
        # 40 s of data go through one pipe; a sign of life of either side waits behind them.
        assert (await b.call(a.peer_id, ECHO, Number(5), timeout=100)).value == 5
    assert received == [2_000_000]
    assert 40 <= now() - begin < 60
    assert b.count_connections(a.peer_id)[Lane.CONTROL] == 1


@simulated(bandwidth=50_000.0)
async def test_a_full_link_that_falls_silent_is_found(swarm, caplog):
    a, b = await swarm.pair()

    async def receive(stream):
        stream.accept_payloads(None, 3_000_000)
        await stream.receive()

    a.serve_stream(STREAM, receive)
    async with b.open_stream(a.peer_id, STREAM, timeout=1000) as stream:
        sending = asyncio.ensure_future(stream.send_payload(1, bytes(2_000_000)))
        await asyncio.sleep(10)
        swarm.network.silence("a", "b")
        begin = now()
        with pytest.raises(ConnectionLost):
            await sending
        assert now() - begin <= 15.0


@simulated(bandwidth=50_000.0)
async def test_cancelling_in_the_middle_of_a_payload_leaves_the_connection_usable(swarm, caplog):
    a, b = await swarm.pair()
    ended = []

    async def receive(stream):
        stream.accept_payloads(None, 3_000_000)
        try:
            await stream.receive()
            await stream.receive()
        except asyncio.CancelledError:
            ended.append(now())
            raise

    a.serve_stream(STREAM, receive)

    async def send():
        async with b.open_stream(a.peer_id, STREAM, timeout=1000) as stream:
            await stream.send_payload(1, bytes(2_000_000))

    sending = asyncio.ensure_future(send())
    await asyncio.sleep(2)
    sending.cancel()
    with pytest.raises(asyncio.CancelledError):
        await sending
    assert now() < 4
    assert (await b.call(a.peer_id, ECHO, Number(5), timeout=100)).value == 5
    assert len(ended) == 1
    assert b.count_connections(a.peer_id)[Lane.CONTROL] == 1


# ---- limits and the end ----


@simulated()
async def test_of_two_crossing_connections_both_sides_keep_the_same(swarm, caplog):
    a, b = await swarm.host("a"), await swarm.host("b")
    a.add_addresses(b.peer_id, b.listen_addresses)
    b.add_addresses(a.peer_id, a.listen_addresses)
    await asyncio.gather(a.connect(b.peer_id, timeout=5), b.connect(a.peer_id, timeout=5))
    await asyncio.sleep(1)
    assert a.count_connections(b.peer_id)[Lane.CONTROL] == 2
    for _ in range(60):
        await asyncio.gather(
            a.call(b.peer_id, ECHO, Number(1), timeout=5), b.call(a.peer_id, ECHO, Number(1), timeout=5)
        )
        await asyncio.sleep(1)
    assert a.count_connections(b.peer_id)[Lane.CONTROL] == 1


@simulated()
async def test_unused_connections_are_closed_after_a_while(swarm, caplog):
    a, b = await swarm.pair(HostConfig(idle_timeout=100, idle_lane_timeout=20))

    async def nothing(stream):
        pass

    a.serve_stream(STREAM, nothing)
    async with b.open_stream(a.peer_id, STREAM, lane=Lane.BULK):
        pass
    assert b.count_connections(a.peer_id) == {Lane.CONTROL: 1, Lane.BULK: 1, Lane.STRIPE: 0}
    await asyncio.sleep(70)
    assert b.count_connections(a.peer_id) == {Lane.CONTROL: 1, Lane.BULK: 0, Lane.STRIPE: 0}
    await asyncio.sleep(100)
    assert not b.is_connected(a.peer_id)


@simulated()
async def test_the_connection_of_a_peer_that_cannot_be_dialed_is_kept(swarm, caplog):
    a = await swarm.host("a", HostConfig(idle_timeout=100))
    b = await swarm.host("b", HostConfig(client_mode=True, idle_timeout=100))
    await b.connect(a.listen_addresses[0], timeout=5)
    await asyncio.sleep(1000)
    assert (await a.call(b.peer_id, ECHO, Number(1), timeout=5)).value == 1


@simulated()
async def test_the_connection_unused_for_longest_makes_room(swarm, caplog):
    a = await swarm.host("a", HostConfig(max_connections=2))
    others = [await swarm.host(f"other{n}") for n in range(3)]
    for other in others:
        await other.connect(a.listen_addresses[0], timeout=5)
        await asyncio.sleep(1)
    assert a.connected_peers() == [others[1].peer_id, others[2].peer_id]


@simulated()
async def test_connections_over_the_limit_are_refused_while_all_are_in_use(swarm, caplog):
    a = await swarm.host("a", HostConfig(max_connections=2))
    a.stop_serving(ECHO)
    a.serve(ECHO, wait_for_ever)
    others = [await swarm.host(f"other{n}") for n in range(3)]
    calls = []
    for other in others[:2]:
        await other.connect(a.listen_addresses[0], timeout=5)
        calls.append(asyncio.ensure_future(other.call(a.peer_id, ECHO, Number(1), timeout=50)))
    await asyncio.sleep(1)
    with pytest.raises(PeerUnreachable, match="too many connections") as caught:
        await others[2].connect(a.listen_addresses[0], timeout=5)
    assert [dial.outcome for dial in caught.value.dials] == [DialOutcome.NO_ROOM]
    for call in calls:
        call.cancel()
    await asyncio.gather(*calls, return_exceptions=True)


@simulated()
async def test_own_dials_keep_to_the_limit_too(swarm, caplog):
    """An unused connection is closed for each, also one whose peer cannot be dialed; none that is in use."""
    a = await swarm.host("a", HostConfig(max_connections=3))
    a.stop_serving(ECHO)
    a.serve(ECHO, wait_for_ever)
    clients = [await swarm.host(f"client{n}", HostConfig(client_mode=True)) for n in range(3)]
    for client in clients:
        await client.connect(a.listen_addresses[0], timeout=5)
    others = [await swarm.host(f"other{number}") for number in range(4)]
    for other in others[:3]:
        await a.connect(other.listen_addresses[0], timeout=5)
        await asyncio.sleep(1)
        assert len(a.connected_peers()) == 3
    connected = [host for host in swarm.hosts if a.is_connected(host.peer_id)]
    calls = [asyncio.ensure_future(one.call(a.peer_id, ECHO, Number(1), timeout=50)) for one in connected]
    await asyncio.sleep(1)
    with pytest.raises(PeerUnreachable, match="too many connections"):
        await a.connect(others[3].listen_addresses[0], timeout=5)
    assert len(a.connected_peers()) == 3
    for call in calls:
        call.cancel()
    await asyncio.gather(*calls, return_exceptions=True)


class Mute(asyncio.BufferedProtocol):
    """Dials and then says nothing."""

    def __init__(self):
        self.is_connected = True

    def get_buffer(self, hint):
        return memoryview(bytearray(1000))

    def buffer_updated(self, count):
        pass

    def eof_received(self):
        return False

    def connection_lost(self, error):
        self.is_connected = False


async def dial_mutely(network, address, count):
    dialers = [Mute() for _ in range(count)]
    for dialer in dialers:
        try:
            await network.connect(lambda dialer=dialer: dialer, address)
        except ConnectionResetError:
            dialer.is_connected = False
    await asyncio.sleep(0.1)
    return sum(dialer.is_connected for dialer in dialers)


@simulated()
async def test_one_address_cannot_take_all_places_for_handshakes(swarm, caplog):
    a = await swarm.host("a", HostConfig(max_connections=2, max_handshakes=8, max_handshakes_per_ip=3))
    (address,) = a.listen_addresses
    assert await dial_mutely(swarm.network.host("flood"), address, 12) == 3
    b = await swarm.host("b")
    await b.connect(address, timeout=5)
    await asyncio.sleep(11)  # those that proved nothing are cut
    assert await dial_mutely(swarm.network.host("flood"), address, 2) == 2
    for network in ("flood2", "flood3", "flood4", "flood5"):
        await dial_mutely(swarm.network.host(network), address, 3)
    with pytest.raises(PeerUnreachable):
        await (await swarm.host("c")).connect(address, timeout=5)


@simulated()
async def test_processes_of_the_same_machine_are_not_limited_by_its_address(swarm, caplog):
    a = await swarm.host("a", HostConfig(max_handshakes_per_ip=3, max_connections_per_ip=3))
    (address,) = a.listen_addresses
    assert await dial_mutely(swarm.network.host("a"), address, 12) == 12
    for number in range(6):
        process = Host(make_identity(f"p{number}"), swarm.network.host("a"), HostConfig(client_mode=True))
        swarm.hosts.append(process)
        await process.start()
        await process.connect(address, timeout=5)
    assert len(a.connected_peers()) == 6


@pytest.mark.parametrize(
    ("remote", "own", "origin"),
    [
        ("10.0.0.1", "10.0.0.2", "10.0.0.1"),
        ("10.0.0.1", "10.0.0.1", None),
        ("127.0.0.2", "127.0.0.1", None),
        ("::1", "::1", None),
        ("2001:db8:1:2:3:4:5:6", "2001:db8:9::1", "2001:db8:1:2::/64"),
        ("2001:db8:1:2:ffff::", "2001:db8:9::1", "2001:db8:1:2::/64"),
        (None, None, None),
    ],
)
def test_whom_limits_per_address_count_together(remote, own, origin):
    assert origin_of(remote, own) == origin


@simulated()
async def test_many_peers_of_one_address_leave_room_for_others(swarm, caplog):
    a = await swarm.host("a", HostConfig(max_connections=4, max_connections_per_ip=3))
    (address,) = a.listen_addresses
    peers = []
    for number in range(5):
        peer = Host(make_identity(f"p{number}"), swarm.network.host("router"), HostConfig(client_mode=True))
        swarm.hosts.append(peer)
        peers.append(peer.peer_id)
        await peer.start()
        if number < 3:
            await peer.connect(address, timeout=5)
        else:
            with pytest.raises(PeerUnreachable, match=r"too many connections from 10\.0\.0\.2"):
                await peer.connect(address, timeout=5)
    other = await swarm.host("other")
    await other.connect(address, timeout=5)
    assert a.connected_peers() == [*peers[:3], other.peer_id]


@simulated()
async def test_one_peer_has_a_few_connections_only(swarm, caplog):
    a, b = await swarm.host("a", HostConfig(max_connections_per_peer=3)), await swarm.host("b")
    other = await swarm.host("other")
    await other.connect(a.listen_addresses[0], timeout=5)

    async def hold(stream):
        await asyncio.Event().wait()

    a.serve_stream(STREAM, hold)

    async def dial():
        await b._connections.dial_address(a.listen_addresses[0], a.peer_id, Lane.CONTROL, now() + 5)
        await asyncio.sleep(1)
        return a.count_connections(b.peer_id)[Lane.CONTROL]

    # The one unused for longest makes room: a peer may come back before its old connections are found dead.
    assert [await dial() for _ in range(5)] == [1, 2, 3, 3, 3]
    for connection in b._connections.to(a.peer_id).all():
        connection.calls.open_stream(STREAM, None)
    await asyncio.sleep(1)
    outcome = await b._connections.dial_address(a.listen_addresses[0], a.peer_id, Lane.BULK, now() + 5)
    assert isinstance(outcome, PeerUnreachable)
    assert "too many connections to one peer" in str(outcome)
    assert a.count_connections(b.peer_id) == {Lane.CONTROL: 3, Lane.BULK: 0, Lane.STRIPE: 0}
    assert a.is_connected(other.peer_id)


def test_limits_that_contradict_each_other_are_refused():
    with pytest.raises(
        InvalidValueError, match="bulk_lanes must be at most 7, with max_connections_per_peer=9, got 8"
    ):
        HostConfig(bulk_lanes=8, max_connections_per_peer=9)
    with pytest.raises(InvalidValueError, match="max_unread must be at least 1048576 bytes, got 1000"):
        HostConfig(max_unread=1000)
    for name in ("max_connections_per_ip", "max_handshakes", "max_handshakes_per_ip"):
        with pytest.raises(InvalidValueError, match=f"{name} must be at least 1, got 0"):
            HostConfig(**{name: 0})


@simulated()
async def test_a_peer_that_sends_more_than_is_read_hears_that_this_side_is_busy(swarm, caplog):
    a, b = await swarm.pair(HostConfig(max_unread=1 << 20))

    async def read_nothing(stream):
        await asyncio.Event().wait()

    a.serve_stream(STREAM, read_nothing)
    failures = []
    async with contextlib.AsyncExitStack() as streams:
        for _ in range(6):
            stream = await streams.enter_async_context(b.open_stream(a.peer_id, STREAM))
            await stream.send_payload(0, bytes(100_000))
            await stream.send_payload(0, bytes(100_000))
            await asyncio.sleep(1)
            failures.append(stream.failure and stream.failure.code)
        assert failures == [None] * 5 + ["busy"]
        assert (await b.call(a.peer_id, ECHO, Number(7), timeout=5)).value == 7
    await asyncio.sleep(1)
    (connection,) = a._connections.to(b.peer_id).all()
    assert connection.streams._unread._used == 0


@simulated()
async def test_a_closed_host_is_of_no_use(swarm, caplog):
    a, b = await swarm.pair()
    await b.close()
    with pytest.raises(InvalidStateError, match="closed"):
        await b.call(a.peer_id, ECHO, Number(1), timeout=5)
    with pytest.raises(InvalidStateError, match="closed"):
        await b.start()


@simulated()
async def test_closing_does_not_wait_for_a_dial_or_a_silent_peer(swarm, caplog):
    _, b = await swarm.pair()
    c = await swarm.host("c")
    b.add_addresses(c.peer_id, [Multiaddr.parse("/ip4/10.9.9.9/tcp/1")])
    call = asyncio.ensure_future(b.call(c.peer_id, ECHO, Number(1), timeout=100))
    await asyncio.sleep(0.5)
    swarm.network.silence("a", "b")
    begin = now()
    await b.close()
    assert now() - begin <= 2.0
    with pytest.raises(InvalidStateError):
        await call


@simulated()
async def test_methods_are_served_once(swarm, caplog):
    a = await swarm.host("a")
    with pytest.raises(InvalidValueError, match="served already"):
        a.serve(ECHO, echo)
    place = swarm.network.host("c")
    client = Host(make_identity("c"), place, HostConfig(client_mode=True))
    with pytest.raises(InvalidValueError, match="client mode"):
        await client.start([place.address(1)])
    await client.close()


@simulated()
async def test_another_clock_is_told_as_a_peer_connects(swarm, caplog):
    a, near = await swarm.host("a"), await swarm.host("near", skew=0.5)
    late = await swarm.host("late", skew=-60.0)
    told = []
    for host in (a, late):
        host.on_clock_difference(lambda peer, ahead: told.append((peer, round(ahead))))
    await near.connect(a.listen_addresses[0], timeout=5)
    await late.connect(a.listen_addresses[0], timeout=5)
    await asyncio.sleep(1)
    assert sorted(told) == sorted([(late.peer_id, -60), (a.peer_id, 60)])


# ---- who can be reached ----


def nat(swarm, port=4000):
    """A config that announces where nobody listens."""
    return HostConfig(announce=[swarm.network.host("b").address(port + 1)])


@simulated()
async def test_a_host_that_nobody_can_dial_becomes_a_client(swarm, caplog):
    a = await swarm.host("a")
    b = await swarm.host("b", nat(swarm))
    await b.connect(a.listen_addresses[0], timeout=5)
    result = await b.check_reachability([a.peer_id])
    assert result.reachable is False
    assert list(result.failures.values()) == ["refused"]
    assert not b.reachability.is_full
    assert b.announced_addresses == []
    warnings = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert len(warnings) == 1
    assert all(name in warnings[0] for name in ("host_maddrs", "announce_maddrs", "client_mode=True"))
    await asyncio.sleep(6)  # helpers are not asked more often
    assert (await b.check_reachability([a.peer_id])).reachable is False
    assert [record.levelno for record in caplog.records].count(logging.WARNING) == 1
    c = await swarm.host("c")
    await b.connect(c.listen_addresses[0], timeout=5)
    assert c.addresses_of(b.peer_id) == []


@simulated()
async def test_a_host_that_can_be_dialed_after_all_is_announced_again(swarm, caplog):
    caplog.set_level(logging.INFO, "shoal")
    a = await swarm.host("a")
    b = await swarm.host("b", nat(swarm))
    await b.connect(a.listen_addresses[0], timeout=5)
    await b.check_reachability([a.peer_id])
    await b.announce()
    assert not a._connections.routes_to(b.peer_id)
    (outer,) = b.config.announce
    await swarm.network.host("b").listen(b._connections.accept, outer)  # the port is forwarded now
    await asyncio.sleep(6)
    result = await b.check_reachability([a.peer_id])
    assert (result.reachable, result.confirmed) == (True, (outer,))
    assert b.reachability.is_full
    assert b.announced_addresses == [outer]
    told = [record for record in caplog.records if "client no longer" in record.getMessage()]
    assert [(record.levelno, str(outer) in record.getMessage()) for record in told] == [(logging.INFO, True)]
    await b.announce()
    assert a.addresses_of(b.peer_id)[0] == outer
    assert a._connections.routes_to(b.peer_id)
    with pytest.raises(RemoteError, match="bad_address"):
        await b.call(a.peer_id, ANNOUNCE, Announcement(False, ["/ip4/1.2.3/tcp/1"]), timeout=20)


def on_loopback(port=4001):
    return HostConfig(announce=[Multiaddr("ip4", "127.0.0.1", port)])


@simulated()
async def test_loopback_is_of_no_use_to_other_machines(swarm, caplog):
    """The default of host_maddrs, in a swarm of several machines: the mistake that the warning is for."""
    a, b = await swarm.host("a"), await swarm.host("b", on_loopback())
    await b.connect(a.listen_addresses[0], timeout=5)
    seen = len(swarm.network.connections)
    result = await b.check_reachability([a.peer_id])
    assert result.reachable is False
    assert "another machine" in result.failures["/ip4/127.0.0.1/tcp/4001"]
    assert not b.reachability.is_full
    assert "host_maddrs" in caplog.text
    assert len(swarm.network.connections) == seen, "nothing was dialed"


@simulated()
async def test_loopback_reaches_who_is_on_the_same_machine(swarm, caplog):
    machine = swarm.network.host("one")
    first, second = Host(make_identity("a"), machine), Host(make_identity("b"), machine, on_loopback())
    swarm.hosts += [first, second]
    await first.start([machine.address(4000)])
    await second.start([machine.address(4001)])
    await second.connect(first.listen_addresses[0], timeout=5)
    assert (await second.check_reachability([first.peer_id])).reachable is True


@simulated()
async def test_helpers_dial_the_askers_own_address_only(swarm, caplog):
    a, b = await swarm.pair()
    victim = await swarm.host("victim")
    seen = len(swarm.network.connections)
    request = DialBackRequest([str(address) for address in victim.listen_addresses])
    assert (await b.call(a.peer_id, DIAL_BACK, request, timeout=20)).outcomes == {}
    assert len(swarm.network.connections) == seen
    with pytest.raises(RemoteError, match="bad_address"):
        await b.call(a.peer_id, DIAL_BACK, DialBackRequest(["/ip4/1.2.3/tcp/1"]), timeout=20)


@simulated()
async def test_helpers_are_not_asked_too_often(swarm, caplog):
    a, b = await swarm.pair()
    request = DialBackRequest([str(address) for address in b.listen_addresses])
    for _ in range(3):
        assert list((await b.call(a.peer_id, DIAL_BACK, request, timeout=20)).outcomes.values()) == [None]
        with pytest.raises(RemoteError, match="rate_limited"):
            await b.call(a.peer_id, DIAL_BACK, request, timeout=20)
        assert (await b.check_reachability([a.peer_id])).reachable is None
        await asyncio.sleep(6)
    assert b.reachability.is_full


@simulated()
async def test_helpers_that_do_not_answer_change_nothing(swarm, caplog):
    a, b = await swarm.pair()
    swarm.network.silence("a", "b")
    result = await b.check_reachability([a.peer_id], timeout=3)
    assert result.reachable is None
    assert b.reachability.is_full


def test_everything_is_the_same_in_every_run():
    async def main():
        trace = []
        async with Swarm(latency=(0.005, 0.05)) as swarm:
            hosts = [await swarm.host(f"h{n}") for n in range(4)]
            for host in hosts:
                for other in hosts:
                    host.add_addresses(other.peer_id, other.listen_addresses)
                host.on_disconnect(lambda peer, ending: trace.append((now(), str(peer), ending)))

            async def talk(host, other):
                await host.call(other.peer_id, ECHO, Number(1), timeout=5)
                trace.append((now(), str(host.peer_id), str(other.peer_id)))

            await asyncio.gather(*(talk(x, y) for x in hosts for y in hosts if x is not y))
            swarm.network.partition(["h0", "h1"], ["h2", "h3"])
            await asyncio.sleep(60)
            swarm.network.heal()
            await asyncio.gather(*(talk(x, y) for x in hosts for y in hosts if x is not y))
        return trace

    first = clock.run(main)
    assert len(first) > 24
    assert clock.run(main) == first
