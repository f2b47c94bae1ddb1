"""How figures follow from what the workers said, and the optimum of uneven uplinks."""

from __future__ import annotations

import itertools

import pytest

from benchmarks.figures import Answer, of_round, optimum
from benchmarks.work import Averaging, Download, Network, Swarm, Training


def test_a_round_lasts_from_the_first_trigger_to_the_last_result():
    answers = [Answer(began=10.0, ended=11.5, cpu_s=1.0), Answer(began=10.5, ended=12.0, cpu_s=3.0)]
    figures = of_round(Averaging(peers=2, megabytes=100), answers)
    assert figures["mb_per_s"] == 50
    assert figures["mbit_per_s"] == 400
    assert figures["latency_ms"] == 2000


def test_cpu_is_for_each_gigabyte_of_each_peer():
    answers = [Answer(0.0, 1.0, cpu_s=4.0, pss_mb=900.0)]  # one process has all four
    figures = of_round(Averaging(peers=4, megabytes=500), answers)
    assert figures["cpu_s_per_gb"] == 2.0
    assert figures["cpu_s_per_wire_gb"] == pytest.approx(2.0 / 1.5)
    assert figures["pss_mb"] == 225


def test_facts_of_workers_are_figures_too():
    figures = of_round(Averaging(2, 1), [Answer(0.0, 1.0, extra={"slowdown_percent": 7.0}), Answer(0.0, 1.0)])
    assert figures["slowdown_percent"] == 7.0


def test_downloads_and_swarms_have_figures_of_their_own():
    assert of_round(Download(200), [Answer(0.0, 0.0), Answer(0.0, 4.0)])["mb_per_s"] == 50
    assert of_round(Swarm(16, 4, 5), [Answer(0.0, 9.0, ok=78, of=78)]) == {"seconds": 9.0, "steps_ok": 78.0}


def test_uneven_uplinks_are_judged_by_the_optimum():
    network = Network("cubic", rtt_ms=20, rate=200, first_up=20)
    figures = of_round(Averaging(4, 10, network), [Answer(0.0, 8.0)])
    assert figures["times_optimum"] == pytest.approx(2.0)  # 80 Mbit by 20 Mbit/s, twice


def test_the_optimum_of_even_uplinks_is_that_of_equal_shares():
    assert optimum(100.0, [50.0] * 4) == pytest.approx(100 * (1 + 2 / 4) / 50)
    assert optimum(100.0, [50.0, 25.0]) == pytest.approx(4.0)


def test_the_optimum_is_the_best_of_all_shares():
    uplinks, steps = [60.0, 100.0, 150.0], 60

    def seconds(shares: tuple[float, ...]) -> float:
        return max(100 * (1 + share) / rate for share, rate in zip(shares, uplinks, strict=True))

    grid = (
        (one / steps, two / steps, 1 - (one + two) / steps)
        for one, two in itertools.product(range(steps + 1), repeat=2)
        if one + two <= steps
    )
    assert optimum(100.0, uplinks) == pytest.approx(min(map(seconds, grid)), rel=0.02)


def test_training_is_judged_by_the_median_peer_and_by_all_samples():
    said = [
        {"goal_s": goal, "samples": 256.0, "epochs": 2.0, "averaged": averaged}
        for goal, averaged in ((3.0, 2.0), (5.0, 2.0), (60.0, 1.0))
    ]
    answers = [Answer(0.0, 9.0, cpu_s=4.0, pss_mb=100.0, extra=one) for one in said]
    assert of_round(Training(peers=3, clients=1, epochs=2, step_s=(0.1, 0.2)), answers) == {
        "seconds": 9.0,
        "goal_s": 5.0,
        "times_target": 1.5,
        "rounds_ok_percent": pytest.approx(500 / 6),
        "cpu_s": 4.0,
        "pss_mb": 100.0,
    }
