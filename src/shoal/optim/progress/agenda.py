"""When a peer tells of its progress, and when it looks at that of others. Pure: times are arguments."""

from __future__ import annotations

import math
from dataclasses import dataclass

from shoal.optim.progress.forecast import Forecast


@dataclass
class Agenda:
    """Times are those of one steady clock. What changes is told at the forecast's pace, or at once if it is urgent."""

    pace: float
    """Seconds between two records at least."""
    next_look: float = -math.inf
    _last_told: float = -math.inf
    _changed: bool = False
    _urgent: bool = False

    def report(self, *, urgent: bool) -> None:
        """Own progress has changed; ``urgent`` if others wait for it: it ends an epoch, or begins one."""
        self._changed = True
        self._urgent = self._urgent or urgent

    def look_soon(self) -> None:
        """What others do has become uncertain: an epoch has begun."""
        self.next_look = -math.inf

    def tells_at(self) -> float:
        """When own progress is to be stored; never, if it has not changed."""
        if self._urgent:
            return -math.inf
        return self._last_told + self.pace if self._changed else math.inf

    def wakes_at(self) -> float:
        """When there is something to do next."""
        return min(self.tells_at(), self.next_look)

    def told(self, now: float) -> None:
        """What was reported until now is being stored."""
        self._last_told, self._changed, self._urgent = now, False, False

    def looked(self, now: float, forecast: Forecast) -> None:
        """A look that was done at ``now`` gave this."""
        self.pace = forecast.pace
        self.next_look = now + forecast.next_look

    def failed(self, now: float, period: float) -> None:
        """A look has failed: another one follows after ``period`` seconds."""
        self.next_look = now + period
