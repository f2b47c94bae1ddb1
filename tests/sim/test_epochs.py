"""Peers end their epochs together, whatever their speeds and clocks, while peers come, go and fail."""

from __future__ import annotations

import itertools
import random

import pytest

from shoal.testing.clock import run
from shoal.testing.epochs import EpochSwarm, PeerPlan

LENGTH = 30.0
"""Seconds of an epoch, as far as speeds tell."""


def make_plans(seed: int) -> list[PeerPlan]:
    """2 to 64 peers; speeds differ ten times; a third are clients, a few come late, leave or fail."""
    rng = random.Random(f"plans {seed}")
    count = [2, 3, 5, 8, 16, 32, 64][seed % 7]
    plans = []
    for number in range(count):
        is_steady = number < 2
        fate = "stays" if is_steady else rng.choice(["stays", "stays", "joins", "leaves", "fails"])
        plans.append(
            PeerPlan(
                batch_size=8,
                step_time=0.3 * 10 ** rng.uniform(0, 1),
                client_mode=not is_steady and rng.random() < 0.3,
                clock_error=rng.choice([-60.0, 0.0, 60.0]),
                joins_at=rng.uniform(30, 120) if fate == "joins" else rng.uniform(0, 3),
                leaves_at=rng.uniform(60, 150) if fate == "leaves" else 1e9,
                fails_at=rng.uniform(60, 150) if fate == "fails" else 1e9,
            )
        )
    return plans


def check(seed: int, seconds: float) -> None:
    plans = make_plans(seed)
    target = round(LENGTH * sum(plan.batch_size / plan.step_time for plan in plans))
    swarm = EpochSwarm(seed, target)
    run(swarm.run(plans, seconds))
    epochs = swarm.complete_epochs()
    assert len(epochs) >= 2
    for epoch in epochs:
        assert target <= swarm.samples[epoch] <= 1.2 * target, (epoch, target, swarm.samples)
    assert swarm.longest_behind_epochs <= 1
    assert swarm.longest_behind <= LENGTH / 2


@pytest.mark.parametrize("seed", range(5))
def test_peers_end_an_epoch_together(seed: int):
    check(seed, 240.0)


@pytest.mark.sweep
@pytest.mark.parametrize("seed", range(5, 147))
def test_peers_end_an_epoch_together_in_many_swarms(seed: int):
    check(seed, 240.0)


def test_epochs_are_shorter_while_the_fastest_of_five_peers_is_there():
    """The setting of hivemind's test of its tracker, ``test_progress_tracker``: clocks differ, a client is fast."""
    plans = [
        PeerPlan(4, step_time, clock_error=error)
        for step_time, error in ((0.6, 0), (1.0, 5), (0.8, -9), (1.3, 0))
    ]
    arrives, goes, end = 100.0, 200.0, 300.0
    plans.append(PeerPlan(8, 0.5, client_mode=True, joins_at=arrives, leaves_at=goes))
    swarm = EpochSwarm(seed=0, target=200, round_time=(0.2, 0.4))
    run(swarm.run(plans, end))
    starts = [min(times) for _, times in sorted(swarm.begun.items())]
    lengths = [(start, after, after - start) for start, after in itertools.pairwise(starts)]
    mean = sum(length for _, _, length in lengths) / len(lengths)
    with_it = [length / mean for start, after, length in lengths if arrives <= start and after <= goes]
    without = [length / mean for start, after, length in lengths if after <= arrives or start >= goes]
    assert len(with_it) >= 5
    assert len(without) >= 10
    assert all(0.5 <= share <= 0.95 for share in with_it), with_it
    assert all(1.05 <= share <= 2 for share in without), without
