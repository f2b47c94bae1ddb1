"""Whose searches a plan leaves out, until when and why. Pure: ``now`` is an argument.

What a peer says of itself counts for as long as it says so; what others say of it counts once for each of its searches,
and for seconds only.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType

from shoal.averaging.matchmaking.messages import SEARCH_MARK_BYTES, search_mark
from shoal.p2p.identity import PeerID

HEARSAY_AT_LEAST = 1.0
HEARSAY_LATENCIES = 4.0
HEARSAY_AT_MOST = 10.0
"""Within the first number of seconds, and the second one times the longest that the DHT took, the members of a group
that has begun say so themselves; within the third in any case."""
MAX_HEARSAY = 4096
"""What is said of more searches than these is forgotten, except of those that were seen."""

NOBODY: Mapping[PeerID, float] = MappingProxyType({})


@dataclass(frozen=True)
class Reason:
    """A peer whose searches up to ``start_time`` are not planned with until ``until``."""

    start_time: float
    until: float
    is_looking: bool
    """It has a full group that has not begun: not to be asked, but to be counted."""
    leader: bytes = b""
    """The mark of the search of that group's leader, where others have said so."""


class LeftOut:
    """The peers that one search leaves out."""

    def __init__(self, stalled: Mapping[PeerID, float] = NOBODY) -> None:
        self.stalled = dict(stalled)
        """Leaders that kept this search waiting, and until when they are left out: also at another place."""
        self._known: dict[PeerID, Reason] = {}
        self._hearsay: dict[bytes, Reason] = {}
        """The marks of searches of which others have said that they have a group."""

    def add(self, peer_id: PeerID, start_time: float, until: float, *, is_looking: bool) -> None:
        """Leave out the searches of ``peer_id`` up to ``start_time``."""
        before = self._known.get(peer_id)
        if before is None or (start_time, until) > (before.start_time, before.until):
            self._known[peer_id] = Reason(start_time, until, is_looking)

    def hear(
        self,
        marks: bytes,
        until: float,
        now: float,
        latency: float,
        seen: Mapping[PeerID, float],
        *,
        is_looking: bool,
    ) -> None:
        """Somebody says that the searches with these ``marks``, the leader's first, have a group. That it has begun
        takes back what was said of its members before: it may have let some of them go.

        :param latency: the longest time that the DHT took: the peers themselves say it within a few of these
        :param seen: the start times of all searches that were seen, which are remembered if there are too many
        """
        lasts = min(HEARSAY_AT_LEAST + HEARSAY_LATENCIES * latency, HEARSAY_AT_MOST)
        ends = min(until, now + lasts)
        leader = marks[:SEARCH_MARK_BYTES]
        if not is_looking:
            let_go = [mark for mark, one in self._hearsay.items() if one.is_looking and one.leader == leader]
            for mark in let_go:
                del self._hearsay[mark]
        for start in range(0, len(marks), SEARCH_MARK_BYTES):
            mark = marks[start : start + SEARCH_MARK_BYTES]
            before = self._hearsay.get(mark)
            if before is None or before.is_looking:
                self._hearsay[mark] = Reason(math.inf, ends, is_looking, leader)
        if len(self._hearsay) > MAX_HEARSAY:
            known = {_mark(peer_id, start_time) for peer_id, start_time in seen.items()}
            self._hearsay = {mark: one for mark, one in self._hearsay.items() if mark in known}

    def take_back(self, peer_id: PeerID, start_time: float) -> None:
        """The peer has shown that it lives and looks for a group in this search."""
        self._known.pop(peer_id, None)
        mark = _mark(peer_id, start_time)
        if mark in self._hearsay:
            self._hearsay[mark] = replace(self._hearsay[mark], until=-math.inf)

    def why(self, peer_id: PeerID, start_time: float, now: float) -> Reason | None:
        """Why a search is left out; that its group has begun counts more than that it was full. None: it is not."""
        if not (self.stalled or self._hearsay or peer_id in self._known):
            return None
        if now < self.stalled.get(peer_id, -math.inf):
            return Reason(start_time, self.stalled[peer_id], is_looking=False)
        known, rumour = self._known.get(peer_id), self._hearsay.get(_mark(peer_id, start_time))
        reasons = (one for one in (known, rumour) if one and now < one.until and start_time <= one.start_time)
        return min(reasons, key=lambda one: one.is_looking, default=None)


def _mark(peer_id: PeerID, start_time: float) -> bytes:
    return search_mark(peer_id.to_bytes(), start_time)
