"""What happened in a demo, for the plot and the verdict."""

from __future__ import annotations

import time
from dataclasses import dataclass, field

Curve = list[tuple[float, float]]
"""Seconds since the start, and held-out accuracy (0 to 1)."""

ALLOWED_LAG = 0.02
"""How far the swarm's accuracy may be below that of central training."""


@dataclass
class History:
    """Accuracy over time of everybody in the demo, by name, and what else happened."""

    began: float = field(default_factory=time.monotonic)
    swarm: dict[str, Curve] = field(default_factory=dict)
    alone: dict[str, Curve] = field(default_factory=dict)
    central: Curve = field(default_factory=list)
    events: list[tuple[float, str]] = field(default_factory=list)
    training_began: float = 0.0

    def seconds(self) -> float:
        return time.monotonic() - self.began

    def begin_training(self) -> None:
        """All that was before is preparation: processes that start, modules that are imported."""
        self.training_began = self.seconds()

    def add_event(self, text: str) -> None:
        self.events.append((self.seconds(), text))

    def add_swarm(self, name: str, accuracy: float) -> None:
        """A peer's accuracy; one that has not changed since its last point adds nothing to the plot."""
        curve = self.swarm.setdefault(name, [])
        if not curve or curve[-1][1] != accuracy:
            curve.append((self.seconds(), accuracy))

    def add_references(self, alone: dict[str, float], central: float) -> None:
        now = self.seconds()
        for name, accuracy in alone.items():
            self.alone.setdefault(name, []).append((now, accuracy))
        self.central.append((now, central))


@dataclass(frozen=True)
class Outcome:
    """Held-out accuracies at the end.

    :param alone: by part, of models trained on that part alone
    :param swarm: by name, of the peers that have done all rounds
    :param failed: names of peers that failed, those killed on purpose aside
    """

    alone: dict[str, float]
    swarm: dict[str, float]
    central: float
    failed: tuple[str, ...] = ()

    @property
    def swarm_mean(self) -> float:
        """0 if no peer has come to the end."""
        return sum(self.swarm.values()) / len(self.swarm) if self.swarm else 0.0

    @property
    def succeeded(self) -> bool:
        return self.explain_failure() is None

    def explain_failure(self) -> str | None:
        if self.failed:
            return f"failed: {', '.join(self.failed)}"
        lag = self.central - self.swarm_mean
        if lag > ALLOWED_LAG:
            allowed = f"at most {ALLOWED_LAG * 100:.1f} are allowed"
            return f"the swarm is {lag * 100:.1f} points below central training; {allowed}"
        return None
