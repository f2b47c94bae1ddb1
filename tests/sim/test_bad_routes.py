"""Peers whose route to each other is bad find that out in a round. Then they average apart, or spare that route."""

from __future__ import annotations

import asyncio
import itertools
import random

import pytest
import torch
from tests.swept import rest_swept

from shoal.averaging.allreduce.round import Round, RoundResult, RoundTimeouts
from shoal.averaging.allreduce.rounds import Rounds
from shoal.averaging.background.division import Division
from shoal.averaging.group import GroupInfo, PeerMode
from shoal.averaging.matchmaking_config import MatchmakingConfig
from shoal.averaging.partition import Layout
from shoal.averaging.router import Router
from shoal.compression.base import NoCompression
from shoal.errors import MatchmakingException
from shoal.p2p.identity import PeerID
from shoal.testing.arena import make_arena, tensor_in
from shoal.testing.clock import run
from shoal.testing.matchmaking import SimulatedMatchmaking
from shoal.testing.swarm import Attempt, SimulatedSwarm

COUNT = 4
TENSOR = torch.arange(4000, dtype=torch.float32)
LAYOUT = Layout.from_tensors([TENSOR], [NoCompression()])
DIVISION = Division(LAYOUT, part_size_bytes=1024, min_vector_size=0)
TIMEOUTS = RoundTimeouts(None, sender=5.0, reducer=10.0)


class Swarm:
    """Peers that find groups and run rounds in them, as an averager does."""

    def __init__(self, seed: int) -> None:
        self.sim = SimulatedMatchmaking(seed, MatchmakingConfig(COUNT))
        self.rounds: list[Rounds] = []
        self.unreached: list[set[int]] = [set() for _ in range(COUNT)]
        """Whom each peer could not reach in its rounds."""
        self.all_have_a_group = asyncio.Barrier(COUNT)
        self.is_route_bad = False

    async def start(self) -> None:
        await self.sim.start([PeerMode.FULL] * COUNT)
        self.rounds = [Rounds(Router.of(self.sim.dht.nodes[number].host), "swarm") for number in range(COUNT)]

    def number(self, peer: PeerID) -> int:
        return [self.sim.dht.identity(number).peer_id for number in range(COUNT)].index(peer)

    async def attempt(self, number: int, pair: set[int]) -> RoundResult:
        """Find a group and average there; the route between the ``pair`` is bad from the first round on."""
        group = await self.sim.search(number, starts_in=5.0, timeout=30.0)
        assert isinstance(group, GroupInfo), group
        if not self.is_route_bad:
            await self.all_have_a_group.wait()
            self.is_route_bad = True
            self.sim.network.silence(*(f"node{other}" for other in pair))
        arena = make_arena(LAYOUT)
        tensor_in(LAYOUT, arena.snapshot, 0).copy_(TENSOR + number)
        current = Round(
            self.sim.dht.nodes[number].host,
            "swarm",
            group,
            DIVISION.among(group),
            arena,
            take_snapshot=lambda: asyncio.sleep(0),
            weight=lambda: 1.0,
            timeouts=TIMEOUTS,
        )
        self.rounds[number].begin(current)
        try:
            result = await current.run()
        finally:
            self.rounds[number].end(current)
        self.unreached[number] |= {self.number(peer) for peer in current.unreached}
        self.sim.matchmakers[number].keep_apart(current.unreached)
        if result.failure is None:
            self.sim.matchmakers[number].round_committed(group, current.unreached)
        return result


@pytest.mark.parametrize("seed", rest_swept(range(8), kept=3))
def test_a_round_finds_the_bad_route_and_everybody_averages_at_the_second_attempt(seed: int):
    swarm = Swarm(seed)
    pair = set(random.Random(f"bad route {seed}").sample(range(COUNT), 2))

    async def attempts(number: int) -> list[RoundResult]:
        """Like a step with one retry, which begins as soon as the round has failed for this peer."""
        first = await swarm.attempt(number, pair)
        return [first, await swarm.attempt(number, pair)]

    async def story() -> list[list[RoundResult]]:
        try:
            await swarm.start()
            return list(await asyncio.gather(*map(attempts, range(COUNT))))
        finally:
            await swarm.sim.close()

    results = run(story)
    assert all(first.failure or first.exclusions for first, _ in results), (
        "nothing happened in the first round"
    )
    blamed = {(number, other) for number in range(COUNT) for other in swarm.unreached[number]}
    assert blamed
    assert all({number, other} == pair for number, other in blamed), (pair, blamed)
    for _, second in results:
        assert second.failure is None
        assert not second.exclusions


def groups_beside_a_silent_leader(seed: int) -> list[GroupInfo | MatchmakingException]:
    """What a peer finds in its third search and later, if it cannot dial the first of the others, which always leads.

    So no round ever shows the bad route. It takes up to two searches until a dead connection is given up. A group with
    that leader is an error.
    """
    swarm = Swarm(seed)
    order = random.Random(f"silent leader {seed}").sample(range(COUNT), COUNT)
    leader, unlucky = order[0], order[-1]

    async def groups_of_unlucky() -> list[GroupInfo | MatchmakingException]:
        found = []
        try:
            await swarm.start()
            swarm.sim.network.silence(f"node{leader}", f"node{unlucky}")
            for _ in range(5):
                searches = []
                for number in order:
                    searches.append(swarm.sim.search(number, starts_in=5.0, timeout=30.0))
                    await asyncio.sleep(0.05)
                found.append((await asyncio.gather(*searches))[-1])
        finally:
            await swarm.sim.close()
        return found

    groups = run(groups_of_unlucky)[2:]
    silent = swarm.sim.dht.identity(leader).peer_id
    assert all(silent not in group.peer_ids for group in groups if isinstance(group, GroupInfo))
    return groups


@pytest.mark.parametrize("seed", rest_swept(range(4), kept=2))
def test_a_peer_whose_leader_cannot_be_dialed_finds_other_members(seed: int):
    for group in groups_beside_a_silent_leader(seed):
        assert isinstance(group, GroupInfo), group


# ---- three peers, of which two cannot talk: there is no other group


class SwarmOfThree:
    """Peers that step again and again; peer 0 comes first, and leads. After two steps the route of ``pair`` is bad."""

    def __init__(self, seed: int, pair: tuple[int, int]) -> None:
        self.swarm = SimulatedSwarm(seed, MatchmakingConfig(3), timeouts=TIMEOUTS)
        self.pair = pair

    async def steps(self, number: int, count: int) -> list[Attempt]:
        await asyncio.sleep(0.01 * number)
        attempts = []
        for step in range(count):
            if step == 2:
                self.swarm.network.silence(*(f"node{other}" for other in self.pair))
            attempt = await self.swarm.step(number, timeout=600.0)
            assert isinstance(attempt, Attempt), attempt
            attempts.append(attempt)
        return attempts

    def run(self, count: int) -> list[list[Attempt]]:
        """What each peer went through, until one has made ``count`` steps: others may lack a partner after that."""

        async def story() -> list[list[Attempt]]:
            try:
                for number in range(3):
                    await self.swarm.start(number)
                stories = [asyncio.ensure_future(self.steps(number, count)) for number in range(3)]
                done, _ = await asyncio.wait(stories, return_when=asyncio.FIRST_COMPLETED)
                assert all(one.exception() is None for one in done), done
                await asyncio.sleep(1.0)  # the others of its group end, too
                for one in stories:
                    one.cancel()
                await asyncio.wait(stories)
            finally:
                await self.swarm.close()
            self.swarm.check()
            return [[one for one in self.swarm.attempts if one.number == number] for number in range(3)]

        return run(story)


SEEDS = rest_swept((3, 0, 1, 2))


@pytest.mark.parametrize("seed", SEEDS)
def test_followers_that_cannot_talk_average_in_one_group(seed: int):
    """Though the leader alone owns the vector, such a round takes no longer than an undisturbed one."""
    stories = SwarmOfThree(seed, (1, 2)).run(5)
    undisturbed = max(story[1].result.allreduce_seconds for story in stories)
    for story in stories:
        assert len(story) == 5
        for attempt in story[3:]:
            assert len(attempt.group) == 3
            assert not attempt.result.exclusions
            assert attempt.result.allreduce_seconds < 1.5 * undisturbed


@pytest.mark.parametrize("seed", SEEDS)
def test_a_leader_and_a_follower_that_cannot_talk_take_turns(seed: int):
    """The one that was left alone is first in the next search, and leads."""
    stories = SwarmOfThree(seed, (0, 1)).run(8)
    pairs = [attempt.group for attempt in stories[2] if len(attempt.group) == 2]
    assert len(pairs) >= 4
    assert all(one.leader != following.leader for one, following in itertools.pairwise(pairs[1:]))
