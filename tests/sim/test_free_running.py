"""Peers that step when they like, few of them: each step finds a full group, though nobody waits for a common start."""

from __future__ import annotations

import asyncio
import random
from collections import Counter

import numpy as np
import pytest

from shoal.averaging.group import PeerMode
from shoal.averaging.matchmaking_config import MatchmakingConfig
from shoal.errors import MatchmakingException
from shoal.testing.averaging import SimulatedAveraging
from shoal.testing.clock import run
from shoal.testing.matchmaking import SimulatedMatchmaking


def free_run(seed: int, count: int, target: int, steps: int, spread: float) -> Counter[int]:
    """Each peer begins within ``spread`` seconds, and makes its steps one after the other; how many had which size."""
    sizes: Counter[int] = Counter()

    async def story() -> None:
        sim = SimulatedMatchmaking(seed, MatchmakingConfig(target, min_matchmaking_time=5.0))
        averaging = SimulatedAveraging(sim)
        rng = random.Random(f"free {seed}")

        async def live(number: int) -> None:
            await asyncio.sleep(rng.uniform(0, spread))
            for _ in range(steps):
                try:
                    sizes[len(await averaging.step(number, timeout=60.0))] += 1
                except MatchmakingException:  # the last one may have nobody left
                    sizes[1] += 1

        try:
            await sim.start([PeerMode.FULL] * count)
            averaging.vectors.update(enumerate(np.eye(count)))
            await asyncio.gather(*(live(number) for number in range(count)))
            assert not any(one._keys.has_seat for one in sim.matchmakers.values())
        finally:
            await sim.close()

    run(story)
    return sizes


@pytest.mark.sweep
@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("spread", [0.1, 6.0])
def test_each_step_of_peers_that_run_free_finds_a_group_and_nearly_all_a_full_one(seed, spread):
    sizes = free_run(seed, count=16, target=4, steps=4, spread=spread)
    assert sum(sizes.values()) == 16 * 4
    assert sizes[1] <= 1
    assert sizes[4] >= 0.8 * 16 * 4, sizes
