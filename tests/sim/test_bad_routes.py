"""Peers whose route to each other is bad find that out in a round, and average apart at their second attempt."""

from __future__ import annotations

import asyncio
import random

import pytest
import torch

from shoal.averaging.allreduce.exchange import Arena
from shoal.averaging.allreduce.round import Round, RoundResult, RoundTimeouts
from shoal.averaging.allreduce.rounds import Rounds
from shoal.averaging.group import GroupInfo, PeerMode
from shoal.averaging.load_balancing import load_balance_peers
from shoal.averaging.matchmaking_config import MatchmakingConfig
from shoal.averaging.partition import Layout, Partition
from shoal.averaging.router import Router
from shoal.compression.base import NoCompression
from shoal.errors import MatchmakingException
from shoal.p2p.identity import PeerID
from shoal.testing.clock import run
from shoal.testing.matchmaking import SimulatedMatchmaking

COUNT = 4
TENSOR = torch.arange(4000, dtype=torch.float32)
LAYOUT = Layout.from_tensors([TENSOR], [NoCompression()])
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
        arena = Arena(*(torch.zeros(LAYOUT.nbytes, dtype=torch.uint8) for _ in range(2)))
        LAYOUT.tensor_view(arena.snapshot, 0).copy_(TENSOR + number)
        owned = load_balance_peers(LAYOUT.data_nbytes, [1.0] * len(group), 0)
        current = Round(
            self.sim.dht.nodes[number].host,
            "swarm",
            group,
            Partition.create(LAYOUT, owned, 1024),
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
            self.sim.matchmakers[number].round_committed(group)
        return result


@pytest.mark.parametrize("seed", range(8))
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


@pytest.mark.parametrize("seed", range(4))
def test_a_peer_whose_leader_cannot_be_dialed_finds_other_members(seed: int):
    for group in groups_beside_a_silent_leader(seed):
        assert isinstance(group, GroupInfo), group
