"""What a host sends and receives of bulk data stays within its rates, over one connection and over several."""

from __future__ import annotations

import asyncio

import pytest
from tests.p2p.test_host import ECHO, Swarm

from shoal.p2p.config import HostConfig
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
