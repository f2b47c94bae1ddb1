"""What a Trainer's logs say of the swarm: :class:`EpochFigures`. Pure."""

from __future__ import annotations

from collections import Counter

from shoal.optim.report import EpochReport

PREFIX = "shoal/"


class EpochFigures:
    """Counts the epochs that end while a Trainer trains."""

    def __init__(self) -> None:
        self._counts: Counter[str] = Counter()
        self._last: EpochReport | None = None

    def note(self, report: EpochReport) -> None:
        """Take one more epoch."""
        self._last = report
        self._counts[report.gradients] += 1
        late = report.late.get("gradients")
        if late is not None:
            self._counts[late] += 1
        failed = report.failure is not None or "failed" in (report.state, report.late.get("state"))
        if failed or late in ("own", "skipped"):
            self._counts["failed"] += 1

    def figures(self, epoch: int, peers: int) -> dict[str, float]:
        """Numbers under names such as "shoal/peers".

        "averaged", "own" and "failed" count epochs since training began: those whose gradients were averaged, those
        that used this peer's own, and those in which a round failed. Delayed rounds count when they have ended. The
        rest is of the last epoch.

        :param epoch: of this peer
        :param peers: of the swarm, this one included
        """
        values: dict[str, float] = {"epoch": epoch, "peers": max(1, peers)}
        if self._last is not None:
            values |= {"samples": self._last.samples, "local_samples": self._last.local_samples}
            values |= {f"seconds/{phase}": seconds for phase, seconds in self._last.seconds.items()}
        values |= {name: self._counts[name] for name in ("averaged", "own", "failed")}
        return {f"{PREFIX}{name}": value for name, value in values.items()}
