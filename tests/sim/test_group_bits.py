"""Whole peers whose bits make them a grid hold the exact average after as many rounds as it has dimensions."""

from __future__ import annotations

import asyncio
import random

import numpy as np
import pytest

from shoal.averaging.group import PeerMode
from shoal.averaging.matchmaking_config import MatchmakingConfig
from shoal.testing.averaging import SimulatedAveraging
from shoal.testing.clock import run
from shoal.testing.matchmaking import SimulatedMatchmaking


def grid_bits(number: int, base: int, dimensions: int) -> str:
    width = (base - 1).bit_length()
    return "".join(format(number // base**level % base, f"0{width}b") for level in range(dimensions - 1))


def check_grid(seed: int, base: int, dimensions: int, *, pause: float) -> None:
    """Each peer begins its next round as soon as its last one is over, ``pause`` seconds at most later. Twice that is
    less than ``min_matchmaking_time``, so that the first peers of a group still wait when its last one comes.
    """
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


@pytest.mark.parametrize(
    ("base", "dimensions"), [(2, 3), (3, 2), pytest.param(4, 2, marks=pytest.mark.sweep)]
)
def test_a_full_grid_holds_the_exact_average_though_its_peers_run_free(base, dimensions):
    for seed in range(3):
        check_grid(seed, base, dimensions, pause=2.0)


class Rounds:
    """Peers in pairs that all take their steps at once, each of which finds its partner before its start time."""

    def __init__(self, seed: int) -> None:
        config = MatchmakingConfig(target_group_size=2, min_matchmaking_time=5.0)
        self.sim = SimulatedMatchmaking(seed, config, latency=(0.001, 0.01))
        self._averaging = SimulatedAveraging(self.sim)

    async def take(self, count: int) -> None:
        numbers = list(self.sim.matchmakers)
        self._averaging.vectors.update((number, np.zeros(1)) for number in numbers)
        for _ in range(count):
            began = self.sim.now()
            groups = await asyncio.gather(*(self._averaging.step(number) for number in numbers))
            assert all(len(group) == 2 for group in groups)
            assert self.sim.now() - began < self.sim.config.min_matchmaking_time
            await asyncio.sleep(0.2)  # peers without bits look at other keys between their rounds

    def bits(self) -> list[str]:
        return [matchmaker.bits for matchmaker in self.sim.matchmakers.values()]


@pytest.mark.parametrize("seed", range(2))
def test_a_grid_whose_bits_are_taken_back_is_one_swarm_at_once_and_stays_one(seed):
    async def story() -> None:
        rounds = Rounds(seed)
        try:
            await rounds.sim.start([PeerMode.FULL] * 8)
            for number, matchmaker in rounds.sim.matchmakers.items():
                matchmaker.set_bits(grid_bits(number, 2, 3))
            await rounds.take(3)
            assert {len(bits) for bits in rounds.bits()} == {2}
            for matchmaker in rounds.sim.matchmakers.values():
                matchmaker.set_bits("")
            for _ in range(4):
                await rounds.take(1)
                assert rounds.bits() == [""] * 8
        finally:
            await rounds.sim.close()

    run(story)


def test_two_without_bits_stay_together_beside_a_grid():
    async def story() -> None:
        rounds = Rounds(1)
        try:
            await rounds.sim.start([PeerMode.FULL] * 6)
            for number, bits in enumerate(("0", "0", "1", "1")):
                rounds.sim.matchmakers[number].set_bits(bits)
            for _ in range(5):
                await rounds.take(1)
                assert rounds.bits()[4:] == ["", ""]
        finally:
            await rounds.sim.close()

    run(story)


@pytest.mark.soak
@pytest.mark.parametrize(("base", "dimensions"), [(2, 3), (4, 2), (3, 2), (2, 4)])
def test_many_grids(base, dimensions):
    for seed in range(100):
        check_grid(seed, base, dimensions, pause=2.0)
