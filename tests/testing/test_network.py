"""The simulated network itself: bytes in order, back-pressure, bandwidth, and faults that do what they say."""

from __future__ import annotations

import asyncio
import random

import pytest

from shoal.p2p.multiaddr import Multiaddr
from shoal.testing.clock import run
from shoal.testing.network import CONNECT_TIMEOUT, SimulatedNetwork


class Recorder(asyncio.BufferedProtocol):
    """Notes everything that happens to a connection."""

    def __init__(self):
        self.data = bytearray()
        self.events = []
        self.ended = asyncio.get_running_loop().create_future()
        self._memory = memoryview(bytearray(1000))

    def connection_made(self, transport):
        self.transport = transport
        transport.set_write_buffer_limits(high=100_000, low=10_000)

    def get_buffer(self, hint):
        return self._memory

    def buffer_updated(self, count):
        self.data += self._memory[:count]
        self.events.append(("data", now()))

    def eof_received(self):
        self.events.append(("eof", now()))
        return False

    def pause_writing(self):
        self.events.append(("pause", now()))

    def resume_writing(self):
        self.events.append(("resume", now()))

    def connection_lost(self, error):
        self.events.append(("lost", now()))
        self.ended.set_result(error)


def now():
    return asyncio.get_running_loop().time()


def make_network(**options):
    return SimulatedNetwork(random.Random(1), **{"latency": (0.5, 0.5), **options})


async def connect(network, a="a", b="b"):
    accepted = []

    def accept():
        accepted.append(Recorder())
        return accepted[0]

    listener = await network.host(b).listen(accept, network.host(b).address())
    transport = await network.host(a).connect(Recorder, listener.address)
    listener.close()
    await listener.wait_closed()
    return transport._protocol, accepted[0]


def test_bytes_arrive_whole_in_order_and_after_the_latency():
    async def main():
        near, far = await connect(make_network())
        assert now() == 1.0
        sent = bytes(range(256)) * 1000
        near.transport.writelines([sent[:10], sent[10:200_000]])
        near.transport.write(sent[200_000:])
        await asyncio.sleep(0.4)
        assert not far.data
        await asyncio.sleep(10)
        assert far.data == sent
        near.transport.close()
        assert await far.ended is None
        assert far.events[-2][0] == "eof"
        assert near.transport.is_closing()

    run(main)


def test_pairs_draw_their_latency_from_the_seed():
    async def connect_time(seed):
        network = SimulatedNetwork(random.Random(seed), latency=(0.01, 1.0))
        begin = now()
        near, far = await connect(network)
        near.transport.abort()
        await far.ended
        return now() - begin

    async def main():
        return [await connect_time(seed) for seed in (1, 1, 2)]

    first, again, other = run(main)
    assert first == pytest.approx(again)
    assert first != pytest.approx(other)


def test_bandwidth_is_shared_and_a_full_path_pauses_the_writer():
    async def main():
        near, far = await connect(make_network(bandwidth=100_000.0))
        begin = now()
        near.transport.write(bytes(1_000_000))
        assert near.events == [("pause", begin)]
        await asyncio.sleep(9.9)
        assert len(far.data) < 1_000_000
        await asyncio.sleep(5)
        assert len(far.data) == 1_000_000
        assert [kind for kind, _ in near.events] == ["pause", "resume"]
        assert near.transport.get_write_buffer_size() == 0
        near.transport.abort()
        await far.ended

    run(main)


def test_a_reader_that_pauses_holds_back_the_writer():
    async def main():
        near, far = await connect(make_network())
        far.transport.pause_reading()
        near.transport.write(bytes(500_000))
        await asyncio.sleep(100)
        assert near.transport.get_write_buffer_size() == 500_000
        assert not far.data
        far.transport.resume_reading()
        await asyncio.sleep(10)
        assert len(far.data) == 500_000
        near.transport.abort()
        assert isinstance(await far.ended, ConnectionResetError)
        await near.ended

    run(main)


def test_nobody_listens_nobody_is_there():
    async def main():
        network = make_network()
        address = network.host("b").address(5)
        with pytest.raises(ConnectionRefusedError):
            await network.host("a").connect(Recorder, address)
        network.silence("a", "b")
        begin = now()
        with pytest.raises(TimeoutError):
            await network.host("a").connect(Recorder, address)
        assert now() - begin == CONNECT_TIMEOUT
        listener = await network.host("b").listen(Recorder, address)
        with pytest.raises(OSError, match="in use"):
            await network.host("b").listen(Recorder, address)
        with pytest.raises(OSError, match="not an address"):
            await network.host("a").listen(Recorder, address)
        listener.close()

    run(main)


def test_a_dialer_that_gives_up_leaves_nothing_behind():
    async def main():
        network = make_network()
        accepted = []

        def accept():
            accepted.append(Recorder())
            return accepted[-1]

        listener = await network.host("b").listen(accept, network.host("b").address())
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.7):
                await network.host("a").connect(Recorder, listener.address)
        assert isinstance(await accepted[0].ended, ConnectionResetError)
        assert not network.connections

    run(main)


def test_dropped_connections_end_for_both():
    async def main():
        network = make_network()
        near, far = await connect(network)
        assert network.drop_connections("b", "a") == 1
        assert isinstance(await near.ended, ConnectionResetError)
        assert isinstance(await far.ended, ConnectionResetError)

    run(main)


@pytest.mark.parametrize("fault", ["silence", "partition"])
def test_bytes_vanish_without_a_sign_until_healed(fault):
    async def main():
        network = make_network()
        near, far = await connect(network)
        if fault == "silence":
            network.silence("a", "b")
        else:
            network.partition(["a"], ["b", "c"])
        near.transport.write(b"lost")
        await asyncio.sleep(1000)
        assert not near.ended.done()
        assert not far.data
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(50):
                await network.host("a").connect(Recorder, network.host("b").address(1))
        network.heal()
        # What was lost cannot be delivered any more, so the connection cannot go on.
        assert isinstance(await near.ended, ConnectionResetError)
        assert isinstance(await far.ended, ConnectionResetError)

    run(main)


def test_a_partition_in_which_nothing_was_sent_leaves_no_trace():
    async def main():
        network = make_network()
        near, far = await connect(network)
        network.partition(["a"], ["b"])
        await asyncio.sleep(10)
        network.heal()
        near.transport.write(b"hello")
        await asyncio.sleep(1)
        assert far.data == b"hello"
        near.transport.abort()
        await far.ended

    run(main)


def test_a_killed_host_is_gone_and_may_come_back():
    async def main():
        network = make_network()
        near, far = await connect(network)
        network.kill("b")
        assert isinstance(await near.ended, ConnectionResetError)
        with pytest.raises(ConnectionRefusedError):
            await network.host("a").connect(Recorder, network.host("b").address(1))
        with pytest.raises(OSError, match="killed"):
            await network.host("b").listen(Recorder, network.host("b").address(1))
        network.revive("b")
        near, far = await connect(network)
        network.kill("b", silently=True)
        await far.ended
        await asyncio.sleep(1000)
        assert not near.ended.done()
        near.transport.abort()
        await near.ended

    run(main)


def ends_of(network, dialer, address):
    """What the two ends of a connection see of each other; None if nothing answers within a second."""

    async def main():
        accepted = []

        def accept():
            accepted.append(Recorder())
            return accepted[0]

        await network.host("server").listen(accept, network.host("server").address(4000))
        try:
            async with asyncio.timeout(5):
                near = await network.host(dialer).connect(Recorder, address)
        except TimeoutError:
            return None
        far = accepted[0].transport
        return near.get_extra_info("peername")[0], far.get_extra_info("peername")[0]

    return run(main)


def test_behind_a_nat_only_forwarded_ports_lead_in_and_outside_all_look_alike():
    def network():
        made = make_network()
        assert made.site("server", "mate", forwards={80: ("server", 4000)}) == "203.0.113.1"
        made.site("stranger")
        return made

    inner, outer = Multiaddr("ip4", "192.168.1.1", 4000), Multiaddr("ip4", "203.0.113.1", 80)
    assert ends_of(network(), "public", outer) == ("203.0.113.1", "10.0.0.4")
    assert ends_of(network(), "public", outer.with_port(4000)) is None
    assert ends_of(network(), "public", inner) is None
    assert ends_of(network(), "mate", inner) == ("192.168.1.1", "192.168.1.2")
    assert ends_of(network(), "stranger", outer) == ("203.0.113.1", "203.0.113.2")
    assert ends_of(network(), "stranger", inner) is None


def test_a_router_may_refuse_what_it_does_not_forward():
    async def main():
        network = make_network()
        network.site("inside", refuses=True)
        with pytest.raises(ConnectionRefusedError):
            await network.host("outside").connect(Recorder, Multiaddr("ip4", "203.0.113.1", 80))

    run(main)


def test_silence_may_hold_one_way_only():
    async def main():
        network = make_network()
        near, far = await connect(network)
        network.silence("a", "b", one_way=True)
        near.transport.write(b"unheard")
        far.transport.write(b"heard")
        await asyncio.sleep(10)
        assert (bytes(near.data), bytes(far.data)) == (b"heard", b"")

    run(main)


@pytest.mark.parametrize("fault", ["hold", "freeze"])
def test_what_is_held_arrives_later_whole_and_in_order(fault):
    async def main():
        network = make_network()
        near, far = await connect(network)
        near.transport.write(b"one")
        began = now()
        await asyncio.sleep(0.1)
        if fault == "hold":
            network.hold("a", "b", 5.0)
        else:
            network.freeze("b", 5.0)
        near.transport.write(b"two")
        await asyncio.sleep(4.8)
        assert (bytes(far.data), far.events) == (b"", [])
        near.transport.write(b"six")
        await asyncio.sleep(2.0)
        assert bytes(far.data) == b"onetwosix"
        assert far.events[0][1] - began == pytest.approx(5.1)

    run(main)


def test_a_host_that_moved_answers_at_its_new_address_alone():
    async def main():
        network = make_network()
        host = network.host("b")
        await host.listen(Recorder, Multiaddr("ip4", "0.0.0.0", 4000))
        old = host.address(4000)
        transport = await network.host("a").connect(Recorder, old)
        network.move("b", "10.9.0.1")
        transport.write(b"to where it was")
        await asyncio.sleep(10)
        assert not transport.other._protocol.data
        assert not transport._protocol.ended.done(), "nobody tells the other end"
        await network.host("a").connect(Recorder, Multiaddr("ip4", "10.9.0.1", 4000))
        with pytest.raises(TimeoutError):
            await network.host("a").connect(Recorder, old)

    run(main)


def test_a_revived_host_resets_what_it_knows_nothing_of():
    async def main():
        network = make_network()
        near, _ = await connect(network)
        network.kill("b", silently=True)
        await asyncio.sleep(10)
        assert not near.ended.done()
        network.revive("b")
        near.transport.write(b"are you there?")
        assert isinstance(await near.ended, ConnectionResetError)

    run(main)
