"""Whole peers whose bits make them a grid hold the exact average after as many rounds as it has dimensions."""

from __future__ import annotations

import asyncio
import random

import numpy as np
import pytest

from shoal.averaging.group import PeerMode
from shoal.averaging.matchmaking.core import MatchmakingConfig
from shoal.testing.averaging import SimulatedAveraging
from shoal.testing.clock import run
from shoal.testing.matchmaking import SimulatedMatchmaking


def grid_bits(number: int, base: int, dimensions: int) -> str:
    width = (base - 1).bit_length()
    return "".join(format(number // base**level % base, f"0{width}b") for level in range(dimensions - 1))


def check_grid(seed: int, base: int, dimensions: int, *, pause: float) -> None:
    """Each peer begins its next round as soon as its last one is over, ``pause`` seconds at most later."""
    rng = random.Random(f"grid {seed}")
    config = MatchmakingConfig(target_group_size=base, min_matchmaking_time=5.0)
    sim = SimulatedMatchmaking(seed, config)
    averaging = SimulatedAveraging(sim)
    count = base**dimensions

    async def steps(number: int) -> None:
        for _ in range(dimensions):
            await asyncio.sleep(rng.uniform(0, pause))
            group = await averaging.step(number, seconds=rng.uniform(0, 0.5))
            assert len(group) == base

    async def story() -> None:
        try:
            await sim.start([PeerMode.FULL] * count)
            for number, matchmaker in sim.matchmakers.items():
                matchmaker.set_bits(grid_bits(number, base, dimensions))
                averaging.vectors[number] = np.array([rng.gauss(0, 1) for _ in range(8)])
            mean = sum(averaging.vectors.values()) / count
            await asyncio.gather(*(steps(number) for number in range(count)))
            for vector in averaging.vectors.values():
                assert np.abs(vector - mean).max() <= 4 * np.finfo(np.float64).eps
        finally:
            await sim.close()

    run(story)


@pytest.mark.parametrize(("base", "dimensions"), [(2, 3), (4, 2), (3, 2)])
def test_a_full_grid_holds_the_exact_average_though_its_peers_run_free(base, dimensions):
    for seed in range(3):
        check_grid(seed, base, dimensions, pause=2.0)


@pytest.mark.soak
@pytest.mark.parametrize(("base", "dimensions"), [(2, 3), (4, 2), (3, 2), (2, 4)])
def test_many_grids(base, dimensions):
    for seed in range(100):
        check_grid(seed, base, dimensions, pause=3.0)
