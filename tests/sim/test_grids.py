"""Whole peers make a grid when they are many, and give it up when they are few; thresholds are lowered for 16 peers."""

from __future__ import annotations

import asyncio

import numpy as np
import pytest

from shoal.averaging.grid import Grid, Layout
from shoal.averaging.group import GroupInfo, PeerMode
from shoal.averaging.matchmaking import scout, seats, spreading
from shoal.averaging.matchmaking.seats import Seat
from shoal.averaging.matchmaking_config import MatchmakingConfig
from shoal.errors import MatchmakingException
from shoal.testing.averaging import SimulatedAveraging
from shoal.testing.clock import run
from shoal.testing.matchmaking import SimulatedMatchmaking

PAUSE = 1.0
"""Seconds between rounds."""


@pytest.fixture(autouse=True)
def _low_thresholds(monkeypatch):
    monkeypatch.setattr(spreading, "SPREAD_ABOVE", 12)
    monkeypatch.setattr(seats, "GATHER_BELOW", 9)


async def all_step(averaging: SimulatedAveraging) -> int:
    """One round of all; how many found no group."""
    steps = [averaging.step(number, timeout=25.0) for number in list(averaging.sim.matchmakers)]
    results = await asyncio.gather(*steps, return_exceptions=True)
    assert all(isinstance(one, GroupInfo | MatchmakingException) for one in results)
    await asyncio.sleep(PAUSE)
    return sum(isinstance(one, MatchmakingException) for one in results)


@pytest.mark.sweep
def test_a_swarm_makes_a_grid_that_newcomers_find_and_gives_it_up_when_it_shrinks():
    async def story() -> None:
        sim = SimulatedMatchmaking(5, MatchmakingConfig(4, min_matchmaking_time=3.0), latency=(0.001, 0.01))
        averaging = SimulatedAveraging(sim)

        alone: list[int] = []

        async def rounds(count: int) -> None:
            alone.extend([await all_step(averaging) for _ in range(count)])

        def groups() -> set[int]:
            return {one._keys.grid.layout.groups for one in sim.matchmakers.values()}

        def spread() -> float:
            mean = np.mean(list(averaging.vectors.values()), axis=0)
            return max(np.abs(vector - mean).max() for vector in averaging.vectors.values())

        try:
            await sim.start([PeerMode.FULL] * 16)
            averaging.vectors.update(enumerate(np.eye(18)[:16]))
            await rounds(2)
            assert groups() == {4}
            assert spread() < 1e-12
            for newcomer in (16, 17):
                await sim.start_one(newcomer)
                averaging.vectors[newcomer] = np.eye(18)[newcomer]
            await rounds(8)
            assert min(groups()) >= 4
            assert spread() < 0.01
            for leaver in range(4, 18):
                await sim.kill(leaver)
                del averaging.vectors[leaver]
            await asyncio.sleep(60.0)
            await rounds(4)
            assert groups() == {1}
            assert sum(alone) <= 1  # so few peers at a key of so few may be one now and then
        finally:
            await sim.close()

    run(story)


@pytest.mark.sweep
def test_parts_of_a_swarm_with_different_layouts_find_each_other(monkeypatch):
    """As after a break of the network: the parts have other keys, and meet by their leaders' signposts alone."""
    monkeypatch.setattr(seats, "GATHER_BELOW", 4)
    monkeypatch.setattr(scout, "LOOK_SEATED_EVERY", 4.0)

    async def story() -> None:
        sim = SimulatedMatchmaking(5, MatchmakingConfig(4, min_matchmaking_time=3.0), latency=(0.001, 0.01))
        averaging = SimulatedAveraging(sim)

        def layouts() -> set[Layout]:
            return {one._keys.grid.layout for one in sim.matchmakers.values()}

        try:
            await sim.start([PeerMode.FULL] * 16)
            averaging.vectors.update(enumerate(np.eye(16)))
            rounds = 0
            while rounds < 2 or len(layouts()) > 1:
                await all_step(averaging)
                rounds += 1
                if rounds == 1:
                    for number in range(8):
                        keys = sim.matchmakers[number]._keys
                        grid = Grid(Layout(5, 3), keys.grid.round, keys.grid.swarm)
                        keys._seat = Seat(grid, number % 5)
                    assert len(layouts()) == 2
                assert rounds < 30
        finally:
            await sim.close()

    run(story)
