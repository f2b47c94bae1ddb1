"""Many more peers than fit into one group: groups of cores mix them, whoever comes and goes."""

from __future__ import annotations

import pytest

from shoal.averaging.group import PeerMode
from shoal.testing.mixing import MixingSwarm

MIXED = 1e-9


@pytest.mark.parametrize(
    ("count", "target", "most"),
    [
        (64, 32, 2),
        (64, 4, 3),
        (97, 32, 5),
        pytest.param(128, 4, 5, marks=pytest.mark.sweep),
        pytest.param(256, 16, 3, marks=pytest.mark.sweep),
        pytest.param(512, 32, 3, marks=pytest.mark.sweep),
        pytest.param(900, 32, 4, marks=pytest.mark.sweep),
        pytest.param(1024, 32, 3, marks=pytest.mark.sweep),
    ],
)
def test_a_swarm_mixes_about_as_fast_as_an_ideal_grid(count, target, most):
    swarm = MixingSwarm(0, count, target)
    rounds = swarm.rounds_until(MIXED, most)
    assert rounds[-1].variance < MIXED, [one.variance for one in rounds]
    assert sum(one.alone for one in rounds) <= 0.01 * len(rounds) * count


def test_groups_begin_without_waiting_for_their_start_time():
    swarm = MixingSwarm(1, 100, 32)
    swarm.round()
    for _ in range(2):
        assert swarm.round().slowest < 3.0, "min_matchmaking_time is 5 s"


def test_reads_of_the_dht_are_few():
    swarm = MixingSwarm(2, 64, 8)
    swarm.round()
    assert swarm.round().polls < 4


@pytest.mark.parametrize("seed", [0, *(pytest.param(seed, marks=pytest.mark.sweep) for seed in (1, 2, 3))])
def test_absent_peers_find_their_way_back(seed):
    swarm = MixingSwarm(seed, 64, 16)
    rounds = [swarm.round(0.02) for _ in range(6)]
    assert rounds[-1].variance < 1e-5
    assert sum(one.alone for one in rounds) <= 0.01 * len(rounds) * 64


@pytest.mark.parametrize("seed", [0, *(pytest.param(seed, marks=pytest.mark.sweep) for seed in (1, 2, 3))])
def test_a_swarm_mixes_while_peers_join_and_leave(seed):
    swarm = MixingSwarm(seed, 64, 8)
    alone = 0
    for _ in range(6):
        swarm.replace(0.05)
        alone += swarm.round().alone
    assert swarm.variance() < 1e-3
    assert alone <= 0.01 * 6 * 64


@pytest.mark.parametrize(
    ("modes", "targets"),
    [
        ((PeerMode.FULL, PeerMode.CLIENT, PeerMode.CLIENT, PeerMode.AUXILIARY), (8,)),
        ((PeerMode.FULL,), (8, 16)),
    ],
)
def test_clients_auxiliaries_and_several_target_sizes_mix(modes, targets):
    swarm = MixingSwarm(3, 48, targets, modes=modes)
    rounds = [swarm.round() for _ in range(5)]
    assert rounds[-1].variance < 1e-2
    assert sum(one.alone for one in rounds) <= 5


@pytest.mark.parametrize(
    ("count", "left", "target", "most"),
    [
        (8, 4, 4, 12),
        pytest.param(12, 4, 4, 16, marks=pytest.mark.sweep),
        pytest.param(64, 32, 32, 16, marks=pytest.mark.sweep),
        pytest.param(64, 16, 16, 20, marks=pytest.mark.sweep),
    ],
)
def test_peers_that_fit_into_one_group_unite_when_others_are_gone(count, left, target, most):
    swarm = MixingSwarm(0, count, target)
    for _ in range(2):
        swarm.round()
    for number in sorted(swarm.values)[: count - left]:
        swarm.leave(number)
    sizes = [swarm.round().sizes for _ in range(most)]
    assert sizes[-3:] == [(left,)] * 3, sizes


@pytest.mark.sweep
def test_a_swarm_that_grows_and_shrinks_changes_its_layout():
    swarm = MixingSwarm(4, 48, 8)
    for _ in range(3):
        swarm.round()
    for _ in range(48):
        swarm.join(swarm.values[0].copy())
    for _ in range(16):
        swarm.round()
    groups = {keys.grid.layout.groups for keys in swarm.keys.values()}
    assert groups <= {11, 12, 13, 14}
    for number in sorted(swarm.values)[8:]:
        swarm.leave(number)
    for _ in range(20):
        last = swarm.round()
    assert last.sizes == (8,)
