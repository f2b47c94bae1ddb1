"""What Shoal is required to reach, as predicates on medians. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, TypeAlias

from benchmarks.figures import FIGURES

Medians: TypeAlias = Mapping[str, Mapping[str, float]]
"""By side, then by figure."""


@dataclass(frozen=True)
class Verdict:
    """What was measured, and whether it suffices; None where a side was not measured."""

    value: float | None
    met: bool | None
    aim_met: bool | None = None
    """None where there is no further aim."""


@dataclass(frozen=True)
class Requirement:
    """A limit for one of Shoal's figures, absolute or as a multiple of another side's figure."""

    figure: str
    relation: Literal["at least", "at most"]
    limit: float
    of: str | None = None
    """The side whose figure is the measure."""
    aim: float | None = None
    """A limit beyond the required one."""

    def __post_init__(self) -> None:
        if self.figure not in FIGURES:
            raise ValueError(f"figure must be one of {', '.join(FIGURES)}, got {self.figure!r}")

    @property
    def text(self) -> str:
        sign = ">=" if self.relation == "at least" else "<="
        unit = f"x {self.of}" if self.of is not None else FIGURES[self.figure].unit
        aim = f" (aim {self.aim:g})" if self.aim is not None else ""
        return f"{FIGURES[self.figure].title} {sign} {self.limit:g} {unit}".rstrip() + aim

    def check(self, medians: Medians) -> Verdict:
        """Hold the medians of one row against the limit."""
        own = medians.get("shoal", {}).get(self.figure)
        other = 1.0 if self.of is None else medians.get(self.of, {}).get(self.figure)
        if own is None or not other:
            return Verdict(None, None)
        value = own / other
        aim_met = None if self.aim is None else self._suffices(value, self.aim)
        return Verdict(value, self._suffices(value, self.limit), aim_met)

    def _suffices(self, value: float, limit: float) -> bool:
        return value >= limit if self.relation == "at least" else value <= limit


def at_least(figure: str, limit: float, *, of: str | None = None, aim: float | None = None) -> Requirement:
    return Requirement(figure, "at least", limit, of, aim)


def at_most(figure: str, limit: float, *, of: str | None = None, aim: float | None = None) -> Requirement:
    return Requirement(figure, "at most", limit, of, aim)
