"""Which figures are drawn where, and that pictures are written."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.pictures import draw, over_loss, over_peers, sides_of
from benchmarks.results import Report, RowResult
from benchmarks.rows import ROWS, choose


def measured(*names: str) -> list[RowResult]:
    """Rows in which Shoal has the figure 2, and every other side 1 to 3."""
    results = [RowResult(row) for row in choose(ROWS, names)]
    for result in results:
        for number, side in enumerate(result.row.sides):
            value = 2.0 if side.name == "shoal" else 1.0 + number % 3
            result.add(side.name, dict.fromkeys(result.row.figures, value))
    return results


def test_rates_are_drawn_over_loss_for_rows_that_differ_in_nothing_else():
    points = list(over_loss(measured()))
    assert sorted(loss for loss, _ in points) == pytest.approx([0, 0.01, 0.1, 1])
    assert all(sides["shoal"] == 2 and set(sides) == {"shoal", "hivemind", "raw"} for _, sides in points)


def test_costs_are_drawn_over_peers_of_loopback():
    assert [peers for peers, _ in over_peers(measured())] == [2, 4, 8]


def test_raw_is_drawn_once_at_its_best():
    (row,) = measured("lossy-cubic")
    assert sides_of(row, "mbit_per_s") == {"shoal": 2, "hivemind": 2, "raw": 3}


@pytest.mark.sweep
def test_nothing_measured_is_nothing_drawn(tmp_path: Path):
    assert draw(Report({}, [RowResult(ROWS[0], skipped="no root")], quick=True), tmp_path) == []


@pytest.mark.sweep
def test_every_picture_is_written(tmp_path: Path):
    names = draw(Report({}, measured(), quick=False), tmp_path)
    assert names == ["bars.png", "loss.png", "cost.png"]
    assert all((tmp_path / name).read_bytes().startswith(b"\x89PNG") for name in names)
