"""What a search for a group is doing, and which changes are allowed. Pure."""

from __future__ import annotations

import enum


class IllegalTransition(AssertionError):
    """An event that cannot happen in this state, or a change of state that is not allowed: a bug in Shoal."""


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


MOVES: dict[State, set[State]] = {
    State.NEW: {State.LOOKING},
    State.LOOKING: {State.LOOKING, State.ASKING, State.GROUPED, State.ENDED},
    State.ASKING: {State.ASKING, State.LOOKING, State.FOLLOWING, State.GROUPED, State.ENDED},
    State.FOLLOWING: {State.LOOKING, State.ASKING, State.GROUPED, State.ENDED},
    State.GROUPED: set(),
    State.ENDED: set(),
}
