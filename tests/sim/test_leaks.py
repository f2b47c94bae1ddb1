"""Nothing is left of rounds with faults: whole peers, from sockets to attempts of steps, in virtual time.

After many of them there are as many tasks, timers and objects as after a few.
"""

from __future__ import annotations

import asyncio
import gc
import random
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator
from types import SimpleNamespace
from typing import Any, TypeAlias, cast

import numpy as np
import pytest
import torch

from shoal.averaging.allreduce.exchange import Arena
from shoal.averaging.allreduce.round import RoundTimeouts
from shoal.averaging.allreduce.rounds import REMEMBERED_FOR, REMEMBERED_ROUNDS, Rounds
from shoal.averaging.background.arena import SharedArena
from shoal.averaging.background.attempt import Attempt
from shoal.averaging.background.division import Division
from shoal.averaging.background.doubts import Doubts
from shoal.averaging.background.resources import Resources
from shoal.averaging.background.slow_peers import SlowPeers
from shoal.averaging.background.step import Step
from shoal.averaging.commands import ApplyAverage, RunStep, TakeSnapshot
from shoal.averaging.group import GroupInfo
from shoal.averaging.matchmaking_config import MatchmakingConfig
from shoal.averaging.partition import Layout
from shoal.averaging.router import Router
from shoal.errors import AllreduceException
from shoal.runtime.presence import Presence
from shoal.testing.arena import make_arena
from shoal.testing.clock import run
from shoal.testing.matchmaking import SimulatedMatchmaking

COUNT = 4
PREFIX = "swarm"
TIMEOUTS = RoundTimeouts(30.0, sender=4.0, reducer=8.0, doubt=5.0)
SETTLED_AFTER = REMEMBERED_FOR + 50.0
"""Virtual seconds after which nobody asks, retries or has to remember anything any more."""
CACHES = ("KnownRecord", "Record")
"""Classes of which the DHT keeps up to 1,000."""
UNDER_WAY = 20.0
"""Virtual seconds after which the streams of a round have ended."""
MANY = 30
"""Rounds by which each peer knows as much as it ever will of others."""
PASSING = (
    "Attempt",
    "Commitment",
    "Exchange",
    "Inquiry",
    "OpenedStream",
    "Round",
    "Serving",
    "Stream",
)
"""Classes of which nothing is left when a step has ended."""


class User:
    """The user's process of one peer, and what a service knows of its own."""

    is_closing = False

    def __init__(self, arena: Arena, value: float) -> None:
        self.user = Presence()
        self.arena = arena
        self.value = value
        self.snapshot: Callable[[], Awaitable[None]] = self.copy
        self.written = 0

    async def copy(self) -> None:
        np.frombuffer(self.arena.snapshot, np.float32).fill(self.value)

    async def call_user(self, command: object) -> object:
        if isinstance(command, TakeSnapshot):
            await self.snapshot()
            return 1.0
        if isinstance(command, ApplyAverage):
            self.written += 1
        return True


class Peer:
    """What lives in one background process."""

    def __init__(self, swarm: Swarm, number: int) -> None:
        node = swarm.sim.dht.nodes[number]
        layout = Layout.from_tensors([torch.zeros(1200)])
        arena: Any = SharedArena(layout)
        arena._areas = make_arena(layout)
        self.user = User(arena.areas, float(number))
        context: Any = self.user
        config = SimpleNamespace(prefix=PREFIX, auxiliary=False, matchmaking=swarm.sim.config)
        self.rounds = Rounds(Router.of(node.host), PREFIX)
        self.resources = Resources(
            context=context,
            config=cast("Any", config),
            node=node,
            matchmaker=swarm.sim.matchmakers[number],
            rounds=self.rounds,
            timeouts=TIMEOUTS,
            division=Division(layout, part_size_bytes=1024, min_vector_size=0),
            arena=arena,
            slow_peers=SlowPeers(PREFIX),
            doubts=Doubts(context, node.host, PREFIX),
        )

    async def close(self) -> None:
        self.rounds.close()
        await self.resources.doubts.close()


class Swarm:
    """Peers that take their steps together, each time with another fault."""

    def __init__(self, seed: int) -> None:
        self.rng = random.Random(seed)
        config = MatchmakingConfig(target_group_size=COUNT, min_matchmaking_time=3.0)
        self.sim = SimulatedMatchmaking(seed, config, latency=(0.001, 0.01))
        self.network = self.sim.network
        self.peers: dict[int, Peer] = {}
        self.number = self.steps = 0
        self.attempts: Counter[str] = Counter()

    async def start(self, number: int) -> None:
        await self.sim.start_one(number)
        self.peers[number] = Peer(self, number)

    async def restart(self, number: int) -> None:
        await self.peers.pop(number).close()
        await self.sim.kill(number)
        await asyncio.sleep(2.0)
        self.network.revive(f"node{number}")
        await self.start(number)

    async def step(self, number: int, step: int) -> None:
        peer = self.peers[number]
        found = await self.sim.search(number, timeout=15.0)
        if not isinstance(found, GroupInfo):
            self.attempts["no group"] += 1
            return
        attempt = Attempt(peer.resources, Step(RunStep(step, 1.0, b"", 0.0, None, False, False)), found)
        try:
            await attempt.run()
        except AllreduceException as e:
            self.attempts[type(e).__name__] += 1
        else:
            self.attempts["averaged"] += 1

    async def settle(self) -> Census:
        """What there is when all is quiet, and old rounds are forgotten."""
        await asyncio.sleep(SETTLED_AFTER)
        await self.round(nothing)
        await asyncio.sleep(UNDER_WAY)
        return Census(self)

    async def round(self, fault: Fault | None = None) -> None:
        """A step of all peers, with the next fault, or this one, of one of them."""
        if fault is None:
            fault = FAULTS[self.number % len(FAULTS)]
            self.number += 1
        victim = self.rng.randrange(1, COUNT)  # peer 0 is by whom others join the DHT
        steps = {number: asyncio.create_task(self.step(number, self.steps)) for number in list(self.peers)}
        self.steps += 1
        mischief = asyncio.create_task(fault(self, victim, steps[victim]))
        await asyncio.gather(*steps.values(), mischief, return_exceptions=True)
        for task in (*steps.values(), mischief):
            if not task.cancelled() and (error := task.exception()) is not None:
                raise error
        self.network.heal()
        self.peers[victim].user.snapshot = self.peers[victim].user.copy

    async def close(self) -> None:
        for peer in self.peers.values():
            await peer.close()
        await self.sim.close()


Fault: TypeAlias = Callable[[Swarm, int, "asyncio.Task[None]"], Awaitable[None]]


async def nothing(swarm: Swarm, victim: int, step: asyncio.Task[None]) -> None:
    pass


async def crash(swarm: Swarm, victim: int, step: asyncio.Task[None]) -> None:
    await under_way(swarm)
    step.cancel()
    await swarm.restart(victim)


async def cancel(swarm: Swarm, victim: int, step: asyncio.Task[None]) -> None:
    await under_way(swarm)
    step.cancel()


async def lose_connections(swarm: Swarm, victim: int, step: asyncio.Task[None]) -> None:
    await under_way(swarm)
    for other in range(COUNT):
        if other != victim:
            swarm.network.drop_connections(f"node{victim}", f"node{other}")


async def cut_off(swarm: Swarm, victim: int, step: asyncio.Task[None]) -> None:
    """For as long as its step takes, so that it may be in doubt."""
    await under_way(swarm)
    swarm.network.partition([f"node{victim}"])
    await asyncio.wait([step])


async def fail_to_copy(swarm: Swarm, victim: int, step: asyncio.Task[None]) -> None:
    async def fail() -> None:
        raise RuntimeError("a device is gone")

    swarm.peers[victim].user.snapshot = fail


async def hang(swarm: Swarm, victim: int, step: asyncio.Task[None]) -> None:
    async def never() -> None:
        await asyncio.Event().wait()

    swarm.peers[victim].user.snapshot = never


async def under_way(swarm: Swarm) -> None:
    """Wait until somewhere between the search and the decision."""
    await asyncio.sleep(swarm.rng.uniform(0.0, 0.3))


FAULTS = (nothing, crash, cancel, lose_connections, cut_off, fail_to_copy, hang)


class Census:
    """What there is when all peers are idle."""

    def __init__(self, swarm: Swarm) -> None:
        gc.collect()
        loop: Any = asyncio.get_running_loop()
        self.tasks = Counter(task.get_name().rstrip("-0123456789") for task in asyncio.all_tasks())
        self.timers = sum(not timer.cancelled() for timer in loop._scheduled)
        self.objects = Counter(
            type(one).__qualname__
            for one in gc.get_objects()
            if str(type(one).__module__).startswith("shoal.")
        )
        self.remembered = [len(peer.rounds._ended) for peer in swarm.peers.values()]
        """Rounds that have ended, of each peer: it answers questions about the last ones."""

    def check_against(self, before: Census) -> None:
        """There is no more than before."""
        assert sum(self.tasks.values()) <= sum(before.tasks.values()) + 2, (self.tasks, before.tasks)
        assert self.timers <= before.timers + 2 * COUNT
        assert {name: self.objects[name] for name in PASSING if self.objects[name]} == {}
        assert max(self.remembered) <= REMEMBERED_ROUNDS

    def check_objects_against(self, before: Census) -> None:
        """Likewise of each class: what is remembered may grow to its bound."""
        more = max(1.0, sum(self.remembered) / sum(before.remembered))
        for name, count in self.objects.items():
            if name in CACHES:
                continue
            assert count <= 1.2 * more * before.objects[name] + 20, (name, before.objects[name], count)


@pytest.fixture(autouse=True)
def _objects_of_earlier_tests() -> Iterator[None]:
    """Are not counted."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


async def run_rounds(seed: int, first: int, last: int) -> None:
    swarm = Swarm(seed)
    for number in range(COUNT):
        await swarm.start(number)
    for _ in range(first):
        await swarm.round()
    before = await swarm.settle()
    for _ in range(last - first):
        await swarm.round()
    after = await swarm.settle()
    after.check_against(before)
    if first >= MANY:
        after.check_objects_against(before)
    assert swarm.attempts["averaged"] > 2 * last
    assert min(swarm.attempts[name] for name in ("AllreduceException", "StepFailed")) > 0
    await swarm.close()


def test_nothing_is_left_of_a_few_rounds_with_faults():
    run(run_rounds(1, 2, 2 + len(FAULTS)), limit=100_000.0)


@pytest.mark.sweep
@pytest.mark.parametrize("seed", range(2))
def test_nothing_is_left_of_300_rounds_with_faults(seed: int):
    run(run_rounds(seed, MANY, 300), limit=1_000_000.0)
