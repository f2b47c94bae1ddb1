"""How fast large swarms mix, beside what is ideal and beside groups at random, in simulated time.

    python -m benchmarks.mixing                           the whole table; a quarter of an hour on two cores
    python -m benchmarks.mixing --quick                   64 to 128 peers; half a minute
    python -m benchmarks.mixing --picture docs/images/mixing.png

Peers hold values from N(0, 1). They find their groups by the cores that real peers use, in an imagined network whose
delays differ, and hold their group's average after it. The table says after how many rounds the variance over the peers
is below 1e-9. The ideal dealer sees the whole swarm (``shoal.testing.ideal_mixing``).
"""

from __future__ import annotations

import argparse
import math
import os
import statistics
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from shoal.averaging.group import PeerMode
from shoal.testing.ideal_mixing import ideal_rounds, random_rounds, rounds_needed, slow_peers_away
from shoal.testing.mixing import MixingSwarm, RoundResult

MIXED = 1e-9
SEEDS_BELOW = 256
"""Up to so many peers there are ten seeds, above three; and three where slow peers make many rounds."""
MOST = 24
"""Rounds after which a swarm counts as never mixed,"""
MOST_WITH_SLOW = 60
"""and where some peers take part in one of ten."""
MODES = (PeerMode.FULL, PeerMode.FULL, PeerMode.CLIENT, PeerMode.AUXILIARY)


@dataclass(frozen=True)
class Case:
    """One row. Shares of all: ``absent`` miss each round, ``slow`` take part in one of ten, ``churn`` are replaced by
    others before each.
    """

    count: int
    target: int
    absent: float = 0.0
    churn: float = 0.0
    modes: tuple[PeerMode, ...] = (PeerMode.FULL,)
    slow: float = 0.0
    also: int | None = None
    """The target size of every second peer, if it is another."""

    @property
    def seeds(self) -> int:
        return 10 if self.count <= SEEDS_BELOW and not self.slow else 3

    @property
    def most(self) -> int:
        return MOST_WITH_SLOW if self.slow else MOST

    @property
    def name(self) -> str:
        words = [f"{self.count:,} in groups of {self.target}"]
        words += [f"{self.absent:.0%} absent"] if self.absent else []
        words += [f"{self.churn:.0%} join and leave"] if self.churn else []
        words += [f"{self.slow:.0%} ten times slower"] if self.slow else []
        words += ["clients and auxiliaries"] if len(self.modes) > 1 else []
        words += [f"and of {self.also}"] if self.also else []
        return ", ".join(words)


@dataclass(frozen=True)
class Row:
    """What a case has come to: rounds, as means over the seeds; infinite: some were never mixed."""

    case: Case
    shoal: float
    ideal: float
    random: float
    alone: float
    """The part of all searches that ended without a group."""
    seconds: float
    """Until a group stood, the median of the later rounds."""
    polls: float
    """Reads of the DHT for each peer and round, in the later rounds."""

    def __str__(self) -> str:
        figures = f"{self.shoal:5.1f} {self.ideal:5.1f} {self.random:6.1f} {100 * self.alone:7.2f}"
        return f"{self.case.name:48} {figures} {self.seconds:7.2f} {self.polls:5.1f}"


HEAD = f"{'':48} {'shoal':>5} {'ideal':>5} {'random':>6} {'alone %':>7} {'seconds':>7} {'polls':>5}"
GRIDS = [Case(count, target) for target in (32, 16, 4) for count in (128, 256, 512, 1024)]
UNEVEN = [Case(count, 32) for count in (97, 150, 333, 900)]
ABSENT = [Case(count, 32, absent=0.01) for count in (64, 256, 512)]
CHANGING = [
    Case(256, 32, churn=0.05),
    Case(256, 32, slow=0.05),
    Case(256, 16, also=32),
    Case(256, 32, modes=MODES),
]
TABLE = [Case(64, 32), *GRIDS, *UNEVEN, *ABSENT, *CHANGING]
QUICK = [Case(64, 32), Case(97, 32), Case(128, 4), Case(64, 32, absent=0.01)]
DRAWN = (64, 128, 256, 512, 1024)


def tell(case: Case, seed: int) -> list[RoundResult]:
    """The rounds of one swarm until it is mixed."""
    targets = (case.target,) if case.also is None else (case.target, case.also)
    swarm = MixingSwarm(seed, case.count, targets, modes=case.modes)
    rounds: list[RoundResult] = []
    while len(rounds) < case.most and (not rounds or rounds[-1].variance >= MIXED):
        if rounds and case.churn:
            swarm.replace(case.churn)
        rounds.append(swarm.round(case.absent, slow_peers_away(case.count, case.slow, len(rounds))))
    return rounds


def summarize(case: Case, swarms: Sequence[Sequence[RoundResult]]) -> Row:
    """The row for what :func:`tell` said of each seed of a case."""
    later = [one for rounds in swarms for one in rounds[1:]]
    searches = sum(one.alone + sum(one.sizes) for rounds in swarms for one in rounds)
    shares = (case.count, case.target, case.absent, case.most, case.slow)

    def needed(dealer: Callable[..., list[float]]) -> float:
        return _mean([rounds_needed(dealer(seed, *shares), MIXED) for seed in range(10)])

    return Row(
        case,
        _mean([rounds_needed([one.variance for one in rounds], MIXED) for rounds in swarms]),
        needed(ideal_rounds),
        needed(random_rounds),
        sum(one.alone for rounds in swarms for one in rounds) / searches,
        statistics.median(one.seconds for one in later),
        _mean([one.polls for one in later]),
    )


def _mean(numbers: Sequence[float]) -> float:
    return math.inf if math.inf in numbers else statistics.fmean(numbers)


def draw(path: Path) -> None:
    """The variance over the rounds, of one swarm of each size."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 3, figsize=(11, 3.6), sharey=True)
    for axis, target in zip(axes, (32, 16, 4), strict=True):
        for index, count in enumerate(DRAWN):
            colour = pyplot.get_cmap("viridis")(index / len(DRAWN))
            most = 8 if target > 4 else 16
            swarm = [one.variance for one in tell(Case(count, target), 0)]
            for variances, style, label in (
                (swarm, "-o", f"{count:,} peers"),
                (ideal_rounds(0, count, target, 0.0, most), "--", None),
                (random_rounds(0, count, target, 0.0, most), ":", None),
            ):
                shown = [1.0, *(max(one, 1e-12) for one in variances)]
                axis.semilogy(range(len(shown)), shown, style, color=colour, label=label, markersize=3)
        axis.set_title(f"groups of {target}")
        axis.set_xlabel("rounds")
        axis.axhline(MIXED, color="#aaaaaa", linewidth=0.8)
    axes[0].set_ylabel("variance over the peers")
    axes[0].set_ylim(1e-12, 2)
    axes[2].legend(fontsize=7, title="line: Shoal, dashes: ideal,\ndots: random", title_fontsize=7)
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description="How fast large swarms mix, in simulated time.")
    parser.add_argument("--quick", action="store_true", help="a few small swarms")
    parser.add_argument("--only", default="", help="rows whose names contain this text")
    parser.add_argument(
        "--processes", type=int, default=os.cpu_count(), help="swarms at a time; default: one for each core"
    )
    parser.add_argument(
        "--picture", type=Path, help="draw the variance over the rounds into this file instead"
    )
    given = parser.parse_args()
    if given.picture is not None:
        draw(given.picture)
        return
    cases = [case for case in (QUICK if given.quick else TABLE) if given.only in case.name]
    print(HEAD)
    with ProcessPoolExecutor(given.processes) as pool:
        told = [[pool.submit(tell, case, seed) for seed in range(case.seeds)] for case in cases]
        for case, swarms in zip(cases, told, strict=True):
            print(summarize(case, [swarm.result() for swarm in swarms]), flush=True)


if __name__ == "__main__":
    main()
