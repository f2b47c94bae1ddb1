"""How groups are looked for: what a user of an averager sets, and every search works with. Pure."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Annotated, Any

from shoal.averaging.group import MAX_GROUP_SIZE
from shoal.averaging.timeouts import MAX_WAIT, MIN_MATCHMAKING_TIME, REQUEST_TIMEOUT, given_times, settle
from shoal.errors import InvalidValueError
from shoal.utils.checks import Count, Number
from shoal.utils.options import check_options

LEAST_REQUEST_TIMEOUT = 1.0
"""Seconds for a leader's first answer, however short the search."""


@dataclass(frozen=True)
class MatchmakingConfig:
    """Options of an averager that concern the search for groups; validated when made."""

    target_group_size: Annotated[int | None, Count(1, MAX_GROUP_SIZE, "peers")] = None
    min_group_size: Annotated[int, Count(1, MAX_GROUP_SIZE, "peers")] = 2
    min_matchmaking_time: Annotated[float, Number(above=0, maximum=MAX_WAIT, unit="s")] = MIN_MATCHMAKING_TIME
    """How much later a leader starts when too few followers came until its start time."""
    request_timeout: Annotated[float, Number(above=0, unit="s")] = REQUEST_TIMEOUT

    def __post_init__(self) -> None:
        check_options(self)
        target, minimum = self.target_group_size, self.min_group_size
        if target is not None and target < minimum:
            raise InvalidValueError(
                f"target_group_size must be None or at least {minimum} (min_group_size), got {target}"
            )

    def within(self, seconds: float | None) -> MatchmakingConfig:
        """For a search of so many seconds: a leader that does not answer shall not cost all of them."""
        if seconds is None:
            return self
        return replace(
            self, request_timeout=min(self.request_timeout, max(seconds / 2, LEAST_REQUEST_TIMEOUT))
        )


def matchmaking_config(
    target_group_size: Any, min_group_size: Any, min_matchmaking_time: Any, request_timeout: Any
) -> MatchmakingConfig:
    """The configuration for what a user gave, with times that follow from each other where one was not given.

    :raises InvalidTypeError: a value is of the wrong type
    :raises InvalidValueError: a value is out of range
    """
    given = MatchmakingConfig(target_group_size, min_group_size, min_matchmaking_time, request_timeout)
    times = settle(
        given_times(min_matchmaking_time=given.min_matchmaking_time, request_timeout=given.request_timeout)
    )
    wait = min(times.min_matchmaking_time, MAX_WAIT)
    return replace(given, min_matchmaking_time=wait, request_timeout=times.request_timeout)
