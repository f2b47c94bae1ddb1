"""What this host's uplink takes, from what its bundles measure. Pure: the time is an argument.

The paths to several peers share the uplink, so what counts is their sum. It is a measure of the link only while a path
is full: less may have been sent than the link takes. The highest sum fades, since links change.
"""

from __future__ import annotations

import math
from collections.abc import Hashable

TOGETHER_SECONDS = 1.0
"""Rates that were measured within this time are those of one moment."""
HALF_LIFE = 600.0
"""Seconds in which a highest sum comes to count half as much."""


class UploadRate:
    """Of one host, in bytes a second."""

    def __init__(self) -> None:
        self._latest: dict[Hashable, tuple[float, float]] = {}
        self._peak = 0.0
        self._peak_at = 0.0

    def note(self, path: Hashable, rate: float, now: float, *, is_full: bool) -> None:
        """So many bytes a second went to one peer until now. ``is_full``: there was always more to send."""
        self._latest = {one: (r, at) for one, (r, at) in self._latest.items() if now - at <= TOGETHER_SECONDS}
        self._latest[path] = rate, now
        total = sum(r for r, _ in self._latest.values())
        if is_full and total > self.peak(now):
            self._peak, self._peak_at = total, now

    def peak(self, now: float) -> float:
        """The highest sum that was measured lately; 0: none was."""
        return self._peak * math.pow(2.0, -max(0.0, now - self._peak_at) / HALF_LIFE)
