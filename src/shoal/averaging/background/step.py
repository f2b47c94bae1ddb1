"""One step while it runs: what was asked, how far it is, and what its report will say."""

from __future__ import annotations

import asyncio
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from shoal.averaging.commands import RunStep
from shoal.averaging.config import retry_start
from shoal.averaging.matchmaking_config import MatchmakingConfig
from shoal.averaging.report import StepReport
from shoal.errors import AllreduceException
from shoal.utils.timed import steady_time


class StepFailed(AllreduceException):
    """A round failed because of this peer's own tensors: another group would fare no better."""


@dataclass
class Step:
    """Shared by everything that carries the step out.

    ``start_time`` (steady seconds) is when its all-reduce is expected to begin.
    """

    command: RunStep
    start_time: float = field(init=False)
    is_searching: bool = False
    triggered: asyncio.Event = field(default_factory=asyncio.Event)
    ended: asyncio.Event = field(default_factory=asyncio.Event)
    report: StepReport = field(init=False)

    def __post_init__(self) -> None:
        self.start_time = self.command.scheduled_time
        self.report = StepReport(self.command.step)
        if not self.command.needs_trigger:
            self.triggered.set()

    @property
    def number(self) -> int:
        return self.command.step

    @property
    def time_left(self) -> float | None:
        """Seconds until the deadline, negative after it; None: there is none."""
        deadline = self.command.deadline
        return None if deadline is None else deadline - steady_time()

    def postpone(self, settings: MatchmakingConfig) -> None:
        """Another search begins: choose when a group that is not full begins its all-reduce now."""
        self.start_time = retry_start(self.start_time, steady_time(), self.command.deadline, settings)

    def note(self, **facts: Any) -> None:
        """Put facts into the report."""
        self.report = replace(self.report, **facts)

    def spend(self, **seconds: float) -> None:
        """Add seconds to phases of the report."""
        phases = asdict(self.report.phases)
        total = {name: round(phases[name] + value, 6) for name, value in seconds.items()}
        self.note(phases=replace(self.report.phases, **total))
