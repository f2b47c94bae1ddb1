"""What a search for a group is doing, since when, and which changes are allowed. Pure."""

from __future__ import annotations

import enum
import math
from dataclasses import dataclass

from shoal.p2p.identity import PeerID


class State(enum.Enum):
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


TRANSITIONS: dict[State, set[State]] = {
    State.NEW: {State.LOOKING},
    State.LOOKING: {State.LOOKING, State.ASKING, State.GROUPED, State.ENDED},
    State.ASKING: {State.ASKING, State.LOOKING, State.FOLLOWING, State.GROUPED, State.ENDED},
    State.FOLLOWING: {State.LOOKING, State.ASKING, State.GROUPED, State.ENDED},
    State.GROUPED: set(),
    State.ENDED: set(),
}


@dataclass(frozen=True)
class Ask:
    number: int
    leader: PeerID
    addresses: tuple[str, ...]
    asked_at: float
    redirects: int


@dataclass
class Times:
    """When what is due; infinite: not at all."""

    begins_at: float
    deadline: float
    expected_at: float
    """When a group was expected at first: the start time before it was postponed."""
    mixes_until: float = -math.inf
    declare_again: float = math.inf
    leader_begins_at: float = math.inf
