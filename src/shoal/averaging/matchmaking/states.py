"""What a search for a group is doing, since when, and which changes are allowed. Pure."""

from __future__ import annotations

import enum
import math
from dataclasses import dataclass

from shoal.averaging.matchmaking import events as ev
from shoal.sansio.core import TimePassed

DECLARATION_PERIOD = 10.0
"""Seconds after which a declaration is renewed; the shell lets it expire after three of these."""
DECLARE_RETRY = 0.5
"""Seconds after which a declaration that failed is tried again."""
HOPELESS_FOR = 2.0
"""Seconds for which no average must be possible before that is said: clients are often there first."""
MIX_FOR = 0.6
"""The part of the time until the start in which peers are mixed; see ``policy.Situation.is_mixing``."""


class SearchState(enum.Enum):
    NEW = "new"
    LOOKING = "looking"
    """Follows nobody; may have followers."""
    ASKING = "asking"
    """Waits for a leader's answer; may have followers, until it is accepted."""
    FOLLOWING = "following"
    GROUPED = "grouped"
    """Over: in a group."""
    ENDED = "ended"
    """Over: without a group."""


TRANSITIONS: dict[SearchState, set[SearchState]] = {
    SearchState.NEW: {SearchState.LOOKING},
    SearchState.LOOKING: {SearchState.LOOKING, SearchState.ASKING, SearchState.GROUPED, SearchState.ENDED},
    SearchState.ASKING: {
        SearchState.ASKING,
        SearchState.LOOKING,
        SearchState.FOLLOWING,
        SearchState.GROUPED,
        SearchState.ENDED,
    },
    SearchState.FOLLOWING: {SearchState.LOOKING, SearchState.ASKING, SearchState.GROUPED, SearchState.ENDED},
    SearchState.GROUPED: set(),
    SearchState.ENDED: set(),
}


_ALWAYS = (
    ev.Declared, ev.DeclareFailed, ev.Polled, ev.PollFailed, ev.SchemaCompared, ev.JoinRequested, ev.FollowerLost,
    ev.PeerGone, ev.Restarted, ev.Cancelled, TimePassed,
)  # fmt: skip
_ANSWERS = (
    ev.LeaderAccepted, ev.LeaderRedirected, ev.LeaderRejected, ev.LeaderPostponed, ev.LeaderDismissed, ev.LeaderBegan,
    ev.LeaderLost,
)  # fmt: skip

HEARD: dict[SearchState, frozenset[type]] = {
    SearchState.NEW: frozenset({ev.SearchStarted}),
    SearchState.LOOKING: frozenset(_ALWAYS),
    SearchState.ASKING: frozenset(
        {*_ALWAYS, ev.LeaderAccepted, ev.LeaderRedirected, ev.LeaderRejected, ev.LeaderLost}
    ),
    SearchState.FOLLOWING: frozenset(
        {*_ALWAYS, ev.LeaderPostponed, ev.LeaderDismissed, ev.LeaderBegan, ev.LeaderLost}
    ),
    SearchState.GROUPED: frozenset({ev.JoinRequested}),
    SearchState.ENDED: frozenset({ev.JoinRequested}),
}
"""The events that change a search in each state."""
OVERHEARD: dict[SearchState, frozenset[type]] = {
    SearchState.NEW: frozenset(),
    **{
        state: frozenset(_ANSWERS)
        for state in (SearchState.LOOKING, SearchState.ASKING, SearchState.FOLLOWING)
    },
    **{state: frozenset({*_ALWAYS, *_ANSWERS}) for state in (SearchState.GROUPED, SearchState.ENDED)},
}
"""Events of something that is over, such as the answer of a leader that this peer has left: they change nothing. Any
other event is illegal."""


@dataclass
class Times:
    """When what is due; infinite: not at all."""

    begins_at: float
    deadline: float
    expected_at: float
    """When a group was expected at first: the start time before it was postponed."""
    mixes_until: float = -math.inf
    declare_again: float = math.inf

    def own_turn(self, order_time: float) -> float:
        """When a leader before this peer in the order should have begun: that one's start time is no later."""
        return max(self.expected_at, order_time)

    def mix(self, now: float) -> None:
        """Mix peers for the first part of the time until the start."""
        self.mixes_until = now + MIX_FOR * (self.begins_at - now)
