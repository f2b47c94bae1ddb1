"""Whole peers spread over more keys as there are more of them; thresholds are lowered so that 14 are many."""

from __future__ import annotations

import asyncio

import numpy as np
import pytest

from shoal.averaging.group import PeerMode
from shoal.averaging.matchmaking import group_bits, scout
from shoal.averaging.matchmaking_config import MatchmakingConfig
from shoal.testing.averaging import SimulatedAveraging
from shoal.testing.clock import run
from shoal.testing.matchmaking import SimulatedMatchmaking

PAUSE = 12.0
"""Seconds between rounds: peers look at other keys every 10."""


@pytest.fixture(autouse=True)
def _low_thresholds(monkeypatch):
    for module in (group_bits, scout):
        monkeypatch.setattr(module, "SPLIT_ABOVE", 8)
        monkeypatch.setattr(module, "LONELY_BELOW", 3)
    monkeypatch.setattr(group_bits, "UNITE_UP_TO", 6)


@pytest.mark.sweep
def test_a_swarm_that_grows_spreads_over_more_keys_and_a_newcomer_finds_it_and_one_that_shrinks_comes_together():
    async def story() -> None:
        sim = SimulatedMatchmaking(5, MatchmakingConfig(2, min_matchmaking_time=3.0), latency=(0.001, 0.01))
        averaging = SimulatedAveraging(sim)

        async def rounds(count: int) -> None:
            for _ in range(count):
                groups = await asyncio.gather(
                    *(averaging.step(number, timeout=25.0) for number in list(sim.matchmakers))
                )
                assert all(len(group) == 2 for group in groups)
                await asyncio.sleep(PAUSE)

        def depths() -> list[int]:
            return [len(one.bits) for one in sim.matchmakers.values()]

        try:
            await sim.start([PeerMode.FULL] * 14)
            averaging.vectors.update(enumerate(np.eye(16)))
            assert max(depths()) == 0
            await rounds(4)
            assert min(depths()) >= 1
            for newcomer in (14, 15):
                await sim.start_one(newcomer)
            await rounds(8)
            assert min(depths()) >= 1
            mean = np.mean(list(averaging.vectors.values()), axis=0)
            assert max(np.abs(vector - mean).max() for vector in averaging.vectors.values()) < 0.05
            for leaver in range(4, 16):
                await sim.kill(leaver)
            await asyncio.sleep(60.0)
            await rounds(4)
            assert max(depths()) == 0
        finally:
            await sim.close()

    run(story)
