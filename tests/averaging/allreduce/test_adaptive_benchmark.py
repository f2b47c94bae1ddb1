"""benchmarks/adaptive_timeouts.py in short: what deadlines that adapt gain, and that its formula and oracle are sound.

The fixed timeouts are those of the formula here, on the whole grid. It takes no time, and agrees with whole rounds.
"""

from __future__ import annotations

import importlib.util
import random
import sys
from dataclasses import replace
from pathlib import Path
from statistics import fmean
from types import ModuleType

import pytest

from shoal.testing.paced_cores import Conditions, PacedRound, draw_rounds


def load_benchmark() -> ModuleType:
    path = Path(__file__).parents[3] / "benchmarks" / "adaptive_timeouts.py"
    spec = importlib.util.spec_from_file_location("adaptive_timeouts_benchmark", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


benchmark = load_benchmark()


def gain(rounds: list[PacedRound]) -> float:
    """How much longer rounds take with the best fixed timeout that loses no more."""
    adaptive = benchmark.run_adaptive(rounds)
    timeout = benchmark.GRID[benchmark.guess_step(rounds, sum(adaptive.lost))]
    return fmean(benchmark.estimate_fixed(paced, timeout)[0] for paced in rounds) / adaptive.mean


@pytest.mark.parametrize("seed", [4, 6])
def test_large_tensors_are_averaged_faster(seed: int):
    """A fixed timeout has to let users begin in their time. So it waits for each part of a slow link."""
    small = Conditions(8, owners=1, offset=15.0, part=0.6, parts=3)
    assert gain(draw_rounds(random.Random(seed), [small, replace(small, parts=40)])) > 1.3


@pytest.mark.parametrize("seed", [1, 3])
def test_the_best_fixed_timeout_is_hardly_better_where_nothing_changes(seed: int):
    """Users' times are all that matters here, so that one timeout fits."""
    assert gain(draw_rounds(random.Random(seed), [Conditions(20, parts=3)])) > 0.9


@pytest.mark.parametrize("timeout", [60.0, 100.0])
def test_the_formula_agrees_with_whole_rounds(timeout: float):
    rounds = draw_rounds(random.Random(3), [Conditions(8, parts=6)])
    found = benchmark.run_fixed(rounds, timeout)
    for paced, seconds, lost in zip(rounds, found.seconds, found.lost, strict=True):
        estimated, expected = benchmark.estimate_fixed(paced, timeout)
        assert (estimated, expected) == (pytest.approx(seconds, rel=0.05), lost)


def test_nothing_is_faster_than_the_oracle():
    rounds = draw_rounds(random.Random(2), [Conditions(12, parts=4)])
    adaptive = benchmark.run_adaptive(rounds)
    for outcomes in (adaptive, benchmark.run_fixed(rounds, 60.0)):
        oracle = benchmark.run_oracle(rounds, sum(outcomes.lost))
        assert sum(oracle.lost) <= sum(outcomes.lost)
        assert oracle.mean < outcomes.mean


@pytest.mark.sweep
def test_where_speeds_and_sizes_change_rounds_are_shorter():
    """Though each phase has 8 rounds only, of which the first ones have to be learnt from."""
    phases = benchmark.changing(Conditions(8, parts=40))
    assert gain(draw_rounds(random.Random(1), phases)) > 1.05
