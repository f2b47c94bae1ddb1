"""How long a group waits beyond its start time for peers that ought to be there. Pure.

Members of a group that failed learn of it at different times: one that has to ask for the decision needs 2.5 s more
than the others. Without this rule the others would begin just before it comes, and it would be alone until its step
ends.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping

from shoal.p2p.identity import PeerID

SHARE_OF_MISSING = 2.0
"""Groups wait the longer the larger the part of them that is missing: a third of them is worth the whole limit."""
STALE_AFTER = 2.0
"""Seconds; a view that is older is that of a process that was stopped, or whose DHT is slow."""
STALE_LATENCIES = 4.0
"""... and as many times the longest that the DHT took lately."""


def longer_wait(members: int, missing: int, target: int | None, limit: float) -> float:
    """Seconds, at most ``limit``, for which a group of so many ``members`` waits for ``missing`` ones."""
    if not missing or (target is not None and members >= target):
        return 0.0
    return limit * min(1.0, SHARE_OF_MISSING * missing / members)


def still_missing(
    expected: Collection[PeerID], latest: Mapping[PeerID, float], before: Mapping[PeerID, float]
) -> list[PeerID]:
    """Who of the ``expected`` peers has not begun another search.

    :param latest: the start time of each peer's last search, as far as it is known
    :param before: likewise, when this peer's own last search ended
    """
    never = -math.inf
    return [peer for peer in expected if latest.get(peer, never) <= before.get(peer, never)]


def is_stale(looked_at: float, now: float, latency: float) -> bool:
    """Whether a view must be renewed before a group begins by it."""
    return now - looked_at > max(STALE_AFTER, STALE_LATENCIES * latency)


def avoid_for(unanswered: int, request_timeout: float, limit: float) -> float:
    """Seconds for which a leader is left out that gave no answer so many times in a row: it may only have been stopped
    for a moment, and nobody else may be there.
    """
    doublings = min(unanswered - 1, 16)
    return min(limit, request_timeout * 2.0**doublings)
