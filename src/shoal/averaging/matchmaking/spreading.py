"""Whether peers under one key that know of no grid are so many that they make one. Pure.

Only peers that look for a group at the same time do. Where they come one after the other, group after group begins, and
what keeps the members of a group apart is their lineage, as in a small swarm: such peers would not agree on a grid, and
each would wait at a seat of its own.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from shoal.averaging.matchmaking.apart import shunned
from shoal.averaging.matchmaking.candidate import Candidate, in_order
from shoal.averaging.matchmaking.seats import SPREAD_ABOVE, choose_layout
from shoal.averaging.matchmaking.view import View
from shoal.averaging.matchmaking_config import MatchmakingConfig


@dataclass
class Spreading:
    """The part of one search, at one place, in making a grid."""

    is_allowed: bool
    """Whether those meet here that know of no grid."""
    has_begun: bool = False
    """Whether it has said so. Until the search has moved, it asks nobody."""
    crowd: list[Candidate] = field(default_factory=list)
    """All that make the grid, in order; empty: none is to be made."""

    def look(self, me: Candidate, view: View, config: MatchmakingConfig) -> None:
        """After a poll: see who makes the grid. Those that do the same in a group are neighbours there, so that
        each group gets some of each kind.
        """
        target, minimum = config.target_group_size, config.min_group_size
        if not self.is_allowed or target is None or view.count_ungrouped <= SPREAD_ABOVE:
            self.crowd = []
            return
        everybody = view.ungrouped()
        out = shunned(everybody)
        if out:
            everybody = [peer for peer in everybody if peer not in out]
        layout = choose_layout(len(everybody), target, minimum)
        leaders = sum(peer.can_lead for peer in everybody)
        contributors = sum(peer.contributes for peer in everybody)
        is_large = len(everybody) > SPREAD_ABOVE and layout.groups > 1
        fits = is_large and me in everybody and min(leaders, contributors) >= layout.groups
        self.crowd = sorted(everybody, key=_by_kind) if fits else []


def _by_kind(peer: Candidate) -> tuple[bool, bool, tuple[float, bytes]]:
    return not peer.can_lead, not peer.contributes, in_order(peer)
