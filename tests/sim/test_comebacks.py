"""A peer that was asleep, cut off, stopped or killed is soon back in a group with the others, which averaged on."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

import pytest
from tests.swept import rest_swept

from shoal.averaging.group import GroupInfo, PeerMode
from shoal.averaging.matchmaking_config import MatchmakingConfig
from shoal.testing.clock import run
from shoal.testing.matchmaking import SimulatedMatchmaking
from shoal.testing.swarm import Attempt, SimulatedSwarm

BACK_WITHIN = 30.0
UNDER_WAY = 1.0
"""Seconds after which nothing more comes of what was on its way before."""
COUNT, LOST = 4, 3


class Swarm:
    """Four peers that look for groups without a pause."""

    def __init__(self, seed: int) -> None:
        config = MatchmakingConfig(target_group_size=COUNT, min_matchmaking_time=3.0)
        self.peers = SimulatedMatchmaking(seed, config, latency=(0.001, 0.05))
        self.peers.dht.listen_everywhere = True
        self.network = self.peers.network
        self.whole = asyncio.Event()
        """Set when the peer that is lost in this story found a group of everybody; to be cleared."""
        self.loops: dict[int, asyncio.Task[None]] = {}

    async def start(self, number: int) -> None:
        await self.peers.start_one(number, PeerMode.FULL)
        self.average(number)

    def average(self, number: int) -> None:
        self.loops[number] = asyncio.get_running_loop().create_task(self._average(number))

    async def _average(self, number: int) -> None:
        while True:
            found = await self.peers.search(number, timeout=15.0)
            if number == LOST and isinstance(found, GroupInfo) and len(found) == COUNT:
                self.whole.set()

    async def kill(self, number: int, *, silently: bool) -> None:
        self.loops.pop(number).cancel()
        await self.peers.kill(number, silently=silently)

    async def close(self) -> None:
        for loop in self.loops.values():
            loop.cancel()
        await asyncio.gather(*self.loops.values(), return_exceptions=True)
        await self.peers.close()


async def cut_off(swarm: Swarm) -> None:
    swarm.network.partition([f"node{LOST}"])
    await asyncio.sleep(40.0)
    swarm.network.heal()


async def killed(swarm: Swarm) -> None:
    await swarm.kill(LOST, silently=False)
    await asyncio.sleep(10.0)
    swarm.network.revive(f"node{LOST}")
    await swarm.start(LOST)


async def without_power(swarm: Swarm) -> None:
    await swarm.kill(LOST, silently=True)
    await asyncio.sleep(2.0)  # its connections still seem to stand
    swarm.network.revive(f"node{LOST}")
    await swarm.start(LOST)


async def moved(swarm: Swarm) -> None:
    swarm.network.move(f"node{LOST}", "10.9.0.1")


@pytest.mark.parametrize("seed", rest_swept(range(3)))
@pytest.mark.parametrize("lose", [cut_off, killed, without_power, moved])
def test_a_lost_peer_is_back_in_a_group(lose: Callable[[Swarm], Awaitable[None]], seed: int) -> None:
    async def story() -> None:
        swarm = Swarm(seed)
        try:
            for number in range(COUNT):
                await swarm.start(number)
            await asyncio.wait_for(swarm.whole.wait(), 60.0)
            await lose(swarm)
            await asyncio.sleep(UNDER_WAY)
            swarm.whole.clear()
            await asyncio.wait_for(swarm.whole.wait(), BACK_WITHIN - UNDER_WAY)
        finally:
            await swarm.close()

    run(story)


# ---- a leader that is stopped for a moment as its group forms


LEADER = 0
STOPPED_FOR, STOPPED_AT = 3.0, 2.0
BACK_SOON = 5.0
"""Seconds after which a leader that was stopped averages again. Its followers may begin again meanwhile without it."""


def back_after(seed: int, count: int) -> float:
    """Seconds until a leader that was stopped in the moment when its group began has averaged with the others again."""
    config = MatchmakingConfig(count, 2, min_matchmaking_time=2.0, request_timeout=1.0)
    stopped_at: list[float] = []

    def watch(number: int, phase: str) -> None:
        now = asyncio.get_running_loop().time()
        if number == LEADER and phase == "forming" and now > STOPPED_AT and not stopped_at:
            stopped_at.append(now)
            swarm.network.freeze(f"node{LEADER}", STOPPED_FOR)

    swarm = SimulatedSwarm(seed, config, watch=watch, latency=(0.001, 0.03))

    async def steps(number: int) -> None:
        await asyncio.sleep(0.02 * number)  # the first one leads
        while True:
            attempt = await swarm.step(number)
            assert isinstance(attempt, Attempt), attempt
            if number == LEADER and stopped_at:
                return
            await asyncio.sleep(0.5)

    async def story() -> float:
        try:
            for number in range(count):
                await swarm.start(number)
            others = [asyncio.ensure_future(steps(number)) for number in range(count) if number != LEADER]
            await steps(LEADER)
            for other in others:
                other.cancel()
            await asyncio.wait(others)
        finally:
            await swarm.close()
        swarm.check()
        return asyncio.get_running_loop().time() - stopped_at[0] - STOPPED_FOR

    return run(story)


@pytest.mark.parametrize("count", [2, 3])
@pytest.mark.parametrize("seed", rest_swept(range(8)))
def test_a_leader_that_is_stopped_for_a_moment_is_soon_back(seed: int, count: int):
    assert back_after(seed, count) < BACK_SOON
