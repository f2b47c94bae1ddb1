"""What became of delayed work after its epoch's report, for the next report."""

from __future__ import annotations

import threading
from typing import Protocol

from shoal.averaging.report import StepReport


class Rounds(Protocol):
    """Where a delayed round of parameters runs: the averager of the state."""

    @property
    def averaging_in_progress(self) -> bool: ...

    @property
    def last_report(self) -> StepReport | None: ...


class LateWork:
    """Filled by the thread of the delayed work, and emptied by the one that ends epochs."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._outcomes: dict[str, str] = {}
        self._rounds: list[StepReport] = []
        self._under_way: tuple[StepReport | None] | None = None

    def gradients(self, outcome: str, report: StepReport | None) -> None:
        """A delayed round of gradients has ended."""
        with self._lock:
            self._note("gradients", outcome, report)

    def state_begun(self, last: StepReport | None) -> None:
        """A delayed round of parameters has begun; ``last`` is the report of the round before."""
        with self._lock:
            self._under_way = (last,)

    def look_at_state(self, averager: Rounds) -> None:
        """See whether the delayed round of parameters has ended."""
        with self._lock:
            if self._under_way is None or averager.averaging_in_progress:
                return
            (before,), self._under_way = self._under_way, None
            report = averager.last_report
            report = None if report is before else report
            self._note("state", "averaged" if report is not None and report.succeeded else "failed", report)

    def take(self) -> tuple[dict[str, str], list[StepReport]]:
        """The outcomes since the last call, by "gradients" and "state", and the rounds that led to them."""
        with self._lock:
            taken = self._outcomes, self._rounds
            self._outcomes, self._rounds = {}, []
        return taken

    def _note(self, what: str, outcome: str, report: StepReport | None) -> None:
        self._outcomes[what] = outcome
        if report is not None:
            self._rounds.append(report)
