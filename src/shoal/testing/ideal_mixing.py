"""How fast a swarm could mix if somebody saw all of it: what mixing by matchmaking is compared with. Pure.

The ideal dealer knows who is there in each round. It cuts all that are there into groups of even sizes, as many as
:func:`~shoal.averaging.matchmaking.seats.choose_layout` has for them, and deals each group's members to as many
different groups of the next round as there are. A peer that is absent keeps its value, and its place between others is
closed; when it is back, it has any place. Nothing is lost by views that differ, by late peers or by what a peer cannot
know.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from shoal.averaging.matchmaking.seats import choose_layout

__all__ = ["ideal_rounds", "random_rounds", "rounds_needed", "slow_peers_away"]

Indices: TypeAlias = npt.NDArray[np.int64]

DIMENSIONS = 32
TIMES_SLOWER = 10
"""Slow peers take part in one of so many rounds, each in another one."""


def slow_peers_away(count: int, slow: float, number: int) -> list[int]:
    """The first peers, that share of all, are slow: those of them that miss the round with this number. All begin
    together, with round 0.
    """
    return [one for one in range(round(slow * count)) if number and (one + number) % TIMES_SLOWER]


def ideal_rounds(
    seed: int, count: int, target: int, absent: float, most: int, slow: float = 0.0
) -> list[float]:
    """The variance after each round of the ideal dealer, so many rounds at ``most``. The shares of all that are
    ``absent``, by chance, and ``slow`` (:func:`slow_peers_away`) miss a round.
    """
    draw = np.random.default_rng(seed)
    values = draw.standard_normal((count, DIMENSIONS))
    groups = max(1, choose_layout(count, target).groups)
    order = draw.permutation(count)
    variances = []
    for number in range(most):
        is_there = draw.random(count) >= absent
        is_there[slow_peers_away(count, slow, number)] = False
        there, away = order[is_there[order]], order[~is_there[order]]
        # The first round's groups are neighbours; later ones take one member in turn of those that are.
        dealt = (
            np.array_split(there, groups)
            if number == 0
            else [there[first::groups] for first in range(groups)]
        )
        _average(values, dealt)
        order = np.concatenate([draw.permutation(group) for group in dealt])
        order = np.insert(order, draw.integers(len(order) + 1, size=len(away)), away)
        variances.append(_variance(values))
    return variances


def random_rounds(
    seed: int, count: int, target: int, absent: float, most: int, slow: float = 0.0
) -> list[float]:
    """Likewise, with groups at random: what every mixing has to be better than."""
    draw = np.random.default_rng(seed)
    values = draw.standard_normal((count, DIMENSIONS))
    variances = []
    for number in range(most):
        is_there = draw.random(count) >= absent
        is_there[slow_peers_away(count, slow, number)] = False
        there = draw.permutation(np.flatnonzero(is_there))
        _average(values, np.array_split(there, -(-len(there) // target)))
        variances.append(_variance(values))
    return variances


def rounds_needed(variances: Sequence[float], variance: float) -> float:
    """After how many rounds the variance was below this, infinite if it never was."""
    return next((float(number) for number, one in enumerate(variances, 1) if one < variance), math.inf)


def _average(values: npt.NDArray[np.float64], groups: Sequence[Indices]) -> None:
    for group in groups:
        values[group] = values[group].mean(axis=0)


def _variance(values: npt.NDArray[np.float64]) -> float:
    return float(values.var(axis=0).mean())
