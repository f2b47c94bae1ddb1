"""Peers with wrong clocks find groups as others do, and no clock that is moved changes how long a search takes."""

from __future__ import annotations

import asyncio

import pytest
from tests.swept import rest_swept

from shoal.averaging.group import GroupInfo, PeerMode
from shoal.averaging.matchmaking_config import MatchmakingConfig
from shoal.errors import MatchmakingException
from shoal.testing.clock import run
from shoal.testing.matchmaking import SimulatedMatchmaking

FULL = PeerMode.FULL


@pytest.mark.parametrize("error", rest_swept([40.0, -90.0, -40.0, 90.0], kept=2))
@pytest.mark.parametrize("wrong", rest_swept([{1}, {0, 3}, {0}, {1, 2}], kept=2))
def test_peers_with_wrong_clocks_are_in_every_group(error: float, wrong: set[int]) -> None:
    async def story() -> None:
        sim = SimulatedMatchmaking(7, MatchmakingConfig(4, 4))
        sim.dht.clock_errors = dict.fromkeys(wrong, error)
        try:
            await sim.start([FULL] * 4)
            for _ in range(8):
                began = asyncio.get_running_loop().time()
                groups = await asyncio.gather(*(sim.search(number) for number in range(4)))
                assert all(isinstance(group, GroupInfo) and len(group) == 4 for group in groups), groups
                assert asyncio.get_running_loop().time() - began < 5
                for matchmaker, group in zip(sim.matchmakers.values(), groups, strict=True):
                    matchmaker.round_committed(group)
        finally:
            await sim.close()

    run(story)


@pytest.mark.parametrize("moved", [30.0, -30.0])
def test_a_clock_that_is_moved_neither_ends_nor_prolongs_a_search(moved: float) -> None:
    async def story() -> None:
        sim = SimulatedMatchmaking(1, MatchmakingConfig(2, 2))
        try:
            await sim.start([FULL])
            began = asyncio.get_running_loop().time()
            search = sim.search(0, timeout=20.0)
            await asyncio.sleep(5)
            sim.dht.clock(0).move(moved)
            assert isinstance(await search, MatchmakingException)
            assert asyncio.get_running_loop().time() - began == pytest.approx(20.0, abs=0.1)
        finally:
            await sim.close()

    run(story)


@pytest.mark.parametrize("moved", [30.0, -30.0])
def test_peers_whose_clocks_are_moved_as_they_search_find_each_other(moved: float) -> None:
    async def story() -> None:
        sim = SimulatedMatchmaking(2, MatchmakingConfig(2, 2))
        try:
            await sim.start([FULL] * 2)
            first = sim.search(0)
            await asyncio.sleep(5)
            for number in range(2):
                sim.dht.clock(number).move(moved)
            groups = await asyncio.gather(first, sim.search(1))
            assert all(isinstance(group, GroupInfo) for group in groups), groups
        finally:
            await sim.close()

    run(story)


@pytest.mark.parametrize("moved", [30.0, -30.0])
def test_a_search_is_rescheduled_by_the_time_of_now(moved: float) -> None:
    async def story() -> None:
        sim = SimulatedMatchmaking(3, MatchmakingConfig(None, 1))
        try:
            await sim.start([FULL])
            began = asyncio.get_running_loop().time()
            search = sim.search(0, starts_in=10.0)
            await asyncio.sleep(2)
            clock = sim.dht.clock(0)
            clock.move(moved)
            sim.matchmakers[0].reschedule(clock() + 3.0)
            assert isinstance(await search, GroupInfo)
            assert asyncio.get_running_loop().time() - began == pytest.approx(5.0, abs=0.5)
        finally:
            await sim.close()

    run(story)
