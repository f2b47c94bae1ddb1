"""What was measured: a row's samples of every side, and what went wrong. Values only."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from benchmarks.medians import Spread, best_raw, medians, spreads
from benchmarks.requirements import Verdict
from benchmarks.rows import Row


@dataclass
class RowResult:
    """One row, as far as it was measured."""

    row: Row
    samples: dict[str, dict[str, list[float]]] = field(default_factory=dict)
    """By side, then by figure."""
    notes: list[str] = field(default_factory=list)
    """What failed, and which sides were left out and why."""
    controls: dict[str, dict[str, int]] = field(default_factory=dict)
    """By side: how many sockets had which congestion control, where that was looked at."""
    links: dict[str, list[dict[str, float]]] = field(default_factory=dict)
    """By side, for each of its turns: the segments that the links carried and lost."""
    skipped: str | None = None
    """Why nothing of the row was measured."""

    def add(self, side: str, figures: Mapping[str, float]) -> None:
        """Keep the figures of one round."""
        kept = self.samples.setdefault(side, {})
        for name, value in figures.items():
            kept.setdefault(name, []).append(value)

    def note(self, text: str) -> None:
        """Keep a remark, once."""
        if text not in self.notes:
            self.notes.append(text)

    @property
    def spreads(self) -> dict[str, dict[str, Spread]]:
        return spreads(self.samples)

    @property
    def medians(self) -> dict[str, dict[str, float]]:
        """The best number of raw connections stands for raw TCP."""
        return medians(self.samples, self.row.figures[0])

    @property
    def best_raw(self) -> str | None:
        return best_raw(self.medians, self.row.figures[0])

    @property
    def verdicts(self) -> list[Verdict]:
        """One for each requirement."""
        found = self.medians
        return [requirement.check(found) for requirement in self.row.required]

    def as_json(self) -> dict[str, Any]:
        required = [
            {"text": requirement.text} | asdict(verdict)
            for requirement, verdict in zip(self.row.required, self.verdicts, strict=True)
        ]
        return {
            "name": self.row.name,
            "title": self.row.title,
            "work": {"kind": type(self.row.work).__name__} | asdict(self.row.work),
            "skipped": self.skipped,
            "medians": self.medians,
            "samples": self.samples,
            "controls": self.controls,
            "links": self.links,
            "required": required,
            "notes": self.notes,
        }


@dataclass(frozen=True)
class Report:
    """One run of the benchmarks."""

    machine: Mapping[str, str]
    """Versions, kernel, CPU and the like, by what they are called."""
    rows: list[RowResult]
    quick: bool
    interrupted: bool = False

    def as_json(self) -> dict[str, Any]:
        return {
            "quick": self.quick,
            "interrupted": self.interrupted,
            "machine": dict(self.machine),
            "rows": [row.as_json() for row in self.rows],
        }
