"""Lineages, and the groups that keep those apart who have mixed already."""

from __future__ import annotations

import itertools
import random

import pytest

from shoal.averaging.lineage import (
    DIMENSIONS,
    ID_BYTES,
    IDS_PER_LEVEL,
    LEVELS,
    NO_LINEAGE,
    Lineage,
    after_round,
    lineage_problem,
    sketch_of,
)
from shoal.averaging.matchmaking.candidate import Candidate
from shoal.averaging.matchmaking.grouping import cut_groups
from shoal.averaging.matchmaking.mixing import mix
from shoal.testing.matchmaking_cores import core_peer_id

PEERS = [core_peer_id(number) for number in range(64)]


def swarm(count: int, *, clients: int = 0) -> list[Candidate]:
    return [Candidate(float(number), PEERS[number], number >= clients) for number in range(count)]


def one_round(
    candidates: list[Candidate], target: int, rng: random.Random
) -> tuple[list[Candidate], list[set]]:
    """The candidates with the lineages that they have after a round of the planned groups; and these groups."""
    cut = cut_groups(candidates, target, 2, gone=())
    assert not cut.left_over
    after = []
    for group in cut.groups:
        lineage = after_round(
            rng.randbytes(16), [(member.peer_id.to_bytes(), member.lineage) for member in group.members]
        )
        after += [member._replace(lineage=lineage) for member in group.members]
    return sorted(after), [{member.peer_id for member in group.members} for group in cut.groups]


@pytest.mark.parametrize(("base", "dimensions"), [(2, 2), (2, 4), (2, 6), (3, 3), (4, 2), (4, 3), (8, 2)])
def test_full_grids_mix_everybody_with_everybody(base, dimensions):
    rng = random.Random(0)
    candidates = swarm(base**dimensions)
    influences = {candidate.peer_id: {candidate.peer_id} for candidate in candidates}
    for _ in range(dimensions):
        candidates, groups = one_round(candidates, base, rng)
        for group in groups:
            together = set().union(*(influences[peer] for peer in group))
            for peer in group:
                influences[peer] = together
    assert all(len(influence) == len(candidates) for influence in influences.values())


@pytest.mark.parametrize("clients", [0, 5, 9])
def test_few_are_with_a_member_of_their_last_group(clients):
    rng = random.Random(1)
    candidates = swarm(36, clients=clients)
    last: list[set] = []
    again = 0
    for _ in range(6):
        candidates, groups = one_round(candidates, 4, rng)
        again += sum(len(old & new) > 1 for old, new in itertools.product(last, groups))
        last = groups
    assert again < 10  # of 45 groups; by chance it would be 23


def test_every_mixed_group_has_a_leader_and_it_is_the_earliest_that_can():
    rng = random.Random(2)
    candidates, _ = one_round(swarm(20, clients=14), 4, rng)
    for group in cut_groups(candidates, 4, 2, gone=()).groups:
        leaders = [member for member in group.members if member.can_lead]
        assert group.leader == min(leaders).peer_id


def test_the_plan_of_the_others_stays_as_groups_begin():
    rng = random.Random(3)
    candidates, _ = one_round(swarm(64), 4, rng)
    before = [group.members for group in cut_groups(candidates, 4, 2, gone=()).groups]
    gone = sorted(itertools.chain.from_iterable(before[::2]))
    rest = sorted(set(candidates) - set(gone))
    assert [group.members for group in cut_groups(rest, 4, 2, gone=gone).groups] == before[1::2]


def test_a_plan_broken_by_a_peer_that_is_gone_leaves_over_nobody():
    rng = random.Random(4)
    candidates, _ = one_round(swarm(12), 4, rng)
    for lost in candidates:
        rest = [candidate for candidate in candidates if candidate is not lost]
        cut = cut_groups(rest, 4, 2, gone=[lost])
        assert not cut.left_over
        assert sorted(itertools.chain.from_iterable(group.members for group in cut.groups)) == rest


def test_exchanges_bring_the_means_of_groups_nearer_together():
    rng = random.Random(5)
    candidates = swarm(22)  # no grid: groups of 4 and of 2
    for _ in range(3):
        candidates, _ = one_round(candidates, 4, rng)
    sizes = (4, 4, 4, 4, 4, 2)

    def unevenness(groups) -> float:
        mean = sum(sketch_of(candidate.lineage) for candidate in candidates) / len(candidates)
        sums = [sum(sketch_of(member.lineage) - mean for member in group) for group in groups]
        return sum((total**2).sum() / len(group) for total, group in zip(sums, groups, strict=True))

    slices = [candidates[start : start + 4] for start in range(0, 22, 4)]
    assert unevenness(mix(tuple(candidates), sizes)) < 0.5 * unevenness(slices)


def test_all_members_compute_the_same_lineage_and_it_is_small():
    members = [(peer.to_bytes(), NO_LINEAGE) for peer in PEERS[:40]]
    first = after_round(bytes(16), members)
    assert first == after_round(bytes(16), list(members))
    for number in range(10):
        first = after_round(number.to_bytes(16, "big"), [(b"a", first), (b"b", NO_LINEAGE)])
        assert lineage_problem(first) is None
    assert len(first.sketch) + sum(map(len, first.groups)) < 140


@pytest.mark.parametrize(
    "lineage",
    [
        Lineage((b"abcd",) * (LEVELS + 1), bytes(2 * DIMENSIONS)),
        Lineage((b"abc",), bytes(2 * DIMENSIONS)),
        Lineage((b"",), bytes(2 * DIMENSIONS)),
        Lineage((bytes(ID_BYTES * (IDS_PER_LEVEL + 1)),), bytes(2 * DIMENSIONS)),
        Lineage((b"abcd",), bytes(2 * DIMENSIONS - 1)),
        Lineage((b"abcd",), b""),
        Lineage((), bytes(2 * DIMENSIONS)),
        Lineage((b"abcd",), bytes(1_000_000)),
    ],
)
def test_a_lineage_out_of_bounds_is_refused(lineage):
    assert "lineage" in (lineage_problem(lineage) or "")


def test_helpers_alone_are_cut_too():
    """They may be all that is left of the candidates when the other groups are intact."""
    candidates = swarm(4)
    rng = random.Random(1)
    for _ in range(2):
        candidates, _ = one_round(candidates, 2, rng)
    helpers = tuple(candidate._replace(contributes=False) for candidate in candidates)
    groups = mix(helpers, (2, 2))
    assert sorted(member for group in groups for member in group) == sorted(helpers)
