"""Whole groups of matchmaking cores always leave over as few peers as the sizes allow."""

from __future__ import annotations

import math
import random
from collections import Counter

import pytest
from tests.swept import rest_swept

from shoal.averaging.group import PeerMode
from shoal.averaging.matchmaking.messages import Declaration
from shoal.averaging.matchmaking.sizes import plan_groups, plan_with_helpers
from shoal.averaging.matchmaking_config import MatchmakingConfig
from shoal.p2p.identity import PeerID
from shoal.testing.matchmaking_cores import Peer, SwarmOfCores, core_peer_id

PEER_IDS = [core_peer_id(number) for number in range(16)]
BLOCK = 50
"""Seeds in one test."""
blocks = pytest.mark.parametrize("first", rest_swept(range(0, 300, BLOCK), kept=2))


def check_groups(swarm: SwarmOfCores) -> None:
    minimum, target = swarm.config.min_group_size, swarm.config.target_group_size
    groups: dict[int, tuple[bytes, ...]] = {}
    for peer in swarm.peers.values():
        if peer.group is None:
            assert peer.failure is not None or not peer.alive
            continue
        assert peer.peer_id.to_bytes() in peer.group
        assert groups.setdefault(peer.group_id, peer.group) == peer.group
        assert minimum <= len(peer.group) <= (target or math.inf)
    members = [member for group in groups.values() for member in group]
    assert len(members) == len(set(members)), "somebody is in two groups"


def make_swarm(seed: int, *, jitter: bool) -> SwarmOfCores:
    rng = random.Random(seed)
    target = rng.choice([None, 2, 3, 4, 5, 6, 7, 8])
    minimum = rng.randint(2, target or 4)
    config = MatchmakingConfig(
        target_group_size=target,
        min_group_size=minimum,
        min_matchmaking_time=rng.uniform(3.0, 6.0),
        request_timeout=rng.uniform(1.0, 6.0),
    )
    peers = rng.randint(2, 12)
    clients = rng.randint(0, peers) if rng.random() < 0.3 else 0
    window = config.min_matchmaking_time * rng.uniform(0.05, 0.8) if jitter else 0.0
    swarm = SwarmOfCores(seed, config)
    for index, peer_id in enumerate(swarm.rng.sample(PEER_IDS, peers)):
        mode = PeerMode.CLIENT if index < clients else PeerMode.FULL
        swarm.search(peer_id, swarm.rng.uniform(0, window), mode)
    return swarm


def fewest_left_over(swarm: SwarmOfCores) -> int:
    leaders = sum(peer.mode.can_lead for peer in swarm.peers.values())
    n = len(swarm.peers)
    return n - sum(plan_groups(n, swarm.config.target_group_size, swarm.config.min_group_size, leaders))


def check_same_instant(seed: int) -> None:
    swarm = make_swarm(seed, jitter=False)
    swarm.run()
    check_groups(swarm)
    left = [peer.peer_id for peer in swarm.left_over()]
    assert len(left) == fewest_left_over(swarm), f"seed {seed}: {swarm.config}: {len(left)} left over"


@blocks
def test_peers_that_start_in_one_instant_leave_over_as_few_as_possible(first):
    for seed in range(first, first + BLOCK):
        check_same_instant(seed)


def test_nobody_is_stranded_by_a_leader_that_counts_on_a_group_which_has_begun():
    check_same_instant(1899)


def check_jittered(seed: int) -> None:
    swarm = make_swarm(seed, jitter=True)
    swarm.run()
    check_groups(swarm)
    left = swarm.left_over()
    leaders = sum(peer.mode.can_lead for peer in left)
    more = plan_groups(len(left), swarm.config.target_group_size, swarm.config.min_group_size, leaders)
    assert more == (), f"seed {seed}: {swarm.config}: {len(left)} left over could have made groups of {more}"


@blocks
def test_peers_that_start_one_after_another_leave_over_no_whole_group(first):
    for seed in range(first, first + BLOCK):
        check_jittered(seed)


@pytest.mark.soak
@pytest.mark.parametrize("first", range(300, 20_300, 1000))
def test_many_more_swarms(first):
    for seed in range(first, first + 1000):
        check_same_instant(seed)
        check_jittered(seed)


class LateRecords(SwarmOfCores):
    """The DHT shows what one peer declares some seconds late to all others."""

    late: PeerID
    LATER = 2.9

    def store(self, peer: Peer, key: str, record: Declaration) -> None:
        store = super().store
        if peer.peer_id == self.late:
            self.at(self.now + self.LATER, lambda: store(peer, key, record))
        else:
            store(peer, key, record)


def check_late_record(seed: int) -> None:
    """A follower has found its leader. The third peer has not, for its DHT is slow, and asks the follower instead.

    It would look at the DHT again only when the leader has begun.
    """
    rng = random.Random(f"late record {seed}")
    swarm = LateRecords(seed, MatchmakingConfig(3, 2, 5.0))
    swarm.late, follower, third = swarm.rng.sample(PEER_IDS, 3)
    swarm.search(swarm.late)
    swarm.search(follower, rng.uniform(0.5, 1.0))
    swarm.search(third, rng.uniform(1.6, 2.0)).poll_time = rng.uniform(2.2, 2.6)
    swarm.run()
    check_groups(swarm)
    assert not swarm.left_over(), f"seed {seed}"


def test_a_peer_that_asks_a_follower_is_sent_to_a_leader_that_it_does_not_see():
    for seed in range(BLOCK):
        check_late_record(seed)


def make_swarm_with_helpers(seed: int, *, jitter: bool) -> SwarmOfCores:
    rng = random.Random(f"helpers {seed}")
    target = rng.choice([None, 2, 3, 4, 5, 6])
    config = MatchmakingConfig(target, rng.randint(2, target or 4), rng.uniform(3.0, 6.0))
    swarm = SwarmOfCores(seed, config)
    window = config.min_matchmaking_time * rng.uniform(0.05, 0.8) if jitter else 0.0
    kinds = [PeerMode.FULL, PeerMode.CLIENT, PeerMode.AUXILIARY]
    shares = [rng.random() * rng.randint(0, 1), rng.random() * rng.randint(0, 1), rng.random()]
    for peer_id in swarm.rng.sample(PEER_IDS, rng.randint(2, 12)):
        swarm.search(peer_id, swarm.rng.uniform(0, window), rng.choices(kinds, shares)[0])
    return swarm


def plan_of(swarm: SwarmOfCores, peers: list[Peer]) -> tuple[int, ...]:
    count = Counter(peer.mode for peer in peers)
    kinds = (count[PeerMode.FULL], count[PeerMode.CLIENT], count[PeerMode.AUXILIARY])
    return plan_with_helpers(*kinds, swarm.config.target_group_size, swarm.config.min_group_size)


def check_helpers(seed: int, *, jitter: bool) -> None:
    swarm = make_swarm_with_helpers(seed, jitter=jitter)
    swarm.run()
    check_groups(swarm)
    mode_of = {peer.peer_id.to_bytes(): peer.mode for peer in swarm.peers.values()}
    for peer in swarm.peers.values():
        assert peer.group is None or any(mode_of[member].contributes for member in peer.group)
    assert plan_of(swarm, swarm.left_over()) == (), f"seed {seed}: those left over could have made groups"
    if not jitter:
        everybody = list(swarm.peers.values())
        contributors = sum(peer.mode.contributes for peer in everybody)
        placed = sum(peer.mode.contributes and peer.group is not None for peer in everybody)
        assert placed >= min(contributors, sum(plan_of(swarm, everybody))) - sum(
            not peer.mode.contributes for peer in everybody if peer.group is not None
        ), f"seed {seed}: {swarm.config}"


@pytest.mark.parametrize("jitter", rest_swept([True, False]), ids=["one after another", "one instant"])
@pytest.mark.parametrize("first", rest_swept(range(0, 300, BLOCK)))
def test_swarms_with_helpers_leave_over_no_whole_group(first, jitter):
    for seed in range(first, first + BLOCK):
        check_helpers(seed, jitter=jitter)
