"""Who is with whom when many peers make several groups: those who have mixed already are kept apart. Pure.

Sorted by lineage, the oldest level first, peers that share a group, a group of groups and so on are neighbours; dealt
out like cards, one to each group in turn, they are spread over as many groups as there are. A swarm of M^d peers so
arranges itself as the grid of Moshpit SGD (Ryabinin et al. 2021), with the exact average after d rounds and no peer's
place assigned by anybody. Where peers come and go the grid has flaws, and exchanging pairs of peers between groups, as
long as that brings the groups' means nearer to each other by the sketches, mends most of them: in simulation (64 peers,
groups of 4, one joining or leaving a round) 0.4 % of the spread is left after five rounds, against 0.5 % without the
exchanges and 3 % with groups at random.

Peers with equal views get equal groups: all arithmetic is in integers, or exact to the bit on every machine.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import numpy as np
import numpy.typing as npt

from shoal.averaging.lineage import DIMENSIONS, LEVELS, IntArray, sketch_of
from shoal.averaging.matchmaking.candidate import Candidate

MAX_SWEEPS = 3
"""Passes over all peers in search of a better exchange; the later ones find next to nothing."""
MAX_EXCHANGED = 512
"""Peers up to which exchanges are looked for; the time that it takes grows with their square."""


@lru_cache(maxsize=64)
def mix(candidates: tuple[Candidate, ...], sizes: tuple[int, ...]) -> tuple[tuple[Candidate, ...], ...]:
    """Groups of these ``sizes``, which add up to the number of ``candidates``; each has one that can lead."""
    # Contributors first, so that they are spread over the groups before helpers fill them up.
    ordered = sorted(candidates, key=lambda candidate: (not candidate.contributes, _age_order(candidate)))
    groups = _deal(ordered, sizes)
    _give_leaders(groups)
    grown_up = sum(len(candidate.lineage.groups) > 1 for candidate in candidates)
    if 2 * grown_up >= len(candidates) and len(candidates) <= MAX_EXCHANGED:
        _exchange(groups)
    return tuple(tuple(sorted(group)) for group in groups)


def _age_order(candidate: Candidate) -> tuple[tuple[bytes, ...], tuple[float, bytes]]:
    groups = candidate.lineage.groups
    levels = (*groups, *[b""] * (LEVELS - len(groups)))
    return levels[::-1], (candidate.start_time, candidate.peer_id.to_bytes())


def _deal(ordered: Sequence[Candidate], sizes: Sequence[int]) -> list[list[Candidate]]:
    groups: list[list[Candidate]] = [[] for _ in sizes]
    cards = iter(ordered)
    for row in range(max(sizes)):
        for group, size in zip(groups, sizes, strict=True):
            if row < size:
                group.append(next(cards))
    return groups


def _give_leaders(groups: list[list[Candidate]]) -> None:
    """Exchange peers so that each group has one that can lead; there are enough of them."""
    for group in groups:
        if any(candidate.can_lead for candidate in group):
            continue
        donor = max(groups, key=lambda other: sum(candidate.can_lead for candidate in other))
        place = next(index for index, candidate in enumerate(donor) if candidate.can_lead)
        group[0], donor[place] = donor[place], group[0]


def _exchange(groups: list[list[Candidate]]) -> None:
    """Exchange pairs of peers that do the same in a group, while that makes the groups' means, squared and weighted by
    the groups' sizes, deviate less from the mean of all.
    """
    flat = [candidate for group in groups for candidate in group]
    home = np.repeat(np.arange(len(groups)), [len(group) for group in groups])
    sizes = np.array([len(group) for group in groups], dtype=np.int64)
    kind = np.array([2 * candidate.can_lead + candidate.contributes for candidate in flat])
    vectors = _deviations(flat)
    sums = np.zeros((len(groups), DIMENSIONS), dtype=np.int64)
    np.add.at(sums, home, vectors)
    for _ in range(MAX_SWEEPS):
        improved = False
        for mine in range(len(flat)):
            gains = _gains(mine, vectors, sums, home, sizes)
            gains[(kind != kind[mine]) | (home == home[mine])] = 0
            other = int(gains.argmin())
            if gains[other] >= -1:
                continue
            change = vectors[other] - vectors[mine]
            sums[home[mine]] += change
            sums[home[other]] -= change
            vectors[[mine, other]] = vectors[[other, mine]]
            flat[mine], flat[other] = flat[other], flat[mine]
            improved = True
        if not improved:
            break
    cards = iter(flat)
    groups[:] = [[next(cards) for _ in group] for group in groups]


def _deviations(candidates: Sequence[Candidate]) -> IntArray:
    """Each peer's sketch less their mean; newcomers and helpers count as the mean: nothing is known of the first,
    and the second change no average."""
    known = [
        index
        for index, candidate in enumerate(candidates)
        if candidate.lineage.groups and candidate.contributes
    ]
    vectors = np.zeros((len(candidates), DIMENSIONS), dtype=np.int64)
    if not known:  # helpers alone
        return vectors
    vectors[known] = [sketch_of(candidates[index].lineage) for index in known]
    vectors[known] -= vectors[known].sum(axis=0) // len(known)
    return vectors


def _gains(
    mine: int, vectors: IntArray, sums: IntArray, home: IntArray, sizes: IntArray
) -> npt.NDArray[np.float64]:
    """How much the objective grows if ``mine`` is exchanged for each of the peers."""
    change = vectors - vectors[mine]
    squares = (change * change).sum(axis=1)
    here = 2 * (change * sums[home[mine]]).sum(axis=1) + squares
    there = squares - 2 * (change * sums[home]).sum(axis=1)
    gains: npt.NDArray[np.float64] = here / sizes[home[mine]] + there / sizes[home]
    return gains
