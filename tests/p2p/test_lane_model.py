"""Rounds over lanes that lose packets: how long they take, what is sent twice, and what a dead lane costs.

In the sweep: with windows of 4 MB, 64 KiB unsent in each lane and forecasts by what a lane has carried, 32 lanes took
2.9 s, and 64 took 2.6 s.
"""

from __future__ import annotations

import statistics

import pytest
from tests.p2p.lane_model import Sender, World, average


def test_little_is_sent_twice_and_the_link_is_used():
    outcomes = average(1, lanes=16, megabytes=5.0, rounds=2)
    assert max(one.seconds for one in outcomes) < 5e6 / 25e6 + 1.5
    assert statistics.mean(one.again for one in outcomes) < 0.06


def test_a_lane_whose_packets_vanish_delays_a_round_by_little():
    def strike(_: World, peers: list[Sender]) -> None:
        peers[0].lanes[3].is_dead = True

    (undisturbed,) = average(2, lanes=8, megabytes=6.0, rounds=1)
    (outcome,) = average(2, lanes=8, megabytes=6.0, rounds=1, disturb=strike)
    assert outcome.seconds < undisturbed.seconds + 1.5


@pytest.mark.sweep
@pytest.mark.parametrize(("lanes", "seconds", "again"), [(16, 2.6, 0.03), (32, 2.1, 0.04), (64, 2.2, 0.08)])
def test_rounds_of_32_megabytes_at_200_mbit_and_100_ms(lanes: int, seconds: float, again: float):
    outcomes = [one for seed in range(4) for one in average(seed, lanes=lanes)[1:]]
    assert statistics.median(one.seconds for one in outcomes) < seconds
    assert statistics.mean(one.again for one in outcomes) < again
