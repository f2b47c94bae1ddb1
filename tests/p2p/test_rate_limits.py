"""What a host sends and receives of bulk data stays within its rates, over one connection and over several."""

from __future__ import annotations

import asyncio
import itertools
from typing import Any

import pytest
from tests.p2p.test_host import ECHO, Swarm

from shoal.p2p.config import HostConfig
from shoal.p2p.host import Host
from shoal.p2p.protocol.rate_limit import BURST_SECONDS, RateLimit
from shoal.p2p.rpc import Lane, Stream
from shoal.testing.clock import run
from shoal.testing.conformance.world import STREAM, Number

RATE = 1e6
SIZE, COUNT = 250_000, 40


def test_what_was_spent_is_paid_for_before_more_is():
    limit = RateLimit(1000.0)
    assert limit.wait(5.0) == 0.0
    limit.spend(3000, 5.0)
    assert limit.wait(5.0) == pytest.approx(3.0 - BURST_SECONDS)
    assert limit.wait(9.0) == 0.0


def test_a_pause_is_not_saved_up():
    limit = RateLimit(1000.0)
    limit.spend(100, 0.0)
    moved, now = 0, 1000.0
    while now < 1010.0:
        limit.spend(100, now)
        moved += 100
        now += max(limit.wait(now), 1e-6)
    assert moved == pytest.approx(10_000, rel=0.02)


def test_without_a_rate_nothing_waits():
    limit = RateLimit(None)
    limit.spend(1 << 40, 0.0)
    assert limit.wait(0.0) == 0.0
    assert limit.quantum is None


@pytest.mark.parametrize("lanes", [0, 4])
@pytest.mark.parametrize("side", ["upload", "download"])
def test_a_rate_is_kept_within_five_percent(side: str, lanes: int):
    async def main() -> None:
        async with Swarm() as swarm:
            limits = {f"max_{side}_rate": RATE}
            a = await swarm.host(
                "a", HostConfig(lanes_per_peer=lanes, **(limits if side == "download" else {}))
            )
            b = await swarm.host(
                "b", HostConfig(lanes_per_peer=lanes, **(limits if side == "upload" else {}))
            )
            b.add_addresses(a.peer_id, a.listen_addresses)

            async def receive(stream: Stream) -> None:
                stream.accept_payloads(None, 4 * SIZE)
                await stream.send(Number(0))
                for _ in range(COUNT):
                    await stream.receive()
                await stream.send(Number(1))

            async def send() -> None:
                async with b.open_stream(a.peer_id, STREAM, lane=Lane.BULK) as stream:
                    await stream.receive()
                    for index in range(COUNT):
                        await stream.send_payload(index, bytes(SIZE))
                    assert (await stream.receive()).value == 1

            a.serve_stream(STREAM, receive)
            began = asyncio.get_running_loop().time()
            await asyncio.gather(send(), send())  # the rate is that of all streams together
            took = asyncio.get_running_loop().time() - began
            report = b.lane_report(a.peer_id)
            assert report is not None
            assert report.resent < 0.1 * 2 * SIZE * COUNT
            assert (2 * SIZE * COUNT + report.resent) / took == pytest.approx(RATE, rel=0.05)
            # What is no bulk data is not held up.
            before = asyncio.get_running_loop().time()
            sending = asyncio.ensure_future(send())
            await asyncio.sleep(1.0)
            await b.call(a.peer_id, ECHO, Number(1), timeout=10)
            assert asyncio.get_running_loop().time() - before < 1.5
            await sending

    run(main)


async def take_all(stream: Stream, size: int, received: list[int]) -> None:
    stream.accept_payloads(None, 4 * size)
    await stream.send(Number(0))
    while True:
        received.append(len((await stream.receive()).data))


async def send_without_end(one: Host, other: Host, size: int) -> None:
    async with one.open_stream(other.peer_id, STREAM, lane=Lane.BULK) as stream:
        await stream.receive()
        while True:
            await stream.send_payload(1, bytes(size))


@pytest.mark.parametrize("lanes", [0, 4])
@pytest.mark.parametrize("side", ["upload", "download"])
def test_peers_share_a_rate_evenly(side: str, lanes: int):
    """Woken all at once, the same ones would always be first."""

    async def main() -> None:
        async with Swarm() as swarm:
            limits: dict[str, Any] = {f"max_{side}_rate": RATE}
            limited = await swarm.host("limited", HostConfig(lanes_per_peer=lanes, **limits))
            received: list[list[int]] = [[], [], []]
            numbers, sending = itertools.count(), []
            for number in range(3):
                other = await swarm.host(f"other{number}", HostConfig(lanes_per_peer=lanes))
                sender, receiver = (limited, other) if side == "upload" else (other, limited)
                sender.add_addresses(receiver.peer_id, receiver.listen_addresses)
                if side == "upload" or number == 0:
                    receiver.serve_stream(
                        STREAM, lambda stream: take_all(stream, SIZE, received[next(numbers)])
                    )
                sending.append(asyncio.ensure_future(send_without_end(sender, receiver, SIZE)))
            await asyncio.sleep(20.0)
            for task in sending:
                task.cancel()
            await asyncio.gather(*sending, return_exceptions=True)
        shares = [sum(one) / (20.0 * RATE) for one in received]
        assert max(shares) < 1.2 * min(shares), shares
        assert 0.8 < sum(shares) < 1.05, "what has arrived of payloads that are under way does not count"

    run(main)


def test_a_receiver_that_gives_up_again_and_again_does_not_exceed_the_rate():
    async def main() -> None:
        async with Swarm() as swarm:
            sender = await swarm.host("sender", HostConfig(max_upload_rate=RATE))
            receiver = await swarm.host("receiver")
            receiver.add_addresses(sender.peer_id, sender.listen_addresses)

            async def give(stream: Stream) -> None:
                while True:
                    await stream.send_payload(1, bytes(1 << 20))

            sender.serve_stream(STREAM, give)
            for _ in range(50):
                async with receiver.open_stream(sender.peer_id, STREAM, lane=Lane.BULK) as stream:
                    stream.accept_payloads(None, 2 << 20)
                    await asyncio.sleep(0.1)
                await asyncio.sleep(0.1)
            connections = sender._connections._all_to(receiver.peer_id)
            assert 5e6 < sum(one.outlet.written for one in connections) < 12.5e6

    run(main)


@pytest.mark.parametrize(
    ("side", "count", "rate", "seconds"), [("upload", 32, 125_000.0, 60.0), ("download", 6, 25_000.0, 100.0)]
)
def test_a_low_rate_is_no_death(side: str, count: int, rate: float, seconds: float):
    """Peers that wait for their turn, or are read slowly, hear signs of life all the same."""

    async def main() -> None:
        async with Swarm() as swarm:
            limits: dict[str, Any] = {f"max_{side}_rate": rate}
            limited = await swarm.host("limited", HostConfig(**limits))
            sending = []
            for number in range(count):
                other = await swarm.host(f"other{number}")
                sender, receiver = (limited, other) if side == "upload" else (other, limited)
                sender.add_addresses(receiver.peer_id, receiver.listen_addresses)
                if side == "upload" or number == 0:
                    receiver.serve_stream(STREAM, lambda stream: take_all(stream, 1 << 19, []))
                sending.append(asyncio.ensure_future(send_without_end(sender, receiver, 1 << 19)))
            await asyncio.sleep(seconds)
            assert not [task for task in sending if task.done()]
            for task in sending:
                task.cancel()
            await asyncio.gather(*sending, return_exceptions=True)

    run(main)


def test_peers_that_take_less_than_their_share_hold_up_nobody_else():
    """So few payloads may be under way at this rate that those to slow peers could be all of them."""

    async def main() -> None:
        async with Swarm() as swarm:
            sender = await swarm.host("sender", HostConfig(max_upload_rate=125_000.0))
            received: list[int] = []
            sending = []
            for number in range(8):
                rate = None if number == 7 else 4000.0
                other = await swarm.host(f"other{number}", HostConfig(max_download_rate=rate))
                taken = received if number == 7 else []
                other.serve_stream(STREAM, lambda stream, taken=taken: take_all(stream, 1 << 21, taken))
                sender.add_addresses(other.peer_id, other.listen_addresses)
                sending.append(asyncio.ensure_future(send_without_end(sender, other, 1 << 21)))
            await asyncio.sleep(150.0)
            before = sum(received)
            await asyncio.sleep(150.0)
            assert not [task for task in sending if task.done()]
            assert sum(received) - before > 0.5 * 150.0 * 125_000.0
            for task in sending:
                task.cancel()
            await asyncio.gather(*sending, return_exceptions=True)

    run(main)
