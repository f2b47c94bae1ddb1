"""Whole peers make a grid when they are many, and give it up when they are few; thresholds are lowered for 16 peers."""

from __future__ import annotations

import asyncio

import numpy as np
import pytest

from shoal.averaging.group import PeerMode
from shoal.averaging.matchmaking import seats, spreading
from shoal.averaging.matchmaking_config import MatchmakingConfig
from shoal.testing.averaging import SimulatedAveraging
from shoal.testing.clock import run
from shoal.testing.matchmaking import SimulatedMatchmaking

PAUSE = 1.0
"""Seconds between rounds."""


@pytest.fixture(autouse=True)
def _low_thresholds(monkeypatch):
    monkeypatch.setattr(spreading, "SPREAD_ABOVE", 12)
    monkeypatch.setattr(seats, "GATHER_BELOW", 9)


@pytest.mark.sweep
def test_a_swarm_makes_a_grid_that_newcomers_find_and_gives_it_up_when_it_shrinks():
    async def story() -> None:
        sim = SimulatedMatchmaking(5, MatchmakingConfig(4, min_matchmaking_time=3.0), latency=(0.001, 0.01))
        averaging = SimulatedAveraging(sim)

        async def rounds(count: int) -> None:
            for _ in range(count):
                await asyncio.gather(
                    *(averaging.step(number, timeout=25.0) for number in list(sim.matchmakers))
                )
                await asyncio.sleep(PAUSE)

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
            await rounds(6)
            assert min(groups()) >= 4
            assert spread() < 0.01
            for leaver in range(4, 18):
                await sim.kill(leaver)
                del averaging.vectors[leaver]
            await asyncio.sleep(60.0)
            await rounds(4)
            assert groups() == {1}
        finally:
            await sim.close()

    run(story)
