"""Whether peers that know of no grid, and are too many for one group, are to make one. Pure."""

from __future__ import annotations

from dataclasses import dataclass

from shoal.averaging.matchmaking.apart import shunned
from shoal.averaging.matchmaking.candidate import Candidate
from shoal.averaging.matchmaking.events import TooMany
from shoal.averaging.matchmaking.seats import choose_layout
from shoal.averaging.matchmaking.view import View
from shoal.averaging.matchmaking_config import MatchmakingConfig

LEAST_GROUPS = 2
"""Peers that know of no grid make one when they are as many as so many full groups hold."""


@dataclass
class Spreading:
    """The part of one search, at one place, in making a grid."""

    is_allowed: bool
    """Whether those meet here that know of no grid."""
    _has_begun: bool = False

    def crowd(self, me: Candidate, view: View, config: MatchmakingConfig) -> list[Candidate]:
        """All that make the grid, in order; empty: none is to be made.

        A group of clients alone, or of helpers, is none. Where there are some, the plan makes the first groups.
        """
        target, minimum = config.target_group_size, config.min_group_size
        if not self.is_allowed or target is None or view.count_seen < LEAST_GROUPS * target:
            return []
        everybody = view.all_seen()
        out = shunned(everybody)
        if out:
            everybody = [peer for peer in everybody if peer not in out]
        is_large = (
            len(everybody) >= LEAST_GROUPS * target
            and choose_layout(len(everybody), target, minimum).groups > 1
        )
        fits = is_large and me in everybody and all(peer.can_lead and peer.contributes for peer in everybody)
        return everybody if fits else []

    def begin(self, me: Candidate, crowd: list[Candidate]) -> TooMany | None:
        """What to say, once, when the view is sure of the ``crowd``. Until the search has moved, it asks nobody."""
        if self._has_begun:
            return None
        self._has_begun = True
        return TooMany(len(crowd), crowd.index(me))
