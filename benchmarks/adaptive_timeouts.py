"""How long rounds take with deadlines that adapt, against the best fixed ``sender_timeout``, in simulated time.

    python benchmarks/adaptive_timeouts.py --only "changing, large tensors" --seeds 3

Groups of 8, in phases of ``--rounds`` rounds. How long a member's user takes to begin, and how long a part takes on its
links, are log-normal with sigma 0.5. In one round of twenty a member begins ten times later, and in one of twenty its
links are ten times slower. Where conditions change, links become slower by 5, then tensors larger by 5, then links as
fast as before.

The members are the pure cores of a round, in a network of messages. Each member adapts to what it has seen itself. The
best fixed timeout is the fastest one, on a grid with steps of 5 %, that loses no more contributions than the deadlines
that adapt; ``reducer_timeout`` is twice as long, as by default. A formula, which agrees with whole rounds, tells which
one that is; it is run. Rounds are the same ones for all.

The oracle knows all times beforehand. In each round it waits for nobody that it leaves out, and it leaves out as many
in all as the deadlines that adapt have lost, where that saves most. No timeouts whatever can be faster.
"""

from __future__ import annotations

import argparse
import random
import statistics
from collections.abc import Collection, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace

from shoal.averaging.allreduce.events import RoundTimeouts
from shoal.testing.paced_cores import Conditions, Outcomes, PacedRound, draw_rounds, run_rounds

STEP = 1.05
GRID = tuple(2.0 * STEP**step for step in range(130))
"""Seconds: 2 s to 18 min."""
CEILING = 600.0
"""``sender_timeout`` that is given to the deadlines that adapt."""


def changing(usual: Conditions) -> list[Conditions]:
    slow = replace(usual, part=5 * usual.part)
    return [usual, slow, replace(slow, parts=5 * usual.parts), replace(usual, parts=5 * usual.parts)]


def scenarios(rounds: int) -> dict[str, list[Conditions]]:
    large = Conditions(rounds)
    small = replace(large, parts=10)
    return {
        "changing, large tensors": changing(large),
        "stationary, large tensors": [large],
        "changing, small tensors": changing(small),
        "stationary, small tensors": [small],
        "changing, large tensors, slow in both or in none": changing(replace(large, alike=True)),
    }


# what can be calculated


def estimate(paced: PacedRound, kept: Collection[int], waited: float = 0.0) -> float:
    """Seconds of a round of some members, where others were waited for at its start until ``waited``."""
    began = max(waited, *(paced.offsets[member] for member in kept))
    return began + (paced.parts + 1) * max(paced.part_times[member] for member in kept)


def estimate_fixed(paced: PacedRound, timeout: float) -> tuple[float, int]:
    """Seconds with a fixed timeout, and how many members are lost."""
    members = range(len(paced.offsets))
    end = min(paced.offsets[: paced.owners]) + timeout
    started = [one for one in members if paced.offsets[one] + paced.part_times[one] <= end]
    kept = [one for one in started if paced.part_times[one] <= timeout]
    if not kept:
        return end, len(members)
    waited = end if len(started) < len(members) else 0.0
    stalled = timeout if len(kept) < len(started) else 0.0
    return estimate(paced, kept, waited) + stalled, len(members) - len(kept)


def best_sets(paced: PacedRound) -> dict[int, float]:
    """By the number of members that are left out: seconds of the fastest round without so many."""
    best: dict[int, float] = {}
    members = range(len(paced.offsets))
    for start in paced.offsets:
        for part in paced.part_times:
            kept = [one for one in members if paced.offsets[one] <= start and paced.part_times[one] <= part]
            if len(kept) > 1:
                lost = len(members) - len(kept)
                best[lost] = min(estimate(paced, kept), best.get(lost, float("inf")))
    return best


def run_oracle(rounds: Sequence[PacedRound], lost: int) -> Outcomes:
    """The fastest rounds that lose no more than so many members in all, by a price of each that is lost."""
    options = [best_sets(paced) for paced in rounds]

    def choose(price: float) -> list[int]:
        return [min(sets, key=lambda count: sets[count] + price * count) for sets in options]

    low, high = 0.0, 1e7
    for _ in range(80):
        price = (low + high) / 2
        low, high = (price, high) if sum(choose(price)) > lost else (low, price)
    chosen = choose(high)
    seconds = tuple(sets[count] for sets, count in zip(options, chosen, strict=True))
    return Outcomes(seconds, tuple(chosen))


# what is run


@dataclass(frozen=True)
class Comparison:
    """The outcomes of the same rounds."""

    adaptive: Outcomes
    timeout: float
    """The best fixed one."""
    fixed: Outcomes
    oracle: Outcomes

    @property
    def ratio(self) -> float:
        """How much longer rounds take with the fixed timeout."""
        return self.fixed.mean / self.adaptive.mean


def run_fixed(rounds: Sequence[PacedRound], timeout: float) -> Outcomes:
    return run_rounds(rounds, RoundTimeouts(None, timeout, 2 * timeout))


def run_adaptive(rounds: Sequence[PacedRound]) -> Outcomes:
    return run_rounds(rounds, RoundTimeouts(None, CEILING, 2 * CEILING), adaptive=True)


def guess_step(rounds: Sequence[PacedRound], lost: int) -> int:
    """Where on the grid the best timeout is that loses no more, by the formula."""
    found = []
    for step, timeout in enumerate(GRID):
        estimates = [estimate_fixed(paced, timeout) for paced in rounds]
        if sum(count for _, count in estimates) <= lost:
            found.append((sum(seconds for seconds, _ in estimates), step))
    return min(found)[1]


def compare(rounds: Sequence[PacedRound]) -> Comparison:
    adaptive = run_adaptive(rounds)
    lost = sum(adaptive.lost)
    step = guess_step(rounds, lost)
    while sum((fixed := run_fixed(rounds, GRID[step])).lost) > lost:
        step += 1
    return Comparison(adaptive, GRID[step], fixed, run_oracle(rounds, lost))


def tell(name: str, found: Comparison, phases: Sequence[Conditions]) -> None:
    print(
        f"\n{name}: rounds take {found.ratio:.2f} x as long with the best fixed timeout, {found.timeout:.3g} s"
    )
    print(f"{'':26}{'adaptive':>18}{'fixed':>18}{'oracle':>18}")
    kinds = (found.adaptive, found.fixed, found.oracle)
    first = 0
    for phase in phases:
        part = slice(first, first + phase.rounds)
        cells = [f"{statistics.fmean(one.seconds[part]):8.0f} s{sum(one.lost[part]):4} lost" for one in kinds]
        label = f"{phase.part:g} s a part, {phase.parts} parts"
        print(f"{label:26}" + "".join(f"{cell:>18}" for cell in cells))
        first += phase.rounds
    cells = [f"{one.mean:8.0f} s{sum(one.lost):4} lost" for one in kinds]
    print(f"{'all':26}" + "".join(f"{cell:>18}" for cell in cells), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--rounds", type=int, default=50, help="in each phase (default: %(default)s)")
    parser.add_argument("--seeds", type=int, default=1, help="so many times, with other times (default: 1)")
    parser.add_argument("--only", choices=scenarios(1), metavar="NAME", help=", ".join(scenarios(1)))
    options = parser.parse_args()
    chosen = scenarios(options.rounds)
    with ProcessPoolExecutor(2) as pool:
        for name in [options.only] if options.only else chosen:
            draws = [draw_rounds(random.Random(seed), chosen[name]) for seed in range(1, options.seeds + 1)]
            ratios = []
            for seed, found in enumerate(pool.map(compare, draws), 1):
                tell(f"{name}, seed {seed}", found, chosen[name])
                ratios.append(found.ratio)
            print(
                f"\n{name}: median {statistics.median(ratios):.2f} x, least {min(ratios):.2f} x", flush=True
            )


if __name__ == "__main__":
    main()
