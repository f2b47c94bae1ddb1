"""With no bits given, many more peers than fit into one group arrange themselves so that all come to the average."""

from __future__ import annotations

import asyncio
import random

import numpy as np
import pytest

from shoal.averaging.group import PeerMode
from shoal.averaging.matchmaking_config import MatchmakingConfig
from shoal.errors import MatchmakingException
from shoal.testing.averaging import SimulatedAveraging
from shoal.testing.clock import run
from shoal.testing.matchmaking import SimulatedMatchmaking

ROUNDS = 5
DIMENSIONS = 64


class Story:
    """A swarm that averages in rounds; before each, one peer may join, with the state of another, or leave."""

    def __init__(
        self, seed: int, count: int, target: int, *, churn: bool = True, jitter: float = 0.0
    ) -> None:
        self.rng = random.Random(f"mixing {seed}")
        self.sim = SimulatedMatchmaking(seed, MatchmakingConfig(target, min_matchmaking_time=5.0))
        self.averaging = SimulatedAveraging(self.sim)
        self.count = count
        self.churn = churn
        self.jitter = jitter
        self.stayed = set(range(count))
        self.spreads: list[float] = []
        self.tries = self.found = 0

    async def tell(self) -> None:
        try:
            await self.sim.start([PeerMode.FULL] * self.count)
            vectors = np.random.default_rng(self.rng.getrandbits(32)).standard_normal(
                (self.count, DIMENSIONS)
            )
            self.averaging.vectors.update(enumerate(vectors))
            for _ in range(ROUNDS):
                if self.churn:
                    await self.change()
                self.spreads.append(self.spread())
                await asyncio.gather(*(self.step(number) for number in list(self.sim.matchmakers)))
            self.spreads.append(self.spread())
        finally:
            await self.sim.close()

    async def change(self) -> None:
        present = sorted(self.averaging.vectors)
        if self.rng.random() < 0.5:
            joiner = self.count
            self.count += 1
            await self.sim.start_one(joiner)
            self.averaging.vectors[joiner] = self.averaging.vectors[self.rng.choice(present)]
        else:
            leaver = self.rng.choice(present[1:])  # others join the DHT by peer 0
            await self.sim.kill(leaver)
            del self.averaging.vectors[leaver]
            self.stayed.discard(leaver)

    async def step(self, number: int) -> None:
        await asyncio.sleep(self.rng.uniform(0, self.jitter))
        self.tries += 1
        try:
            await self.averaging.step(number, timeout=20.0)
        except MatchmakingException:
            return
        self.found += 1

    def spread(self) -> float:
        """The standard deviation over the peers present throughout, over all dimensions together."""
        vectors = np.array([self.averaging.vectors[number] for number in sorted(self.stayed)])
        return float(np.sqrt(vectors.var(axis=0).mean()))


def check(seed: int, count: int, target: int, limit: float, *, churn: bool, jitter: float) -> None:
    story = Story(seed, count, target, churn=churn, jitter=jitter)
    run(story.tell)
    assert story.spreads[-1] < limit * story.spreads[0], f"seed {seed}: {story.spreads}"
    assert story.found >= 0.99 * story.tries, f"seed {seed}: {story.found} of {story.tries}"


def test_16_peers_in_groups_of_4_arrange_themselves_as_a_grid():
    check(0, 16, 4, 1e-9, churn=False, jitter=0.2)


@pytest.mark.soak
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("seed", range(10))
def test_64_peers_in_groups_of_4_come_to_1_percent_of_their_spread_while_some_join_and_leave(seed):
    check(seed, 64, 4, 0.01, churn=True, jitter=0.3)
