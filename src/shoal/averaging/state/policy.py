"""What a joiner decides, and why: pure functions of what is known of the donors. They change nothing.

The core (:mod:`.choice`) keeps that, and carries out what is decided here. Each decision comes with its reason.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from shoal.p2p.identity import PeerID
from shoal.utils import figures

WAIT_PATIENCE = 120.0
"""Seconds without a chunk at a donor that says that it lives; what it says costs a liar nothing."""
FRONT_PATIENCE = 20.0
"""Seconds at the front of a queue, while there is another donor to ask: an honest one copies its state meanwhile."""
LAST_PATIENCE = 180.0
"""Seconds without a chunk after which a donor has failed, though nobody else is left: honest ones refuse earlier."""
SILENCE = 6.0
"""Seconds without a chunk, or another sign, after which a donor is left while there is another one to ask. A link that
takes longer for a chunk (1.4 Mbit/s) leaves each donor once, and then stays.
"""
INVESTED_SHARE = 0.25
MAX_SILENCE = 60.0
"""Leaving costs what has come: so a donor may be silent for this share of the time that it has taken, up to a limit."""


@dataclass(frozen=True)
class Donor:
    """A peer that has declared that it shares its state."""

    peer: PeerID
    priority: float
    tiebreak: float
    addresses: tuple[str, ...] = ()


@dataclass
class Candidate:
    """A donor, and what has become of it."""

    donor: Donor
    was_asked: bool = False
    position: int | None = None
    """The joiner's place in this donor's queue, as last heard."""
    front_since: float | None = None
    """Since when that is the first one."""
    has_answered: bool = False
    was_left: bool = False
    """It made the joiner wait too long; it is asked again only when nobody else is left."""
    resumptions: int = 0
    answers: list[str] = field(default_factory=list)

    def hear_position(self, position: int, now: float) -> None:
        """The donor says at which place of its queue the joiner is."""
        self.position, self.has_answered = position, True
        if position:
            self.front_since = None
        elif self.front_since is None:
            self.front_since = now

    def at_front(self, now: float) -> float:
        """For how many seconds the joiner has been the first one in its queue."""
        return 0.0 if self.front_since is None else now - self.front_since


class Preference(NamedTuple):
    """The donor to ask, and why this one; None: there is nobody to ask."""

    candidate: Candidate | None
    reason: str


class QueueDecision(NamedTuple):
    """What to do at a place in a donor's queue, and why."""

    go_to: Candidate | None
    """Another queue to try; None: none."""
    leaves: bool
    """Whether the donor counts as one that made the joiner wait too long."""
    has_settled: bool
    """Whether queues are compared no more: leaving one costs the place in it."""
    reason: str
    has_failed: bool = False
    """Whether there is nothing to be had from the donor."""


def patience(invested: float, next_chunk_timeout: float | None) -> float:
    """For how many seconds a donor may be silent while there is another one to ask.

    :param invested: seconds since it began to send its state
    """
    allowed = min(max(SILENCE, INVESTED_SHARE * invested), MAX_SILENCE)
    return allowed if next_chunk_timeout is None else min(allowed, max(next_chunk_timeout / 2, SILENCE / 2))


def prefer(left: Sequence[Candidate]) -> Preference:
    """Whom to ask next, of those that have not failed."""
    if not left:
        return Preference(None, "no donor is left")
    best = min(left, key=lambda one: (one.was_left, -one.donor.priority, *_wait(one)))
    if best.was_left:
        return Preference(best, "it made this peer wait, but nobody else is left")
    return Preference(best, "the highest priority, and of these the shortest queue that is known")


def has_alternative(current: Candidate | None, left: Sequence[Candidate]) -> bool:
    """Whether there is a donor to go to that was neither left before nor has failed."""
    return any(one is not current and not one.was_left for one in left)


def wait_or_go(
    current: Candidate, left: Sequence[Candidate], *, waited: float, at_front: float, has_settled: bool
) -> QueueDecision:
    """Whether to keep the place in the queue of the donor that was asked.

    :param current: has the place that it gave
    :param left: all that have not failed, ``current`` included
    :param waited: seconds in which nothing of the state has come
    :param at_front: seconds for which the place has been the first one
    """
    position = current.position
    reason = f"nothing but place {position} in its queue for {figures.duration(max(waited, at_front))}"
    if waited >= LAST_PATIENCE:
        return QueueDecision(None, False, False, reason, has_failed=True)
    if (waited >= WAIT_PATIENCE or at_front >= FRONT_PATIENCE) and has_alternative(current, left):
        return QueueDecision(None, True, False, reason)
    if position == 0:
        return QueueDecision(None, False, has_settled, "it is about to begin")
    if has_settled:
        return QueueDecision(None, False, True, "all queues were compared")
    if current.resumptions:
        return QueueDecision(None, False, False, "this peer has a part of its state")
    rank = (current.donor.priority, current.was_left)
    equals = [one for one in left if (one.donor.priority, one.was_left) == rank]
    # Leaving a queue costs the place in it: one round through all of them, and then patience.
    settles = all(one.was_asked for one in equals)
    shortest = min(equals, key=_wait)
    if shortest is current:
        return QueueDecision(None, False, settles, "its queue is the shortest")
    return QueueDecision(shortest, False, settles, "another one's queue is shorter, or not known yet")


def _wait(candidate: Candidate) -> tuple[int, float]:
    """How long a donor's queue is as far as known; unknown ones first."""
    return (candidate.position or 0, candidate.donor.tiebreak)
