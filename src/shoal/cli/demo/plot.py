"""The demo's plot: held-out accuracy over time of the peers, of each part trained alone, and of central training."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from shoal.cli.demo.history import Curve, History
from shoal.errors import InvalidValueError

if TYPE_CHECKING:
    from matplotlib.axes import Axes

SIZE_INCHES = (10.0, 5.6)
DOTS_PER_INCH = 120


def check_output(path: Path) -> None:
    """:raises InvalidValueError: no file can be written there"""
    folder = path.absolute().parent
    if path.is_dir():
        reason = "it is a folder"
    elif not folder.is_dir():
        reason = f"there is no folder {folder}"
    elif not os.access(path if path.exists() else folder, os.W_OK):
        reason = "no permission to write there"
    else:
        return
    raise InvalidValueError(f"--output {path}: {reason}")


def write_plot(history: History, path: Path) -> None:
    """Write the plot as PNG.

    :raises OSError: the file can't be written
    """
    from matplotlib.backends.backend_agg import (
        FigureCanvasAgg,
    )  # only the demo has it, and it is slow to import
    from matplotlib.figure import Figure

    figure = Figure(figsize=SIZE_INCHES, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    began = history.training_began
    _draw(axes, "central training", history.central, began, color="black", linewidth=1.2, zorder=5)
    for number, (name, curve) in enumerate(sorted(history.swarm.items())):
        # After each average all peers are the same: the later ones are thinner, so that all can be seen.
        _draw(axes, f"swarm: {name}", curve, began, linewidth=max(1.0, 6.0 - number), alpha=0.8)
    for name, curve in history.alone.items():
        _draw(axes, name, curve, began, linewidth=1.0, linestyle="--")
    for second, text in history.events:
        axes.axvline(second - began, color="grey", linewidth=0.8, linestyle=":")
        axes.annotate(
            text, (second - began, 50), rotation=90, fontsize=7, color="grey", ha="right", va="center"
        )
    axes.set(
        title="Handwritten digits: a swarm of peers with different classes, each of them alone, and central training",
        xlabel="seconds of training",
        ylabel="accuracy on held-out images, %",
        ylim=(0, 101),
    )
    axes.title.set_fontsize(10)
    axes.grid(alpha=0.25)
    axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), fontsize=8)
    figure.savefig(path, format="png", dpi=DOTS_PER_INCH)


def _draw(axes: Axes, name: str, curve: Curve, began: float, **style: Any) -> None:
    seconds = [second - began for second, _ in curve]
    percent = [accuracy * 100 for _, accuracy in curve]
    axes.plot(seconds, percent, label=name, **style)
