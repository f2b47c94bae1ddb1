"""How long a search lets leaders keep it waiting: in all, however many leaders there are and whatever they say. Pure.

A leader may have good reason to put its group off: too few have come. Its follower cannot look into it, but it can see
whether it would be in a group without this leader. From the moment when its own start time has come and it would be,
the leader has time for one more wait, in which honest leaders begin. After that the follower leaves, and remembers.

That time is there once in a search, and leaders that let it go again use it up, too. Later ones get a part of it, each
half as much as the one before: however many stalling leaders stand in its way, a search comes past them.
"""

from __future__ import annotations

import math

from shoal.averaging.matchmaking_config import MatchmakingConfig

LEAST_LATENCIES = 3.0
"""Every leader gets this many times the longest that the DHT took lately: so long it may take to see everybody."""
LEAST = 0.5
"""... and at least as many seconds."""


class Patience:
    """What is left of a search's patience with its leaders."""

    def __init__(self, config: MatchmakingConfig) -> None:
        self._left = config.min_matchmaking_time + config.request_timeout
        """Seconds, while no leader has used it up."""
        self._later = config.request_timeout
        self._spent = 0
        """How many leaders have used it up."""
        self._since = math.inf
        """Since when the search would be in a group without the leader that it follows."""
        self._looked_at = -math.inf

    def look(self, now: float, *, could_be_elsewhere: bool) -> None:
        """A follower whose own start time has come has looked around."""
        self._looked_at = now
        self._since = min(self._since, now) if could_be_elsewhere else math.inf

    def next_leader(self) -> None:
        """The search asks another leader: the time that the one before has cost is gone."""
        self._left -= max(0.0, self._looked_at - self._since)
        self._since = math.inf

    def ends_at(self, latency: float) -> float:
        """When the patience with the present leader ends; infinite: it keeps the search from nothing.

        :param latency: the longest time that the DHT took lately
        """
        left = self._left if self._spent == 0 else self._later * math.pow(2.0, 1 - min(self._spent, 16))
        return self._since + max(left, LEAST, LEAST_LATENCIES * latency)

    def spend(self) -> None:
        """It has ended."""
        self._spent += 1
        self._since = math.inf
