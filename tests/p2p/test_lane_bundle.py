"""How lanes are opened, used and left as the kernel's figures change. The figures are made up, the time is virtual."""

from __future__ import annotations

import asyncio
from collections import defaultdict
from typing import Any

import pytest
from tests.p2p.test_host import Swarm

from shoal.p2p import tcp_info
from shoal.p2p.config import HostConfig
from shoal.p2p.connection_writer import LEAST_UNSENT, ConnectionWriter
from shoal.p2p.host import Host
from shoal.p2p.lanes import bundle
from shoal.p2p.protocol.session import Role
from shoal.p2p.rpc import Lane, Stream
from shoal.p2p.tcp_info import TcpInfo
from shoal.testing.clock import run
from shoal.testing.conformance.world import STREAM, Number

SIZE = 200_000


class Kernel:
    """What it would say of each connection: a round-trip time, and a part of the packets lost."""

    def __init__(self) -> None:
        self.rtt = 0.1
        self.min_rtt = 0.1
        """No more than ``rtt``."""
        self.loss = 0.0
        self.algorithm = "cubic"
        self.asked_for: list[str] = []
        self.bounds: list[int] = []
        self.paced: list[Any] = []
        """Connections that are paced."""
        self.is_still = False
        """Whether nothing is sent or confirmed."""
        self.capacity = 1000
        """More lanes carry less than so many."""
        self._read: dict[Any, float] = {}
        self.vanishing: dict[Any, int] = {}
        """Connections of which all packets vanish, and how many bytes each had confirmed before."""
        self._counts: defaultdict[Any, list[float]] = defaultdict(lambda: [0.0, 0.0, 0.0])

    def read(self, transport: Any) -> TcpInfo:
        counts = self._counts[transport]
        sent = 100 * bundle.TICK / 0.05 * min(1.0, (self.capacity / max(1, len(self._read))) ** 1.3)
        sent *= not self.is_still
        now = asyncio.get_running_loop().time()
        self._read = {one: at for one, at in self._read.items() if now - at < 0.1} | {transport: now}
        counts[0] += sent
        counts[1] += sent * self.loss
        counts[2] += sent * 1400
        is_mute = transport in self.vanishing
        return TcpInfo(
            self.rtt,
            min(self.rtt, self.min_rtt),
            *(int(count) for count in counts),
            window=100 * 1448,
            threshold=50 * 1448,
            timeout=0.3,
            timeouts=4 if is_mute else 0,
            silence=9.0 if is_mute else 0.0,
        )

    def total_of(self, host: Host) -> float:
        """Segments that the connections of a host have sent."""
        transports = [one.writer.transport for one in host._connections._connections]
        return sum(counts[0] for one, counts in self._counts.items() if one in transports)

    def unsent(self, transport: asyncio.Transport, written: int) -> int:
        return written - self.vanishing.get(transport, written)

    def congestion_control(self, transport: Any) -> str:
        return self.algorithm

    def choose(self, transport: Any, name: str) -> None:
        self.asked_for.append(name)

    def enable_pacing(self, transport: Any) -> None:
        self.paced.append(transport)

    def keep_little_unsent(self, transport: Any, nbytes: int) -> None:
        self.bounds.append(nbytes)


@pytest.fixture
def kernel(monkeypatch: pytest.MonkeyPatch) -> Kernel:
    made = Kernel()
    monkeypatch.setattr(tcp_info, "read", made.read)
    monkeypatch.setattr(tcp_info, "congestion_control", made.congestion_control)
    monkeypatch.setattr(tcp_info, "choose_congestion_control", made.choose)
    monkeypatch.setattr(tcp_info, "keep_little_unsent", made.keep_little_unsent)
    monkeypatch.setattr(tcp_info, "enable_pacing", made.enable_pacing)
    return made


async def sending(swarm: Swarm, config: HostConfig = HostConfig()) -> tuple[Host, Host, asyncio.Task[None]]:
    """Two hosts, of which the second sends payloads without end."""
    a, b = await swarm.pair(config)
    swarm.network.set_bandwidth("a", "b", 3e6)

    async def receive(stream: Stream) -> None:
        stream.accept_payloads(None, 20 * SIZE)
        await stream.send(Number(0))
        while True:
            await stream.receive()

    async def send() -> None:
        async with b.open_stream(a.peer_id, STREAM, lane=Lane.BULK) as stream:
            await stream.receive()
            while True:
                await stream.send_payload(0, bytes(SIZE))

    a.serve_stream(STREAM, receive)
    return a, b, asyncio.ensure_future(send())


def lanes(one: Host, other: Host) -> int:
    report = one.lane_report(other.peer_id)
    assert report is not None
    return report.lanes


def test_lanes_follow_loss_without_a_queue_and_leave_when_it_is_full(kernel: Kernel):
    async def main() -> None:
        async with Swarm() as swarm:
            a, b, task = await sending(swarm, HostConfig(max_lanes=24))
            await asyncio.sleep(2.0)
            assert lanes(b, a) == 4
            kernel.loss = 0.001
            await asyncio.sleep(8.0)
            assert lanes(b, a) == 24
            report = b.lane_report(a.peer_id)
            assert report is not None
            assert "there may be no more than 24" in report.reason
            measured = b.upload_rate
            assert measured == pytest.approx(
                24 * 100 * 1400 / 0.05, rel=0.2
            )  # what the kernel said of all lanes
            assert a.upload_rate is None
            kernel.rtt = 0.3
            await asyncio.sleep(30.0)
            assert lanes(b, a) == 1
            connections, incarnation = b._connections.to(a.peer_id), b.incarnation(a.peer_id)
            assert connections is not None
            assert incarnation is not None
            last = [one.last_piece for one in connections.stripes(incarnation)]
            assert asyncio.get_running_loop().time() - max(last) < 1.0  # it is one whose window is open
            task.cancel()

    run(main)


def test_losses_of_a_queue_that_was_full_bring_no_lanes(kernel: Kernel):
    """Each slow start ends in a full queue, whose losses are counted when it is empty again."""

    async def main() -> None:
        async with Swarm() as swarm:
            a, b, task = await sending(swarm)
            for _ in range(4):
                await asyncio.sleep(2.0)
                kernel.rtt = 0.3
                await asyncio.sleep(0.1)
                kernel.rtt, kernel.loss = 0.1, 0.05
                await asyncio.sleep(0.5)
                kernel.loss = 0.0
                assert lanes(b, a) <= 4
            task.cancel()

    run(main)


def test_what_lanes_said_before_a_pause_is_no_full_queue(kernel: Kernel):
    async def main() -> None:
        async with Swarm() as swarm:
            a, b, task = await sending(swarm)
            await asyncio.sleep(2.0)
            task.cancel()
            kernel.rtt, kernel.is_still = 0.3, True  # the kernel's figures stay as they were
            await asyncio.sleep(5.0)
            async with b.open_stream(a.peer_id, STREAM, lane=Lane.BULK) as stream:
                await stream.receive()

                async def send() -> None:
                    while True:
                        await stream.send_payload(0, bytes(SIZE))

                task = asyncio.ensure_future(send())
                await asyncio.sleep(0.2)
                kernel.rtt, kernel.is_still, kernel.loss = 0.1, False, 0.01
                await asyncio.sleep(0.4)
                report = b.lane_report(a.peer_id)
                assert report is not None
                assert "lost without a queue" in report.reason
                task.cancel()

    run(main)


def test_a_few_lanes_of_a_long_path_send_without_bursts(kernel: Kernel):
    async def main() -> None:
        kernel.loss = 0.001
        async with Swarm() as swarm:
            a, b, task = await sending(swarm, HostConfig(max_lanes=12))
            await asyncio.sleep(8.0)
            assert lanes(b, a) == 12
            assert len(set(kernel.paced)) == 2 * 4  # at both ends
            task.cancel()

    run(main)


def test_a_short_path_has_one_lane(kernel: Kernel):
    async def main() -> None:
        kernel.rtt = 0.0005
        async with Swarm() as swarm:
            a, b, task = await sending(swarm)
            await asyncio.sleep(3.0)
            assert b.count_connections(a.peer_id)[Lane.STRIPE] == 0
            assert kernel.asked_for == []
            assert kernel.paced == []
            assert b.upload_rate is None
            task.cancel()

    run(main)


def test_what_was_learned_of_a_path_is_kept_and_unused_lanes_are_closed(kernel: Kernel):
    async def main() -> None:
        kernel.loss = 0.001
        async with Swarm() as swarm:
            a, b, task = await sending(swarm, HostConfig(max_lanes=16, idle_lane_timeout=20))
            await asyncio.sleep(8.0)
            before = lanes(b, a)
            assert before >= 8
            task.cancel()
            await asyncio.sleep(90.0)
            assert b.count_connections(a.peer_id)[Lane.STRIPE] == 0
            async with b.open_stream(a.peer_id, STREAM, lane=Lane.BULK) as stream:
                await stream.receive()
                await asyncio.sleep(1.0)
                assert lanes(b, a) == before

    run(main)


@pytest.mark.sweep
def test_all_paths_share_the_limit(kernel: Kernel):
    async def main() -> None:
        kernel.loss = 0.001
        async with Swarm() as swarm:
            a, b, task = await sending(swarm, HostConfig(max_lanes=16))
            c = await swarm.host("c")
            b.add_addresses(c.peer_id, c.listen_addresses)

            async def receive(stream: Stream) -> None:
                stream.accept_payloads(None, 20 * SIZE)
                await stream.send(Number(0))
                while True:
                    await stream.receive()

            c.serve_stream(STREAM, receive)

            async def send() -> None:
                async with b.open_stream(c.peer_id, STREAM, lane=Lane.BULK) as stream:
                    await stream.receive()
                    while True:
                        await stream.send_payload(0, bytes(SIZE))

            other = asyncio.ensure_future(send())
            await asyncio.sleep(10.0)
            assert lanes(b, a) <= 8
            assert lanes(b, c) <= 8
            task.cancel()
            other.cancel()

    run(main)


def test_whoever_sends_watches_the_path(kernel: Kernel):
    """Of a download the donor sends, on a stream that the other side has opened."""

    async def main() -> None:
        kernel.loss = 0.001
        async with Swarm() as swarm:
            a, b = await swarm.pair(HostConfig(max_lanes=8))
            swarm.network.set_bandwidth("a", "b", 3e6)

            async def donate(stream: Stream) -> None:
                await stream.receive()
                while True:
                    await stream.send_payload(0, bytes(SIZE))

            a.serve_stream(STREAM, donate)
            async with b.open_stream(a.peer_id, STREAM, lane=Lane.BULK) as stream:
                stream.accept_payloads(None, 20 * SIZE)
                await stream.send(Number(0))
                async with asyncio.timeout(8.0):
                    await stream.receive()
                    while lanes(a, b) < 8:
                        await stream.receive()
                stream.reset()
            await asyncio.sleep(1.0)
            assert not next(iter(a._connections._stripes._bundles)).is_busy

    run(main)


def test_a_full_queue_is_heeded_also_where_lanes_are_missing(kernel: Kernel):
    """The other side takes fewer than are wanted."""

    async def main() -> None:
        kernel.loss = 0.001
        async with Swarm() as swarm:
            a, b, task = await sending(swarm, HostConfig(max_lanes=24, max_connections_per_peer=12))
            await asyncio.sleep(8.0)
            connections = b._connections.to(a.peer_id)
            assert connections is not None
            assert next(iter(connections.bundles.values())).wanted > lanes(b, a) > 4
            kernel.rtt = 0.3
            await asyncio.sleep(20.0)
            assert lanes(b, a) == 1
            task.cancel()

    run(main)


@pytest.mark.parametrize("name", ["bbr", ""])
def test_bulk_connections_over_long_paths_ask_for_a_congestion_control(kernel: Kernel, name: str):
    async def main() -> None:
        async with Swarm() as swarm:
            _, _, task = await sending(swarm, HostConfig(congestion_control=name))
            await asyncio.sleep(2.0)
            assert set(kernel.asked_for) == {name}
            task.cancel()

    run(main)


def test_a_peer_that_has_moved_is_at_the_end_of_another_path(kernel: Kernel):
    async def main() -> None:
        kernel.rtt = 0.0005
        async with Swarm() as swarm:
            a, b, task = await sending(swarm)
            await asyncio.sleep(2.0)
            assert lanes(b, a) == 1
            task.cancel()
            kernel.rtt = 0.1
            swarm.network.move("b", "10.9.9.9")
            await asyncio.sleep(60.0)
            async with b.open_stream(a.peer_id, STREAM, lane=Lane.BULK) as stream:
                await stream.receive()
                await asyncio.sleep(1.0)
                assert b.count_connections(a.peer_id)[Lane.STRIPE] == 4

    run(main)


def test_a_path_on_which_little_moves_is_measured_too(kernel: Kernel):
    """A payload now and then, and a link on which the socket takes nothing for a while."""

    async def main() -> None:
        kernel.rtt = 0.0005
        async with Swarm() as swarm:
            a, b = await swarm.pair()
            swarm.network.set_bandwidth("a", "b", 5e5)

            async def receive(stream: Stream) -> None:
                stream.accept_payloads(None, 4 * SIZE)
                await stream.send(Number(0))
                while True:
                    await stream.receive()

            a.serve_stream(STREAM, receive)
            async with b.open_stream(a.peer_id, STREAM, lane=Lane.BULK) as stream:
                await stream.receive()
                for _ in range(6):
                    await stream.send_payload(0, bytes(SIZE))
                    await asyncio.sleep(0.3)
                report = b.lane_report(a.peer_id)
                assert report is not None
                assert report.rate > 0
                assert report.segments_sent > 0

    run(main)


@pytest.mark.parametrize(("bandwidth", "least", "most"), [(3e5, 1.0, 1.0), (4e7, 8.0, 64.0)])
def test_a_lane_holds_unsent_what_it_sends_soon(kernel: Kernel, bandwidth: float, least: float, most: float):
    """A slow one would sit on more; a fast one would run dry."""

    async def main() -> None:
        async with Swarm() as swarm:
            a, b, task = await sending(swarm)
            swarm.network.set_bandwidth("a", "b", bandwidth)
            await asyncio.sleep(6.0)
            assert lanes(b, a) == 4
            assert min(kernel.bounds) == LEAST_UNSENT
            assert least <= max(kernel.bounds) / LEAST_UNSENT <= most
            task.cancel()

    run(main)


def test_a_lane_whose_packets_vanish_is_replaced_within_seconds(
    kernel: Kernel, monkeypatch: pytest.MonkeyPatch
):
    async def main() -> None:
        async with Swarm() as swarm:
            a, b, task = await sending(swarm)
            await asyncio.sleep(3.0)
            connections = b._connections.to(a.peer_id)
            incarnation = b.incarnation(a.peer_id)
            assert connections is not None
            assert incarnation is not None
            before = connections.stripes(incarnation)
            assert len(before) == 4
            unsent = ConnectionWriter.unsent.fget  # type: ignore[attr-defined]
            monkeypatch.setattr(
                ConnectionWriter,
                "unsent",
                property(lambda one: kernel.unsent(one.transport, one.written) or unsent(one)),
            )
            lost = before[1]
            kernel.vanishing[lost.writer.transport] = lost.writer.written
            await asyncio.sleep(5.0)
            assert lost.ending is not None
            assert "vanish" in lost.ending.reason
            after = connections.stripes(incarnation)
            assert len(after) == 4
            assert len(set(after) & set(before)) == 3
            task.cancel()

    run(main)


def test_a_spare_lane_carries_what_the_only_one_holds_up_and_nothing_else(
    kernel: Kernel, monkeypatch: pytest.MonkeyPatch
):
    async def main() -> None:
        async with Swarm() as swarm:
            a, b, task = await sending(swarm)
            kernel.rtt = 0.3
            await asyncio.sleep(20.0)
            assert lanes(b, a) == 1
            connections, incarnation = b._connections.to(a.peer_id), b.incarnation(a.peer_id)
            assert connections is not None
            assert incarnation is not None
            used, spare = connections.stripes(incarnation)[:2]
            loop = asyncio.get_running_loop()
            assert loop.time() - used.last_piece < 1.0
            assert loop.time() - spare.last_piece > 10.0
            unsent = ConnectionWriter.unsent.fget  # type: ignore[attr-defined]
            monkeypatch.setattr(
                ConnectionWriter,
                "unsent",
                property(lambda one: kernel.unsent(one.transport, one.written) or unsent(one)),
            )
            now = loop.time()
            kernel.vanishing[used.writer.transport] = used.writer.written
            await asyncio.sleep(1.5)
            assert spare.last_piece > now
            task.cancel()

    run(main)


def test_lanes_that_carried_no_more_do_not_come_back(kernel: Kernel):
    """Sixteen carry more than thirty-two. It is tried now and then, and not all the time."""

    async def main() -> None:
        kernel.loss, kernel.capacity = 0.001, 8
        async with Swarm() as swarm:
            a, b, task = await sending(swarm, HostConfig(max_lanes=32))
            seen = []
            for _ in range(30):
                await asyncio.sleep(0.5)
                seen.append(lanes(b, a))
            assert max(seen) == 32
            settled = seen[seen.index(32) :]
            assert settled.count(16) >= 0.8 * len(settled)
            task.cancel()

    run(main)


def test_what_is_remembered_of_the_uplink_holds_no_bundle(kernel: Kernel):
    """It is kept until the next path is measured, and a bundle holds payloads of its streams."""

    async def main() -> None:
        async with Swarm() as swarm:
            a, b, task = await sending(swarm)
            await asyncio.sleep(3.0)
            await a.close()
            await asyncio.gather(task, return_exceptions=True)
            latest = b._connections._stripes.uplink._latest
            assert len(latest) == 1
            assert not any(isinstance(path, bundle.Bundle) for path in latest)

    run(main)


def test_the_least_round_trip_time_is_the_kernels_where_it_tells(
    kernel: Kernel, monkeypatch: pytest.MonkeyPatch
):
    async def main() -> None:
        kernel.rtt = 0.3
        async with Swarm() as swarm:
            a, b = await swarm.pair()
            assert b.least_rtt(a.peer_id) == 0.1
            monkeypatch.setattr(tcp_info, "read", lambda _: None)
            assert b.rtt(a.peer_id) is not None
            assert b.least_rtt(a.peer_id) == b.rtt(a.peer_id)
            await swarm.host("c")
            assert b.least_rtt(swarm.hosts[2].peer_id) is None

    run(main)


@pytest.mark.parametrize(("first", "then"), [(0.05, 0.1), (0.001, 0.1)])
def test_lanes_are_chosen_by_the_route_that_packets_take_now(kernel: Kernel, first: float, then: float):
    async def main() -> None:
        kernel.rtt, kernel.loss = first, 0.001
        async with Swarm() as swarm:
            a, b, task = await sending(swarm, HostConfig(max_lanes=24))
            await asyncio.sleep(15.0)
            kernel.rtt = kernel.min_rtt = then
            await asyncio.sleep(90.0)
            assert lanes(b, a) == 24
            task.cancel()

    run(main)


def test_what_was_learned_lasts_while_one_home_is_where_it_was(kernel: Kernel):
    """Each side has dialed a lane for streams, over another interface."""

    async def main() -> None:
        kernel.loss = 0.001
        async with Swarm() as swarm:
            a, b, task = await sending(swarm, HostConfig(max_lanes=24))
            await asyncio.sleep(12.0)
            a.add_addresses(b.peer_id, b.listen_addresses)
            await a._connections._dial(b.peer_id, Lane.BULK, asyncio.get_running_loop().time() + 5.0)
            connections = b._connections.to(a.peer_id)
            assert connections is not None
            await asyncio.sleep(0.5)
            assert len(connections.bulk()) == 2
            connections.bulk()[-1].local_ip = "192.168.7.7"

            async def receive_some() -> None:
                async with b.open_stream(a.peer_id, STREAM, lane=Lane.BULK) as stream:
                    await stream.receive()
                    await asyncio.sleep(3.0)

            streams = []
            for _ in range(4):
                streams.append(asyncio.ensure_future(receive_some()))
                await asyncio.sleep(0.3)
                assert lanes(b, a) == 24
            await asyncio.gather(*streams)
            task.cancel()

    run(main)


@pytest.mark.parametrize("payloads", [4, 40])
def test_a_report_counts_all_that_was_sent(kernel: Kernel, payloads: int):
    """The kernel of this test counts on whenever it is asked. So the first look of a round at each connection is
    missing, and when one is made it is looked at, too.
    """

    async def main() -> None:
        kernel.loss = 0.5
        async with Swarm() as swarm:
            a, b = await swarm.pair()
            swarm.network.set_bandwidth("a", "b", 3e6)

            async def receive(stream: Stream) -> None:
                stream.accept_payloads(None, 20 * SIZE)
                await stream.send(Number(0))
                while True:
                    await stream.receive()

            a.serve_stream(STREAM, receive)
            for _ in range(2):
                before = kernel.total_of(b)
                async with b.open_stream(a.peer_id, STREAM, lane=Lane.BULK) as stream:
                    await stream.receive()
                    for _ in range(payloads):
                        await stream.send_payload(0, bytes(SIZE))
                report = b.lane_report(a.peer_id)
                assert report is not None
                missing = kernel.total_of(b) - before - report.segments_sent
                assert 0 <= missing <= 100 * (2 + len(b._connections._connections))
                assert report.retransmitted == pytest.approx(report.segments_sent / 2, rel=0.02)
                await asyncio.sleep(5.0)

    run(main)


def test_lanes_are_replaced_that_all_vanish_while_their_home_lives(
    kernel: Kernel, monkeypatch: pytest.MonkeyPatch
):
    """A router has forgotten all connections that were silent for a moment."""

    async def main() -> None:
        async with Swarm() as swarm:
            a, b, task = await sending(swarm)
            await asyncio.sleep(5.0)
            unsent = ConnectionWriter.unsent.fget  # type: ignore[attr-defined]
            monkeypatch.setattr(
                ConnectionWriter,
                "unsent",
                property(lambda one: kernel.unsent(one.transport, one.written) or unsent(one)),
            )
            lost = []
            for host in (a, b):
                for connection in list(host._connections._connections):
                    if connection.lane is Lane.STRIPE:
                        lost.append(connection)
                        monkeypatch.setattr(connection, "buffer_updated", lambda nbytes: None)
                        connection.writer.transport.pause_reading()
                        if host is b:
                            kernel.vanishing[connection.writer.transport] = connection.writer.written - 10
            assert len(lost) == 8
            await asyncio.sleep(5.0)
            connections, incarnation = b._connections.to(a.peer_id), b.incarnation(a.peer_id)
            assert connections is not None
            assert incarnation is not None
            assert all(
                connection.ending is not None for connection in lost if connection.role is Role.INITIATOR
            )
            now = asyncio.get_running_loop().time()
            assert now - max(one.last_piece for one in connections.stripes(incarnation)) < 1.0
            assert not task.done()
            task.cancel()

    run(main)
