"""How groups are looked for: what a user of an averager sets, and every search works with. Pure."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from shoal.averaging.group import MAX_GROUP_SIZE
from shoal.errors import InvalidValueError

LEAST_REQUEST_TIMEOUT = 1.0
"""Seconds for a leader's first answer, however short the search."""


@dataclass(frozen=True)
class MatchmakingConfig:
    """Sizes of groups and times (seconds) of a search; validated when made."""

    target_group_size: int | None = None
    """A group of this size begins at once; None: groups of any size begin when the time has come."""
    min_group_size: int = 2
    min_matchmaking_time: float = 5.0
    """How much later a leader starts when too few followers came until its start time."""
    request_timeout: float = 3.0
    """How long to wait for a leader's first answer."""

    def __post_init__(self) -> None:
        target, minimum = self.target_group_size, self.min_group_size
        if not 1 <= minimum <= MAX_GROUP_SIZE:
            raise InvalidValueError(f"min_group_size={minimum}: 1 to {MAX_GROUP_SIZE} are allowed")
        if target is not None and not minimum <= target <= MAX_GROUP_SIZE:
            allowed = f"None or {minimum} (min_group_size) to {MAX_GROUP_SIZE}"
            raise InvalidValueError(f"target_group_size={target}: {allowed} are allowed")
        for name in ("min_matchmaking_time", "request_timeout"):
            seconds = getattr(self, name)
            if not (math.isfinite(seconds) and seconds > 0):
                raise InvalidValueError(f"{name}={seconds}: a positive number of seconds is allowed")

    def within(self, seconds: float | None) -> MatchmakingConfig:
        """For a search of so many seconds: a leader that does not answer shall not cost all of them."""
        if seconds is None:
            return self
        return replace(
            self, request_timeout=min(self.request_timeout, max(seconds / 2, LEAST_REQUEST_TIMEOUT))
        )
