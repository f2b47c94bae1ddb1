"""Many more peers than fit into one group: groups of cores mix them, whoever comes and goes."""

from __future__ import annotations

import math
import random
from collections import Counter
from functools import partial

import numpy as np
import pytest

from shoal.averaging.lineage import NO_LINEAGE, Lineage, after_round
from shoal.averaging.matchmaking.group_bits import LONELY_BELOW, MAX_DEPTH, SPLIT_ABOVE, GroupBits
from shoal.averaging.matchmaking.view import GONE_WITHIN, NOTHING_KNOWN
from shoal.averaging.matchmaking_config import MatchmakingConfig
from shoal.p2p.identity import PeerID
from shoal.testing.matchmaking_cores import Peer, SwarmOfCores, core_peer_id

ROUNDS = 5
EXPLORE_AFTER = 1.0
DIMENSIONS = 32
PEER_IDS = [core_peer_id(number) for number in range(1100)]


class Story:
    """Rounds of averaging; before each, one peer joins, with the state of another, or leaves."""

    def __init__(
        self,
        seed: int,
        count: int,
        target: int,
        *,
        churn: bool = True,
        jitter: float = 0.0,
        rounds: int = ROUNDS,
    ) -> None:
        self.rounds = rounds
        self.rng = random.Random(f"mixing {seed}")
        self.swarm = SwarmOfCores(seed, MatchmakingConfig(target, min_matchmaking_time=5.0))
        self.churn = churn
        self.jitter = jitter
        self.newcomers = iter(PEER_IDS[count:])
        noise = np.random.default_rng(seed).standard_normal((count, DIMENSIONS))
        self.values = dict(zip(PEER_IDS[:count], noise, strict=True))
        self.stayed = set(self.values)
        self.lineages: dict[PeerID, Lineage] = {}
        self.bits: dict[PeerID, GroupBits] = {}
        self.seconds: list[float] = []
        self.spreads = [self.spread()]
        self.tries = self.found = 0

    def tell(self) -> None:
        for _ in range(self.rounds):
            if self.churn:
                self.change()
            self.round()
            self.spreads.append(self.spread())

    def change(self) -> None:
        present = sorted(self.values)
        if self.rng.random() < 0.5:
            self.values[next(self.newcomers)] = self.values[self.rng.choice(present)]
        else:
            leaver = self.rng.choice(present)
            del self.values[leaver]
            self.stayed.discard(leaver)

    def round(self) -> None:
        before = dict(self.swarm.peers)
        searches = [
            self.swarm.search(
                peer_id,
                self.rng.uniform(0, self.jitter),
                lineage=self.lineages.get(peer_id, NO_LINEAGE),
                known=before[peer_id].core.known if peer_id in before else NOTHING_KNOWN,
                bits=self.bits.setdefault(peer_id, GroupBits(peer_id)),
            )
            for peer_id in self.values
        ]
        for search in searches:
            if search.peer_id not in before:
                self.swarm.at(self.swarm.now + EXPLORE_AFTER, partial(self.explore, search))
        began = self.swarm.now
        self.swarm.run()
        for search in searches:
            self.count(search)
        groups = {search.group_id: search.group for search in searches if search.group is not None}
        self.seconds += [search.finished_at - began for search in searches]
        self.tries += len(searches)
        for group_id, group in groups.items():
            members = [PeerID.from_bytes(member) for member in group]
            self.found += len(members)
            average = np.mean([self.values[member] for member in members], axis=0)
            lineage = after_round(
                group_id.to_bytes(16, "little"),
                [(member.to_bytes(), self.lineages.get(member, NO_LINEAGE)) for member in members],
            )
            for member in members:
                self.values[member] = average
                self.lineages[member] = lineage
                self.bits[member].round_committed(
                    self.swarm.peers[member].formed, self.swarm.config.target_group_size
                )

    def explore(self, search: Peer) -> None:
        counts = self.populations(search, range(MAX_DEPTH + 1), self.swarm.now)
        if search.finished_at == math.inf and self.bits[search.peer_id].explored(counts):
            self.swarm.move(search)

    def count(self, search: Peer) -> None:
        bits = self.bits[search.peer_id]
        since = search.core.me.start_time - GONE_WITHIN
        own = search.core.count_seen
        bits.counted(own, self.populations(search, bits.depths_to_count(own), since))
        bits.search_ended()

    def populations(self, search: Peer, depths: range, since: float) -> dict[int, int]:
        bits = self.bits[search.peer_id]
        return {depth: self.swarm.population(bits.bits_at(depth), since, search.peer_id) for depth in depths}

    def spread(self) -> float:
        """The standard deviation over the peers present throughout, over all dimensions together."""
        return float(np.sqrt(np.var([self.values[peer] for peer in sorted(self.stayed)], axis=0).mean()))


def check(seed: int, count: int, target: int, limit: float, **options: float) -> None:
    story = Story(seed, count, target, **options)
    story.tell()
    assert story.spreads[-1] < limit * story.spreads[0], f"seed {seed}: {story.spreads}"
    assert story.found >= 0.99 * story.tries, f"seed {seed}: {story.found} of {story.tries}"


@pytest.mark.sweep
@pytest.mark.parametrize("seed", range(4))
def test_64_peers_in_groups_of_4_come_to_1_percent_of_their_spread_while_some_join_and_leave(seed):
    check(seed, 64, 4, 0.01)


@pytest.mark.parametrize(
    ("count", "target", "limit"), [(16, 2, 0.02), (16, 4, 1e-9), (27, 3, 0.1), (12, 4, 0.2)]
)
def test_swarms_of_other_sizes_mix(count, target, limit):
    for seed in range(2):
        check(seed, count, target, limit, churn=False)


@pytest.mark.parametrize("seed", range(5))
def test_a_replaced_peer_slows_down_few_rounds(seed):
    """The record of a killed peer stays for a minute. Each of the others waits for that peer in one search."""
    story = Story(seed, 2, 2, churn=False)
    story.round()
    _, killed = story.values
    story.values[next(story.newcomers)] = story.values.pop(killed)
    story.round()  # the first one waits
    story.round()  # and now the newcomer, which has seen the record
    before = len(story.seconds)
    for _ in range(3):
        story.round()
    assert story.found == story.tries
    assert killed in story.swarm.peers[next(iter(story.values))].core.known.start_times
    assert max(story.seconds[before:]) < 2.5, "60 % of min_matchmaking_time are 3 s"


@pytest.mark.soak
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("first", range(100, 500, 50))
def test_many_more_swarms_of_64(first):
    for seed in range(first, first + 50):
        check(seed, 64, 4, 0.01)


def check_large(seed: int, count: int, depth: int, rounds: int) -> None:
    """From all at one ``depth`` to where all belong, and nearly everybody in a group in every round."""
    story = Story(seed, count, 4, rounds=rounds)
    for peer_id in story.values:
        story.bits[peer_id] = GroupBits(peer_id)
        story.bits[peer_id].depth = depth
    story.tell()
    assert story.found >= 0.99 * story.tries, f"{story.found} of {story.tries}"
    depths = Counter(story.bits[peer_id].depth for peer_id in story.values)
    (final, most), *_ = depths.most_common(1)
    assert LONELY_BELOW < count / 2**final <= SPLIT_ABOVE, depths
    assert most >= 0.99 * count, depths
    assert story.spreads[-1] < 0.05 * story.spreads[0], story.spreads


@pytest.mark.soak
@pytest.mark.timeout(1200)
@pytest.mark.parametrize(
    ("count", "depth"),
    [(256, 0), (256, 5), (1024, 3), (1024, 5)],
    ids=["256", "256 deep", "1024", "1024 deep"],
)
def test_swarms_of_hundreds_spread_over_keys_and_strand_nobody(count, depth):
    check_large(0, count, depth, rounds=7)
