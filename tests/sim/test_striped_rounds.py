"""Rounds whose parts travel in pieces over several lanes: the same averages, whatever happens to lanes and members."""

from __future__ import annotations

import asyncio
import random

import pytest

from shoal.averaging.allreduce.round import RoundResult, RoundTimeouts
from shoal.compression import Float16Compression
from shoal.p2p.rpc import Lane
from shoal.testing.clock import run
from shoal.testing.rounds import SimulatedGroup

SHAPES = ((400_000,), (3,), (211_111,))
PART_BYTES = 200_000
"""Three or four pieces each."""
TIMEOUTS = RoundTimeouts(None, sender=30.0, reducer=60.0)


def group_of(seed: int, size: int, **options: object) -> SimulatedGroup:
    return SimulatedGroup(seed, size, shapes=SHAPES, part_bytes=PART_BYTES, lanes=3, **options)  # type: ignore[arg-type]


def lanes_of(group: SimulatedGroup, member: int) -> list[object]:
    connections = group.hosts[member]._connections._connections
    return [one for one in connections if one.lane is Lane.STRIPE and one.is_open]


async def all_of(group: SimulatedGroup) -> list[RoundResult]:
    async with asyncio.timeout(200):
        return await asyncio.gather(*(group.run(member, timeouts=TIMEOUTS) for member in range(group.size)))


@pytest.mark.parametrize("codec", [None, Float16Compression()], ids=["raw", "lossy"])
def test_parts_are_striped_and_the_average_is_exact(codec: Float16Compression | None):
    async def main() -> None:
        async with group_of(3, 4, clients=1, codec=codec) as group:
            for member in range(4):
                group.network.set_link(group.name(member), 2e6)
            results = await all_of(group)
            assert all(result.failure is None for result in results)
            reports = [
                report
                for one in group.hosts
                for other in group.hosts
                if (report := one.lane_report(other.peer_id)) is not None
            ]
            assert max(report.lanes for report in reports) == 3
            if codec is None:
                group.check_average(range(4))

    run(main)


def stripe_rounds(seed: int) -> None:
    """Lanes are cut at random; in half of the stories a member is killed as well."""

    async def main() -> None:
        rng = random.Random(f"striped round {seed}")
        async with group_of(seed, rng.randint(3, 5), clients=rng.randint(0, 1)) as group:
            for member in range(group.size):
                group.network.set_link(group.name(member), rng.choice([1e6, 3e6]))
            victim = rng.randrange(1, group.size) if rng.random() < 0.5 else None
            cuts = 0

            async def disturb() -> None:
                nonlocal cuts
                planned = rng.randint(3, 15)
                while cuts < planned:
                    await asyncio.sleep(rng.uniform(0.0, 0.3))
                    lanes = lanes_of(group, rng.randrange(group.size))
                    if lanes:
                        rng.choice(lanes).abort("cut")  # type: ignore[attr-defined]
                        cuts += 1

            async def kill() -> None:
                await asyncio.sleep(rng.uniform(0.2, 2.0))
                if victim is not None:
                    group.network.kill(group.name(victim))

            runs = [asyncio.ensure_future(group.run(one, timeouts=TIMEOUTS)) for one in range(group.size)]
            faults = [asyncio.ensure_future(disturb()), asyncio.ensure_future(kill())]
            living = [one for one in range(group.size) if one != victim]
            async with asyncio.timeout(300):
                results = {one: await runs[one] for one in living}
            for task in (*runs, *faults):
                task.cancel()
            await asyncio.gather(*runs, *faults, return_exceptions=True)
            assert cuts, "nothing happened"
            committed = [one for one in living if results[one].failure is None]
            assert committed == living, {one: results[one].failure for one in living}
            bits = {b"".join(part.numpy().tobytes() for part in group.results(one)) for one in committed}
            assert len(bits) == 1
            if victim is None:
                group.check_average(range(group.size))

    run(main)


@pytest.mark.parametrize("seed", range(2))
def test_lanes_that_are_cut_change_nothing(seed: int):
    stripe_rounds(seed)


@pytest.mark.sweep
@pytest.mark.parametrize("block", range(4))
def test_more_lanes_that_are_cut_change_nothing(block: int):
    for seed in range(100 + 15 * block, 115 + 15 * block):
        stripe_rounds(seed)
