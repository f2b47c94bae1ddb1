"""How long a round takes in which members are killed, over slow links: in virtual time, at any moment of the round."""

from __future__ import annotations

import asyncio
import functools
import random

import pytest

from shoal.averaging.allreduce.round import RoundResult
from shoal.testing.clock import run
from shoal.testing.network import SimulatedNetwork
from shoal.testing.rounds import SimulatedGroup

SIZE = 8
ELEMENTS = 1_000_000
LINK = 50e6 / 8
"""Bytes per second of each host's link, in each direction."""
LATENCY = 0.01
CLOSED, SILENT = LATENCY, 5.0
"""Seconds until the others know that a process was killed: its machine closes its connections, or is gone as well."""
MOMENTS = 12
BOUNDS = {1: 1.5, 2: 2.0}
"""By how many members are killed: how much longer than an undisturbed round this one may take."""
PAUSE = 0.25
"""Seconds that it may take besides."""

VICTIMS = pytest.mark.parametrize(
    "victims", [(3,), (0,), (0, 1)], ids=["an owner", "the leader", "the leader and its successor"]
)


async def time_round(moment: float, victims: tuple[int, ...], *, silently: bool = False) -> float:
    """Seconds until the last survivor has committed, if these members are killed at a moment of the round."""
    network = SimulatedNetwork(random.Random(0), latency=(LATENCY, LATENCY))
    shapes, part_bytes = ((ELEMENTS,),), 1 << 16
    async with SimulatedGroup(0, SIZE, shapes=shapes, part_bytes=part_bytes, network=network) as group:
        for member in range(SIZE):
            network.set_link(group.name(member), LINK)
        loop = asyncio.get_running_loop()
        began = loop.time()

        async def run_one(member: int) -> tuple[RoundResult, float]:
            return await group.run(member), loop.time() - began

        tasks = [asyncio.ensure_future(run_one(member)) for member in range(SIZE)]
        await asyncio.sleep(moment)
        for victim in victims:
            network.kill(group.name(victim), silently=silently)
        survivors = [member for member in range(SIZE) if member not in victims]
        ended = await asyncio.gather(*(tasks[member] for member in survivors))
        for victim in victims:
            tasks[victim].cancel()
        assert [result.failure for result, _ in ended] == [None] * len(survivors)
        assert len({result.weights for result, _ in ended}) == 1
        if not ended[0][0].partial:
            group.check_average(survivors, ended[0][0].weights)
        return max(seconds for _, seconds in ended)


@functools.cache
def undisturbed() -> float:
    return run(lambda: time_round(0.0, ()))


def check(moment: float, victims: tuple[int, ...], *, silently: bool = False) -> None:
    seconds = run(lambda: time_round(moment * undisturbed(), victims, silently=silently))
    detection = len(victims) * (SILENT if silently else CLOSED)
    assert seconds <= BOUNDS[len(victims)] * undisturbed() + PAUSE + detection


@pytest.mark.sweep
def test_an_undisturbed_round_fills_the_links():
    """Each member sends its parts to 7 owners, and returns averages to 7 members, at the same time."""
    ideal = 2 * (SIZE - 1) / SIZE * 4 * ELEMENTS / LINK
    assert undisturbed() < 1.4 * ideal


@pytest.mark.sweep
def test_a_killed_leader_and_its_successor_cost_a_part_of_a_round():
    check(0.6, (0, 1))


@pytest.mark.sweep
@VICTIMS
@pytest.mark.parametrize("moment", range(MOMENTS + 1))
def test_a_killed_member_costs_a_part_of_a_round_at_any_moment(victims: tuple[int, ...], moment: int):
    check(moment / MOMENTS, victims)


@pytest.mark.sweep
@VICTIMS
@pytest.mark.parametrize("moment", range(3, MOMENTS + 1, 3))
def test_a_machine_that_is_gone_costs_its_detection_besides(victims: tuple[int, ...], moment: int):
    """Later than at once: only a peer that has answered is known to be near."""
    check(moment / MOMENTS, victims, silently=True)
