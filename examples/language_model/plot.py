"""Curves of one or more runs that `evaluate.py` has evaluated, as a picture.

python plot.py curves.png --x step "swarm of 4=runs/shoal" "one peer alone=runs/alone" "central=runs/central"
python plot.py seconds.png --x seconds "Shoal=runs/shoal" "hivemind=runs/hivemind"
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

import matplotlib as mpl

from evaluate import CURVE, Point, curve_of_first, read_curve
from record import SUMMARY

mpl.use("Agg")
from matplotlib import pyplot as plt

AXES = {
    "step": "local steps of each peer",
    "tokens": "bytes that all peers together have learnt from (MB)",
    "seconds": "seconds",
}
FIGURE_SIZE = (7.0, 4.2)
DPI = 130


def position(point: Point, axis: str) -> float:
    return point.tokens / 1e6 if axis == "tokens" else float(getattr(point, axis))


def draw(curves: Sequence[tuple[str, Path]], axis: str, top: float, title: str, output: Path) -> None:
    """One line a run: its first peer's model; marks where others were killed and joined.

    :param top: where the vertical axis ends, in bits per byte; the first steps come from far above
    """
    figure, axes = plt.subplots(figsize=FIGURE_SIZE)
    lowest = top
    for label, run in curves:
        own = curve_of_first(read_curve(run / CURVE))
        (line,) = axes.plot(
            [position(point, axis) for point in own], [point.bits_per_byte for point in own], label=label
        )
        lowest = min(lowest, *(point.bits_per_byte for point in own))
        for event in json.loads((run / SUMMARY).read_text())["events"]:
            at = min(own, key=lambda point: abs(point.step - event["step"]))
            axes.annotate(
                event["event"],
                (position(at, axis), at.bits_per_byte),
                xytext=(0, 26),
                textcoords="offset points",
                ha="center",
                fontsize=8,
                color=line.get_color(),
                arrowprops={"arrowstyle": "->", "color": line.get_color()},
            )
    axes.set(xlabel=AXES[axis], ylabel="bits per byte, held-out modules", title=title)
    axes.set_ylim(lowest - 0.05, top)
    axes.set_xlim(left=0)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=9)
    figure.tight_layout()
    figure.savefig(output, dpi=DPI)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("output", type=Path, help="PNG or SVG")
    parser.add_argument("runs", nargs="+", metavar="LABEL=RUN")
    parser.add_argument("--x", choices=list(AXES), default="step")
    parser.add_argument("--top", type=float, default=3.2, help="bits per byte at the upper edge")
    parser.add_argument("--title", default="")
    options = parser.parse_args()
    curves = []
    for run in options.runs:
        label, equals, folder = run.rpartition("=")
        if not equals:
            raise SystemExit(f"{run}: LABEL=RUN is expected")
        if not (Path(folder) / CURVE).is_file():
            raise SystemExit(f"{run}: no {CURVE} is there; evaluate.py makes it")
        curves.append((label, Path(folder)))
    draw(curves, options.x, options.top, options.title, options.output)


if __name__ == "__main__":
    main()
