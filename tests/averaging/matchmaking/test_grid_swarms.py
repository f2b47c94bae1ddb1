"""Large swarms of cores mix in about as many rounds as the ideal dealer, which sees all of them."""

from __future__ import annotations

import math

import pytest
from tests.swept import rest_swept

from shoal.averaging.grid import Grid, Layout
from shoal.averaging.group import PeerMode
from shoal.averaging.matchmaking import spreading
from shoal.averaging.matchmaking.seats import Seat
from shoal.testing.ideal_mixing import ideal_rounds, random_rounds, rounds_needed
from shoal.testing.mixing import MixingSwarm

MIXED = 1e-9
MOST = 16


def shoal_rounds(swarm: MixingSwarm, absent: float = 0.0) -> float:
    rounds = swarm.rounds_until(MIXED, MOST, absent)
    searches = sum(sum(one.sizes) + one.alone for one in rounds)
    assert sum(one.alone for one in rounds) <= 0.01 * searches
    return rounds_needed([one.variance for one in rounds], MIXED)


@pytest.mark.parametrize(
    ("count", "target", "more"),
    [
        (128, 32, 0),
        pytest.param(97, 32, 1, marks=pytest.mark.sweep),
        pytest.param(128, 4, 0, marks=pytest.mark.sweep),
        pytest.param(256, 32, 0, marks=pytest.mark.sweep),
        pytest.param(333, 32, 2, marks=pytest.mark.sweep),
    ],
)
def test_a_large_swarm_mixes_like_the_ideal(count, target, more):
    ideal = rounds_needed(ideal_rounds(0, count, target, 0.0, MOST), MIXED)
    assert shoal_rounds(MixingSwarm(0, count, target)) <= ideal + more


def test_a_group_stands_soon_and_costs_few_looks():
    swarm = MixingSwarm(0, 128, 32, jitter=0.2)
    rounds = [swarm.round() for _ in range(3)]
    for one in rounds[1:]:
        assert one.sizes == (32,) * 4
        assert one.seconds < 2.0
        assert one.polls < 4


@pytest.mark.parametrize("seed", rest_swept(range(30), kept=4))
def test_peers_that_are_too_many_for_one_group_make_even_ones_before_their_start_time(seed):
    swarm = MixingSwarm(seed, 64, 16)
    swarm.round()
    for number in swarm.rng.sample(sorted(swarm.values), 4):
        twin = swarm.join(swarm.values[number].copy())
        swarm.keys[twin]._seat = swarm.keys[number]._seat
    result = swarm.round()
    assert sum(result.sizes) == 68
    assert min(result.sizes) >= 8
    assert result.slowest < 5.0


@pytest.mark.sweep
@pytest.mark.parametrize("modes", [(PeerMode.FULL,), (PeerMode.FULL, PeerMode.FULL, PeerMode.CLIENT)])
def test_a_swarm_that_changes_all_the_time_is_no_worse_than_random_groups(modes):
    swarm = MixingSwarm(0, 128, 32, modes=modes)
    variances = []
    while len(variances) < MOST and (not variances or variances[-1] >= MIXED):
        swarm.replace(0.05)
        variances.append(swarm.round().variance)
    assert rounds_needed(variances, MIXED) <= 1 + rounds_needed(random_rounds(0, 128, 32, 0.0, MOST), MIXED)


@pytest.mark.parametrize("further", [0, pytest.param(3, marks=pytest.mark.sweep)])
def test_a_swarm_that_came_apart_into_two_grids_unites(further):
    """As after a break of the network: the parts have other keys, and do not meet at them."""
    swarm = MixingSwarm(0, 64, 16)
    swarm.round()
    layout = Layout(5, 13)
    for place, number in enumerate(range(0, 64, 2)):
        grid = swarm.keys[number].grid
        swarm.keys[number]._seat = Seat(Grid(layout, grid.round + further, grid.swarm), place % layout.groups)
    rounds = 0
    while len({keys.grid.layout for keys in swarm.keys.values()}) > 1 or swarm.variance() >= MIXED:
        swarm.round()
        rounds += 1
        assert rounds <= 30


def test_a_grid_that_has_lost_its_peers_is_given_up():
    swarm = MixingSwarm(0, 120, 16)
    swarm.round()
    assert all(keys.has_seat for keys in swarm.keys.values())
    for number in sorted(swarm.values)[16:]:
        swarm.leave(number)
    rounds = [swarm.round() for _ in range(3)]
    assert not any(keys.has_seat for keys in swarm.keys.values())
    assert rounds[-1].sizes == (16,)
    assert not any(one.alone for one in rounds)


@pytest.mark.sweep
def test_clients_and_auxiliaries_are_dealt_to_all_groups_of_a_grid():
    """Each group has peers that can lead, and as many that contribute as the others."""
    swarm = MixingSwarm(0, 128, 16, modes=(PeerMode.FULL, PeerMode.FULL, PeerMode.CLIENT, PeerMode.AUXILIARY))
    rounds = [swarm.round() for _ in range(3)]
    assert all(one.sizes == (16,) * 8 for one in rounds)
    assert rounds[-1].variance < 1e-4


@pytest.mark.timeout(600)  # 80 s of CPU with 256 peers
@pytest.mark.sweep
@pytest.mark.parametrize(("count", "seeds"), [(64, 10), (256, 4)])
def test_peers_that_miss_a_round_take_the_places_that_they_left(count, seeds):
    """One in a hundred is absent in each round, and the swarm needs at most one round more than the ideal dealer."""
    ideal = [rounds_needed(ideal_rounds(seed, count, 32, 0.01, MOST), MIXED) for seed in range(seeds)]
    found = [shoal_rounds(MixingSwarm(seed, count, 32), 0.01) for seed in range(seeds)]
    assert sum(found) <= sum(ideal) + seeds, (found, ideal)


@pytest.mark.sweep
@pytest.mark.parametrize(
    "periods",
    [[3.0] * 61 + [30.0] * 3, [3 + number % 7 for number in range(64)]],
    ids=["a few slow", "all differ"],
)
def test_peers_that_run_free_mix_in_a_grid_as_well_as_without_one(periods, monkeypatch):
    def run() -> tuple[float, float]:
        swarm = MixingSwarm(0, 64, 16)
        sizes = swarm.run_free(periods, 60.0)
        return math.log(swarm.variance(), 16), len(sizes) / 64

    in_grid, steps = run()
    monkeypatch.setattr(spreading, "SPREAD_ABOVE", 1000)
    without, steps_without = run()
    assert in_grid <= without + 1  # one round
    assert steps >= steps_without
