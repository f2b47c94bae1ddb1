"""From samples to medians, and which number of raw connections stands for raw TCP."""

from __future__ import annotations

from benchmarks.medians import Spread, best_raw, medians, spread

SAMPLES = {
    "shoal": {"mbit_per_s": [4.0, 5.0, 90.0]},
    "raw 1": {"mbit_per_s": [5.0, 5.0, 200.0]},
    "raw 16": {"mbit_per_s": [60.0, 70.0]},
    "hivemind": {"mbit_per_s": []},
}


def test_one_lucky_round_does_not_change_the_median():
    assert spread([4.0, 90.0, 5.0]) == Spread(median=5.0, least=4.0, most=90.0, count=3)


def test_the_best_raw_side_is_that_of_the_best_median():
    found = medians(SAMPLES, "mbit_per_s")
    assert best_raw(found, "mbit_per_s") == "raw 16"
    assert found["raw"] == found["raw 16"] == {"mbit_per_s": 65.0}


def test_a_side_without_samples_has_no_medians():
    assert medians(SAMPLES, "mbit_per_s")["hivemind"] == {}


def test_without_raw_sides_nothing_stands_for_them():
    assert "raw" not in medians({"shoal": {"mb_per_s": [1.0]}}, "mb_per_s")
