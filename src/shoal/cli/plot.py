"""``shoal plot``: the record of a training run as a picture."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from shoal.cli.pictures import check_output, require_matplotlib
from shoal.errors import InvalidValueError
from shoal.optim.record import Entry, read_record

if TYPE_CHECKING:
    from matplotlib.axes import Axes

SIZE_INCHES = (9.0, 8.0)
DOTS_PER_INCH = 120
PHASES = {"seconds/epoch": "-", "seconds/gradients": "--", "seconds/update": ":"}
"""Seconds of an epoch, and the line of each."""
FAILED = ("own", "skipped")
"""What became of gradients that were not averaged although others were there."""


def draw_runs(paths: Sequence[Path], output: Path) -> str:
    """Write the picture; returns a line that says what is in it.

    :raises InvalidValueError: a file is no record, or the picture can't be written
    :raises UsageError: matplotlib is missing
    :raises OSError: a file can't be read
    """
    require_matplotlib()
    check_output(output)
    runs = {str(path): _read(path) for path in paths}
    _write(runs, output)
    epochs = sum(map(len, runs.values()))
    return f"{output}: {epochs} epochs of {len(runs)} record{'' if len(runs) == 1 else 's'}"


def failures(entries: Sequence[Entry]) -> list[Entry]:
    """The epochs whose gradients were not averaged although others were there."""
    return [entry for entry in entries if entry.get("gradients") in FAILED and entry.get("failure")]


def has_loss(entries: Sequence[Entry]) -> bool:
    """Whether a loss was told in any epoch."""
    return any(isinstance(entry.get("loss"), int | float) for entry in entries)


def _read(path: Path) -> list[Entry]:
    if path.is_dir():
        raise InvalidValueError(f"RUN must be a file, got the folder {path}")
    return read_record(path)


def _write(runs: Mapping[str, Sequence[Entry]], output: Path) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # slow to import, and not always there
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=SIZE_INCHES, layout="constrained")
    FigureCanvasAgg(figure)
    loss, peers, seconds = figure.subplots(3, 1, sharex=True, height_ratios=[2, 1, 1])
    began = min(entries[0]["time"] for entries in runs.values())
    for number, (name, entries) in enumerate(runs.items()):
        color = f"C{number % 10}"
        minutes = [(entry["time"] - began) / 60 for entry in entries]
        _line(loss, minutes, entries, "loss", color=color, label=name)
        _line(peers, minutes, entries, "peers", color=color, drawstyle="steps-post")
        for phase, style in PHASES.items():
            label = phase.removeprefix("seconds/") if number == 0 else None
            _line(seconds, minutes, entries, phase, color=color, linestyle=style, label=label)
        failed = failures(entries)
        if failed:
            places = [(entry["time"] - began) / 60 for entry in failed]
            peers.plot(
                places, [entry["peers"] for entry in failed], "x", color=color, label=_lost(len(failed))
            )
    loss.set_ylabel("loss")
    peers.set_ylabel("peers")
    seconds.set_ylabel("seconds")
    seconds.set_xlabel("minutes")
    peers.set_ylim(bottom=0)
    peers.yaxis.set_major_locator(MaxNLocator(integer=True))
    seconds.set_ylim(bottom=0)
    if not any(map(has_loss, runs.values())):
        loss.text(
            0.5,
            0.5,
            "no loss was told: step(closure) or step(loss=...)",
            ha="center",
            transform=loss.transAxes,
        )
    for axes in (loss, peers, seconds):
        axes.grid(alpha=0.3)
        if axes.get_legend_handles_labels()[0]:
            axes.legend(fontsize="small")
    figure.savefig(output, dpi=DOTS_PER_INCH, format="png")


def _line(axes: Axes, minutes: Sequence[float], entries: Sequence[Entry], name: str, **style: object) -> None:
    values = [entry.get(name) for entry in entries]
    known = [(x, float(y)) for x, y in zip(minutes, values, strict=True) if isinstance(y, int | float)]
    marker = "." if len(known) < 100 else None
    axes.plot([x for x, _ in known], [y for _, y in known], marker=marker, **style)  # type: ignore[arg-type]


def _lost(count: int) -> str:
    return f"{count} epoch{'' if count == 1 else 's'} without an average"
