"""Peers end their epochs together, whatever their speeds and clocks, while peers come, go and fail."""

from __future__ import annotations

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
