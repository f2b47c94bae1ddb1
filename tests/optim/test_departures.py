"""A peer that ends without withdrawing its record is waited for no longer, and counts again when it is back."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

import pytest

from shoal.optim.progress.departures import AWAY
from shoal.optim.progress.forecast import Forecast, Periods
from shoal.optim.progress.records import ProgressRecords
from shoal.optim.progress.values import ProgressRecord
from shoal.testing.clock import run
from shoal.testing.dht import SimulatedDHT

LIFETIME = 3600.0
"""Records of the dead stand for all of a story."""
SOON = 1.0
FOUND_SILENT = 30.0
"""Seconds within which the connection to a peer without a sign of life is given up."""


def record(samples: int) -> ProgressRecord:
    return ProgressRecord(3, samples, 0, 10.0, 0.0, client_mode=False)


class Swarm:
    """Three peers that have told of their progress; number 0 looks."""

    def __init__(self, dht: SimulatedDHT, records: list[ProgressRecords]) -> None:
        self.dht = dht
        self.records = records

    async def look(self) -> Forecast:
        return await self.records[0].look(record(1), target=1000, periods=Periods())


def in_swarm(story: Callable[[Swarm], Awaitable[None]]) -> None:
    async def main() -> None:
        dht = SimulatedDHT(1)
        nodes = await dht.start_many(3)
        records = [ProgressRecords(node, "run", lifetime=LIFETIME) for node in nodes]
        for number, one in enumerate(records):
            one.tell(record(10 * number))
        await asyncio.sleep(2.0)
        swarm = Swarm(dht, records)
        assert (await swarm.look()).num_peers == 3
        try:
            await story(swarm)
        finally:
            for one in records:
                await one.close()
            await dht.close()

    run(main)


def test_nobody_waits_for_a_peer_that_was_killed():
    async def story(swarm: Swarm) -> None:
        for number, left in ((1, 2), (2, 1)):
            await swarm.dht.kill(number)
            await asyncio.sleep(SOON)
            found = await swarm.look()
            assert found.num_peers == left
            assert found.others_samples == 30, "which others count, too"
            assert found.others_are_gone == (left == 1)

    in_swarm(story)


def test_a_machine_that_falls_silent_is_given_up_after_a_while():
    async def story(swarm: Swarm) -> None:
        await swarm.dht.kill(1, silently=True)
        await asyncio.sleep(SOON)
        assert (await swarm.look()).num_peers == 3
        await asyncio.sleep(FOUND_SILENT + AWAY)
        assert (await swarm.look()).num_peers == 2

    in_swarm(story)


def test_a_connection_that_breaks_and_comes_back_says_nothing():
    async def story(swarm: Swarm) -> None:
        assert swarm.dht.network.drop_connections("node0", "node1")
        for _ in range(3):
            await asyncio.sleep(AWAY)
            assert (await swarm.look()).num_peers == 3

    in_swarm(story)


@pytest.mark.parametrize("tells", [False, True])
def test_a_peer_that_is_back_or_tells_something_new_counts_again(tells: bool):
    async def story(swarm: Swarm) -> None:
        swarm.dht.network.silence("node0", "node1")
        await asyncio.sleep(FOUND_SILENT + AWAY)
        assert (await swarm.look()).num_peers == 2
        if tells:  # others can reach it
            swarm.records[1].tell(record(11))
        else:
            swarm.dht.network.heal()
            nodes = swarm.dht.nodes
            await nodes[1].host.connect(nodes[0].peer_id, timeout=5.0)
        await asyncio.sleep(SOON)
        assert (await swarm.look()).num_peers == 3

    in_swarm(story)
