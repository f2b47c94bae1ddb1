"""From samples to medians. Pure."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

from benchmarks.work import BEST_RAW

Samples: TypeAlias = Mapping[str, Mapping[str, Sequence[float]]]
"""By side, then by figure: one number for each measured round."""


@dataclass(frozen=True)
class Spread:
    """What remains of the samples of one figure."""

    median: float
    least: float
    most: float
    count: int


def spread(samples: Sequence[float]) -> Spread:
    """The median, and how far the samples lie apart; there is at least one."""
    return Spread(statistics.median(samples), min(samples), max(samples), len(samples))


def spreads(samples: Samples) -> dict[str, dict[str, Spread]]:
    """The spread of every figure of every side that has samples."""
    return {
        side: {figure: spread(values) for figure, values in figures.items() if values}
        for side, figures in samples.items()
    }


def medians(samples: Samples, main: str) -> dict[str, dict[str, float]]:
    """The medians of every side, with the best number of connections standing for raw TCP.

    :param main: the figure that decides which number of connections is best: more is better
    """
    found = {
        side: {figure: one.median for figure, one in figures.items()}
        for side, figures in spreads(samples).items()
    }
    best = best_raw(found, main)
    return found if best is None else found | {BEST_RAW: found[best]}


def best_raw(found: Mapping[str, Mapping[str, float]], main: str) -> str | None:
    """The name of the fastest side of raw TCP, if any was measured."""
    raw = [side for side in found if side.startswith("raw ") and main in found[side]]
    return max(raw, key=lambda side: found[side][main], default=None)
