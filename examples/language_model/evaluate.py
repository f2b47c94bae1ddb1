"""Bits per byte on the held-out text for each copy of the model that a run has kept: RUN/curve.csv, and a
line for each run.

    python evaluate.py runs/shoal runs/alone runs/central --target 2.0

``tokens`` are the bytes that all peers together had learnt from when the copy was made; ``--target`` tells
when each run reached that many bits per byte (by linear interpolation between copies).
"""

from __future__ import annotations

import argparse
import csv
import json
from collections.abc import Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, fields
from functools import cache, partial
from itertools import pairwise
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch

from data import load_corpus
from model import bits_per_byte
from record import SUMMARY, read_log
from training import Settings, make_model

CURVE = "curve.csv"


@dataclass(frozen=True)
class Point:
    """A model on its way."""

    peer: str
    step: int
    """Local steps of its peer."""
    tokens: int
    """Bytes that all peers have learnt from."""
    seconds: float
    """Since the first peer has taken its first step."""
    bits_per_byte: float


def evaluate_run(folder: Path, settings: Settings, workers: int) -> list[Point]:
    """Evaluate all copies; in the order of time."""
    logs = {peer.name: list(read_log(peer)) for peer in sorted(folder.glob("peer-*"))}
    copies = [(name, event) for name, events in logs.items() for event in events if event["event"] == "saved"]
    files = [folder / name / event["file"] for name, event in copies]
    evaluate = partial(_evaluate, settings)
    if workers == 1:
        results = [evaluate(file) for file in files]
    else:
        with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
            results = list(pool.map(evaluate, files, chunksize=len(files) // workers + 1))
    began = next(event["seconds"] for event in next(iter(logs.values())) if event["event"] == "began")
    points = [
        Point(
            name,
            event["step"],
            tokens_at(logs.values(), event["seconds"]),
            event["seconds"] - began,
            round(result, 4),
        )
        for (name, event), result in zip(copies, results, strict=True)
    ]
    return sorted(points, key=lambda point: point.seconds)


def tokens_at(logs: Iterable[Iterable[dict[str, Any]]], seconds: float) -> int:
    """What all peers had learnt from by then, by the last line of each."""
    return sum(
        max((event.get("tokens", 0) for event in events if event["seconds"] <= seconds), default=0)
        for events in logs
    )


def _evaluate(settings: Settings, file: Path) -> float:
    torch.set_num_threads(1)
    model = make_model(settings)
    with torch.no_grad():
        for parameter, saved in zip(model.parameters(), torch.load(file), strict=True):
            parameter.copy_(saved)
    return bits_per_byte(model, _held_out(settings), settings.windows)


@cache
def _held_out(settings: Settings) -> torch.Tensor:
    """Read once in each process."""
    return load_corpus(settings.peers, Path(settings.text) if settings.text else None).held_out


def curve_of_first(points: Sequence[Point]) -> list[Point]:
    """Those of the first peer, which lives from the beginning to the end."""
    first = min(point.peer for point in points)
    return [point for point in points if point.peer == first]


def reach(points: Sequence[Point], target: float, axis: str) -> float | None:
    """Where the first peer's curve first comes down to ``target``, on an axis (``step``, ``tokens``,
    ``seconds``); None: nowhere.
    """
    for before, after in pairwise(curve_of_first(points)):
        if after.bits_per_byte <= target:
            span = before.bits_per_byte - after.bits_per_byte
            part = (before.bits_per_byte - target) / span if span > 0 else 0.0
            start, end = float(getattr(before, axis)), float(getattr(after, axis))
            return start + max(0.0, part) * (end - start)
    return None


def write_curve(points: Sequence[Point], file: Path) -> None:
    with file.open("w", newline="") as output:
        writer = csv.DictWriter(output, [field.name for field in fields(Point)])
        writer.writeheader()
        writer.writerows(asdict(point) for point in points)


def read_curve(file: Path) -> list[Point]:
    with file.open(newline="") as text:
        return [
            Point(
                row["peer"],
                int(row["step"]),
                int(row["tokens"]),
                float(row["seconds"]),
                float(row["bits_per_byte"]),
            )
            for row in csv.DictReader(text)
        ]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("runs", nargs="+", type=Path)
    parser.add_argument("--target", type=float, help="bits per byte")
    parser.add_argument("--workers", type=int, default=2, help="processes")
    options = parser.parse_args()
    for run in options.runs:
        if not (run / SUMMARY).is_file():
            parser.error(f"{run}: no run is there, since it has no {SUMMARY}")
        settings = Settings(**json.loads((run / SUMMARY).read_text())["settings"])
        points = evaluate_run(run, settings, options.workers)
        write_curve(points, run / CURVE)
        last = points[-1]
        finals = {point.peer: point.bits_per_byte for point in points}
        line = f"{run}: {last.tokens / 1e6:.1f} MB in {last.seconds:.0f} s; at the end {finals} bits per byte"
        if options.target:
            seconds = reach(points, options.target, "seconds")
            line += f"; {options.target:g} " + (f"after {seconds:.1f} s" if seconds else "never reached")
        print(line, flush=True)


if __name__ == "__main__":
    main()
