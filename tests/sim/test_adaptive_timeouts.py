"""Deadlines that adapt, in whole rounds on the simulated network: members learn from some, and then one is late."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

import pytest

from shoal.averaging.allreduce.deadlines import Deadlines
from shoal.averaging.allreduce.events import RoundTimeouts
from shoal.averaging.allreduce.round import RoundResult
from shoal.averaging.group import GROUP_ID_BYTES
from shoal.testing.clock import run
from shoal.testing.rounds import SimulatedGroup

LOAD = 1
"""Parts are of the same size in all rounds."""


async def run_one(
    group: SimulatedGroup, deadlines: Sequence[Deadlines], number: int, late: int | None = None
) -> list[RoundResult]:
    """One round, in which a member's user may be late by 30 s."""

    def snapshot(member: int) -> asyncio.Future[None]:
        return asyncio.ensure_future(asyncio.sleep(30.0 if member == late else 0.1 * member))

    group.group = group.make_group(bytes([number]) * GROUP_ID_BYTES)
    rounds = [
        group.round(member, snapshot=lambda member=member: snapshot(member), timeouts=one.timeouts(LOAD))
        for member, one in enumerate(deadlines)
    ]
    async with asyncio.timeout(120):
        results = await asyncio.gather(*(group.run_round(*one) for one in enumerate(rounds)))
    for one, each in zip(deadlines, rounds, strict=True):
        one.learn(each.waits, LOAD)
    return results


@pytest.mark.parametrize("late", [0, 3], ids=["leader", "follower"])
def test_a_group_goes_on_without_a_member_that_is_later_than_usual(late: int):
    async def main() -> None:
        async with SimulatedGroup(seed=1, size=4) as group:
            deadlines = [Deadlines(RoundTimeouts(None, 60.0, 120.0)) for _ in range(4)]
            for number in (1, 2):
                results = await run_one(group, deadlines, number)
                assert not any(result.exclusions for result in results)
            began = asyncio.get_running_loop().time()
            results = await run_one(group, deadlines, 3, late)
            others = [member for member in range(4) if member != late]
            for member in others:
                assert results[member].failure is None
                (exclusion,) = results[member].exclusions
                assert exclusion.member == group.peer(late)
                assert "(adaptive_timeouts)" in exclusion.reason
            assert "(adaptive_timeouts)" in (results[late].failure or "")
            group.check_average(others, [float(member != late) for member in range(4)])
            assert asyncio.get_running_loop().time() - began < 5.0

    run(main)


def test_a_group_that_has_seen_nothing_waits_for_a_late_member():
    async def main() -> None:
        async with SimulatedGroup(seed=1, size=4) as group:
            deadlines = [Deadlines(RoundTimeouts(None, 60.0, 120.0)) for _ in range(4)]
            results = await run_one(group, deadlines, 1, late=3)
            assert not any(result.exclusions for result in results)
            group.check_average(range(4))

    run(main)
