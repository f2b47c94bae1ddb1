"""Swarms too small for a grid form the very groups that they would form if there were no grids."""

from __future__ import annotations

import random
from collections.abc import Sequence

import pytest
from tests.swept import rest_swept

from shoal.averaging.lineage import NO_LINEAGE, after_round
from shoal.averaging.matchmaking.group_keys import GroupKeys
from shoal.averaging.matchmaking.seats import SPREAD_ABOVE
from shoal.averaging.matchmaking.view import NOTHING_KNOWN
from shoal.averaging.matchmaking_config import MatchmakingConfig
from shoal.p2p.identity import PeerID
from shoal.testing.matchmaking_cores import Peer, SwarmOfCores, core_peer_id

TARGET = 4
WAIT = 5.0


class Story:
    """A swarm of which each peer has ``GroupKeys``, that know of grids, or ``GroupBits`` alone, that do not."""

    def __init__(self, seed: int, count: int, target: int, *, knows_grids: bool) -> None:
        self.rng = random.Random(f"small {seed}")
        self.target = target
        self.swarm = SwarmOfCores(seed, MatchmakingConfig(target, min_matchmaking_time=WAIT))
        self.knows_grids = knows_grids
        self.peers = [core_peer_id(number) for number in range(count)]
        self.keys = {peer: GroupKeys(peer) for peer in self.peers}
        self.lineages = dict.fromkeys(self.peers, NO_LINEAGE)
        self.log: list[tuple[PeerID, tuple[bytes, ...] | None, float]] = []
        """Of each search: its peer, the group that it found, and when."""

    def search(self, peer: PeerID, starts_in: float) -> Peer:
        before = self.swarm.peers.get(peer)
        keys = self.keys[peer]
        return self.swarm.search(
            peer,
            starts_in,
            lineage=self.lineages[peer],
            known=NOTHING_KNOWN if before is None else before.core.known,
            keys=keys if self.knows_grids else None,
            bits=None if self.knows_grids else keys.bits,
        )

    def round(self, jitter: float) -> list[int]:
        """All search, beginning within ``jitter`` seconds; the sizes of the groups."""
        searches = [self.search(peer, self.rng.uniform(0, jitter)) for peer in self.peers]
        self.swarm.run()
        for search in searches:
            self.finish(search)
        return sorted(len(group) for group in {search.group for search in searches if search.group})

    def finish(self, search: Peer) -> None:
        peer, group = search.peer_id, search.formed
        self.log.append((peer, search.group, search.finished_at))
        self.keys[peer].search_ended()
        if group is not None:
            members = [(member.peer_id, member.lineage) for member in group.members]
            self.lineages[peer] = after_round(group.group_id, members)
            self.keys[peer].round_committed(group, self.target)
        assert not self.keys[peer].has_seat


def both(seed: int, count: int, target: int = TARGET) -> Sequence[Story]:
    return [Story(seed, count, target, knows_grids=knows) for knows in (True, False)]


SEEDS = rest_swept(range(10))


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize(
    ("count", "target"), [(8, 4), (20, 4), pytest.param(40, 32, marks=pytest.mark.sweep)]
)
def test_rounds_of_all_are_the_same(seed, count, target):
    check_rounds(seed, count, target, rounds=3)


@pytest.mark.sweep
def test_rounds_of_the_largest_swarm_without_a_grid_are_the_same():
    check_rounds(0, SPREAD_ABOVE, 32, rounds=2)


def check_rounds(seed: int, count: int, target: int, rounds: int) -> None:
    one, other = both(seed, count, target)
    for story in (one, other):
        for _ in range(rounds):
            story.round(0.3)
    assert one.log == other.log


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("count", [7, 32])
def test_starts_over_some_seconds_are_the_same(seed, count):
    one, other = both(seed, count)
    for story in (one, other):
        for jitter in (6.0, 0.3, 3.0):
            story.round(jitter)
    assert one.log == other.log


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize(("count", "left"), [(8, 4), (24, 12), pytest.param(48, 16, marks=pytest.mark.sweep)])
def test_what_is_left_of_a_swarm_is_one_again_at_once(seed, count, left):
    """No peer waits for those that were killed for more than one round."""
    one, other = both(seed, count)
    for story in (one, other):
        for _ in range(2):
            story.round(0.3)
        story.peers = story.peers[:left]
        sizes = [story.round(0.3) for _ in range(3)]
        assert sizes[1:] == [[TARGET] * (left // TARGET)] * 2, sizes
    assert one.log == other.log
