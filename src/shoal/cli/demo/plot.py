"""The demo's plot: held-out accuracy over time of the peers, of each part trained alone, and of central training."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from shoal.cli.demo.history import Curve, History

if TYPE_CHECKING:
    from matplotlib.axes import Axes

SIZE_INCHES = (10.0, 5.6)
DOTS_PER_INCH = 120
EVENT_ROWS = 3


def write_plot(history: History, path: Path) -> None:
    """Write the plot as PNG.

    :raises OSError: the file can't be written
    """
    from matplotlib.backends.backend_agg import (
        FigureCanvasAgg,
    )  # only the demo has it, and it is slow to import
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

    figure = Figure(figsize=SIZE_INCHES, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    began = history.training_began
    # One entry of the legend for each kind of curve. After each average all peers are the same.
    for curve in history.alone.values():
        _draw(axes, curve, began, color="tab:grey", linewidth=1.0, linestyle="--")
    for curve in history.swarm.values():
        _draw(axes, curve, began, color="tab:blue", linewidth=1.5, alpha=0.8)
    _draw(axes, history.central, began, color="black", linewidth=1.2)
    kinds = [
        Line2D([], [], color="black", linewidth=1.2, label="central training, on all images"),
        Line2D([], [], color="tab:blue", linewidth=1.5, label=f"the swarm's peers ({len(history.swarm)})"),
        Line2D(
            [], [], color="tab:grey", linestyle="--", label=f"each part alone ({', '.join(_digits(history))})"
        ),
    ]
    for number, (second, text) in enumerate(history.events):
        axes.axvline(second - began, color="tab:red", linewidth=0.8, linestyle=":")
        # Above the curves, each a line higher than the one before: events may follow each other closely.
        place = (second - began, 1.01 + 0.035 * (number % EVENT_ROWS))
        side = "left" if second < history.seconds() / 2 + began / 2 else "right"
        axes.annotate(text, place, xycoords=axes.get_xaxis_transform(), ha=side, fontsize=8, color="tab:red")
    figure.suptitle("Handwritten digits: peers that have images of different digits", fontsize=11)
    axes.set(xlabel="seconds of training", ylabel="accuracy on held-out images, %", ylim=(0, 101))
    axes.grid(alpha=0.25)
    axes.legend(handles=kinds, loc="lower right", bbox_to_anchor=(1.0, 0.36), fontsize=8)
    figure.savefig(path, format="png", dpi=DOTS_PER_INCH)


def _digits(history: History) -> list[str]:
    """What each part alone has: "048", "159" and so on."""
    return [name.rpartition("digits")[2].replace(" ", "") for name in history.alone]


def _draw(axes: Axes, curve: Curve, began: float, **style: Any) -> None:
    seconds = [second - began for second, _ in curve]
    percent = [accuracy * 100 for _, accuracy in curve]
    axes.plot(seconds, percent, **style)
