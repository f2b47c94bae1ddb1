"""A report as pictures, if matplotlib is there: bars beside each other, rate over loss, cost over peers."""

from __future__ import annotations

import importlib.util
import math
import textwrap
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from benchmarks.figures import FIGURES
from benchmarks.results import Report, RowResult
from benchmarks.rows import network_of
from benchmarks.work import BEST_RAW, Averaging

COLOURS = {"shoal": "#0b6e8a", "hivemind": "#e0a030", "gloo": "#8a8a8a", BEST_RAW: "#555555"}
COLUMNS = 3
DPI = 110
TITLE_COLUMNS = 52


def why_not() -> str | None:
    """Why there can be no pictures, or None if there can."""
    if importlib.util.find_spec("matplotlib") is None:
        return "matplotlib is not installed: pip install -e '.[bench]'"
    return None


def draw(report: Report, folder: Path) -> list[str]:
    """Write the pictures for which there are figures; their names."""
    import matplotlib

    matplotlib.use("Agg")
    rows = [row for row in report.rows if row.samples]
    drawn = {
        "bars.png": draw_bars(rows),
        "loss.png": draw_lines(list(over_loss(rows)), "loss, %", "Mbit/s"),
        "cost.png": draw_lines(list(over_peers(rows)), "peers", "CPU s per GB and peer"),
    }
    for name, figure in drawn.items():
        if figure is not None:
            figure.savefig(folder / name, dpi=DPI)
    return [name for name, figure in drawn.items() if figure is not None]


Point = tuple[float, dict[str, float]]
"""A place on the x-axis, and each side's figure there."""


def sides_of(row: RowResult, figure: str) -> dict[str, float]:
    """The median of each side that is drawn: raw TCP at its best stands for all numbers of connections."""
    return {
        side: figures[figure]
        for side, figures in row.medians.items()
        if side in COLOURS and figure in figures
    }


def over_loss(rows: Sequence[RowResult]) -> Iterator[Point]:
    """The rates of rows that differ in loss only."""
    for row in rows:
        network = network_of(row.row.work)
        averages = isinstance(row.row.work, Averaging) and row.row.work.peers == 2
        if network is None or not averages or network.first_up is not None:
            continue
        if (network.control, network.rtt_ms, network.rate) == ("cubic", 100, 200):
            yield 100 * network.loss, sides_of(row, "mbit_per_s")


def over_peers(rows: Sequence[RowResult]) -> Iterator[Point]:
    """What averaging on loopback costs, where tensors are copied."""
    for row in rows:
        work = row.row.work
        if not isinstance(work, Averaging) or work.handed_over:
            continue
        if work.network is None and work.megabytes >= 1:
            yield work.peers, sides_of(row, "cpu_s_per_gb")


def draw_bars(rows: Sequence[RowResult]) -> Any:
    """A small panel for each row, with the row's first figure."""
    from matplotlib.figure import Figure

    if not rows:
        return None
    lines = math.ceil(len(rows) / COLUMNS)
    figure = Figure(figsize=(4.2 * COLUMNS, 2.4 * lines), layout="constrained")
    for number, row in enumerate(rows):
        panel = figure.add_subplot(lines, COLUMNS, number + 1)
        main = row.row.figures[0]
        values = sides_of(row, main)
        bars = panel.bar(list(values), list(values.values()), color=[COLOURS[side] for side in values])
        panel.bar_label(bars, fmt="%.3g", fontsize=8)
        panel.set_title(textwrap.fill(row.row.title, TITLE_COLUMNS), fontsize=8)
        panel.set_ylabel(FIGURES[main].unit, fontsize=8)
        panel.tick_params(labelsize=8)
        panel.margins(y=0.2)
    return figure


def draw_lines(points: Sequence[Point], x_label: str, y_label: str) -> Any:
    """A line for each side over the points, side by side as they are uneven; None if there are fewer than two."""
    from matplotlib.figure import Figure

    if len(points) < 2:
        return None
    figure = Figure(figsize=(6, 3.6), layout="constrained")
    axes = figure.add_subplot()
    places = {x: place for place, x in enumerate(sorted({x for x, _ in points}))}
    for side, colour in COLOURS.items():
        own = sorted((x, figures[side]) for x, figures in points if side in figures)
        if own:
            axes.plot([places[x] for x, _ in own], [y for _, y in own], "o-", color=colour, label=side)
    axes.set_xticks(list(places.values()), [f"{x:g}" for x in places])
    axes.set_xlabel(x_label)
    axes.set_ylabel(y_label)
    axes.set_ylim(bottom=0)
    axes.legend()
    return figure
