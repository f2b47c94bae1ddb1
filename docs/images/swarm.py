"""Draws swarm.png, the picture of README.md: `shoal demo` in a terminal, and the accuracies that it showed.

    python docs/images/swarm.py

Everything in the picture is what the demo printed in a terminal of 84 columns. It needs the extra `demo`.
"""

from __future__ import annotations

import fcntl
import os
import pty
import re
import struct
import subprocess
import sys
import termios
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties
from matplotlib.patches import FancyBboxPatch
from PIL import Image

PICTURE = Path(__file__).with_suffix(".png")
COLUMNS, LINES = 84, 16
WIDTH_INCHES = 8.8
MARGIN = 2
"""Columns at each side of the terminal's text."""
EM_PER_COLUMN = 0.602
"""Of DejaVu Sans Mono, which matplotlib brings along."""
FONT_SIZE = WIDTH_INCHES * 72 / (COLUMNS + 2 * MARGIN) / EM_PER_COLUMN

PALETTE_SIZE = 256
"""Colours of the PNG: enough for smooth letters, at a third of the size."""

FRAME, BACKGROUND, FOREGROUND, DIM = "#30363d", "#161b22", "#e6edf3", "#8b949e"
COLOURS = {"31": "#ff7b72", "32": "#7ee787", "33": "#e3b341", "35": "#d2a8ff", "36": "#79c0ff"}

Cell = tuple[str, str]
"""A character and the style that it has, as the terminal was told ("1;31")."""
Screen = list[list[Cell]]


def record() -> bytes:
    """All that `shoal demo` writes to a terminal of this size."""
    mine, its = pty.openpty()
    fcntl.ioctl(its, termios.TIOCSWINSZ, struct.pack("HHHH", LINES, COLUMNS, 0, 0))
    environment = {name: value for name, value in os.environ.items() if name not in ("COLUMNS", "LINES")}
    environment |= {"TERM": "xterm-256color"}
    command = [str(Path(sys.executable).with_name("shoal")), "demo", "--output", os.devnull]
    demo = subprocess.Popen(command, stdin=its, stdout=its, stderr=its, env=environment)  # noqa: S603
    os.close(its)
    written = bytearray()
    while True:
        try:
            data = os.read(mine, 65536)
        except OSError:  # Linux's way to say that nobody has the terminal open any more
            break
        if not data:
            break
        written += data
    if demo.wait():
        raise SystemExit(f"shoal demo failed:\n{written[-2000:].decode(errors='replace')}")
    return bytes(written)


class Terminal:
    """Lines as a terminal shows them; knows the few control sequences that the demo uses."""

    def __init__(self) -> None:
        self._lines: Screen = [[]]
        self._row = 0
        self._style = ""

    def write(self, text: str) -> None:
        for numbers, letter, character in re.findall(r"\x1b\[([?0-9;]*)([A-Za-z])|([^\x1b\r])", text):
            if character == "\n":
                self._row += 1
                if self._row == len(self._lines):
                    self._lines.append([])
            elif character:
                self._lines[self._row].append((character, self._style))
            elif letter == "m":
                self._style = "" if numbers == "0" else numbers
            elif letter == "A":
                self._row -= int(numbers)
            elif letter == "K":
                self._lines[self._row] = []

    def screen(self) -> Screen:
        """The last lines, which fit on it."""
        return [list(line) for line in self._lines[-LINES:]]


def text_of(screen: Screen) -> str:
    return "\n".join("".join(character for character, _ in line) for line in screen)


@dataclass
class Story:
    """What the demo showed.

    :ivar scene: the screen soon after the killed peer's place was taken
    :ivar curves: by peer, accuracies in percent after rounds
    :ivar alone: accuracies of the parts that were trained alone, at the end
    """

    scene: Screen
    curves: dict[str, dict[int, float]]
    alone: list[float]
    central: float


ROW = re.compile(r"^(peer \d)  (\w+) +\d+ +(\d+) +\d .* ([\d.]+) % ", re.MULTILINE)


def read(written: str) -> Story:
    """:raises ValueError: nobody was killed, or nobody took its place"""
    terminal, scene = Terminal(), None
    curves: dict[str, dict[int, float]] = {}
    for frame in written.split("\r\x1b[2K"):  # each drawing of the table begins by wiping the last one
        terminal.write(frame)
        screen = terminal.screen()
        rows = ROW.findall(text_of(screen))
        for peer, _, passed, accuracy in rows:
            curves.setdefault(peer, {})[int(passed)] = float(accuracy)
        states = {state for _, state, _, _ in rows}
        if scene is None and len(rows) == 5 and {"killed", "training", "averaging"} <= states:
            scene = screen
        terminal.write("\x1b[2K")
    if scene is None:
        raise ValueError("the demo did not show a killed peer beside others that go on")
    alone = [float(found) for found in re.findall(r"alone: digits .* ([\d.]+) %", written)]
    central = re.search(r"central, on all images.* ([\d.]+) %", written)
    assert central is not None
    return Story(scene, curves, alone, float(central[1]))


def draw(story: Story) -> Figure:
    """The terminal above, the accuracies below."""
    figure = Figure(figsize=(WIDTH_INCHES, 6.6), dpi=180, facecolor="white")
    FigureCanvasAgg(figure)
    draw_terminal(figure.add_axes((0.0, 0.43, 1.0, 0.57)), story.scene)
    draw_accuracies(figure.add_axes((0.075, 0.085, 0.91, 0.30)), story)
    return figure


def draw_terminal(axes: Axes, screen: Screen) -> None:
    axes.set(xlim=(-MARGIN, COLUMNS + MARGIN), ylim=(LINES + 0.7, -1.9))
    axes.axis("off")
    box = FancyBboxPatch(
        (-1.3, -1.5),
        COLUMNS + 2.6,
        LINES + 1.9,
        boxstyle="round,pad=0,rounding_size=0.6",
        mutation_aspect=0.45,
        facecolor=BACKGROUND,
        edgecolor=FRAME,
    )
    axes.add_patch(box)
    axes.text(COLUMNS / 2, -0.75, "$ shoal demo", color=DIM, ha="center", va="center", family="monospace")
    for row, line in enumerate(screen):
        column = 0
        for style, run in groupby(line, key=lambda cell: cell[1]):
            text = "".join(character for character, _ in run)
            font = FontProperties(
                family="DejaVu Sans Mono",
                size=FONT_SIZE,
                weight="bold" if "1" in style.split(";") else "normal",
                style="italic" if "3" in style.split(";") else "normal",
            )
            colour = next((COLOURS[code] for code in style.split(";") if code in COLOURS), FOREGROUND)
            axes.text(column, row + 0.5, text, color=colour, va="center", fontproperties=font)
            column += len(text)


def draw_accuracies(axes: Axes, story: Story) -> None:
    for curve in story.curves.values():
        axes.plot(*zip(*sorted(curve.items()), strict=True), color="#0969da", linewidth=1.8)
    for accuracy in story.alone:
        axes.axhline(accuracy, color="#8c959f", linewidth=1.2, linestyle="--")
    last = max(passed for curve in story.curves.values() for passed in curve)
    killed, newcomer = ends(story.curves)
    axes.plot(*killed, "X", color="#cf222e", markersize=10)
    axes.plot(*newcomer, "o", color="#1a7f37", markersize=8)
    axes.text(killed[0] - 1, 77, "peer 4 is killed", color="#cf222e", ha="right")
    axes.text(newcomer[0] + 1, 77, "peer 5 takes its place", color="#1a7f37")
    axes.text(last, 77, "the swarm's peers", color="#0969da", ha="right")
    axes.text(last, max(story.alone) + 4, "models trained on one part alone", color="#57606a", ha="right")
    axes.set(xlim=(0, last + 1), ylim=(0, 105), xlabel="rounds of averaging", ylabel="accuracy, %")
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)


def ends(curves: dict[str, dict[int, float]]) -> tuple[tuple[int, float], tuple[int, float]]:
    """Where the killed peer's curve ends, and where its successor's begins."""
    killed, newcomer = curves["peer 4"], curves["peer 5"]
    return (max(killed), killed[max(killed)]), (min(newcomer), newcomer[min(newcomer)])


def main() -> None:
    figure = draw(read(record().decode()))
    figure.savefig(PICTURE)
    Image.open(PICTURE).convert("RGB").quantize(PALETTE_SIZE).save(PICTURE, optimize=True)


if __name__ == "__main__":
    main()
