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
    """Its place in this donor's queue, as last heard."""
    has_answered: bool = False
    was_left: bool = False
    """It made the joiner wait too long; it is asked again only when nobody else is left."""
    resumptions: int = 0
    answers: list[str] = field(default_factory=list)


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
    current: Candidate, left: Sequence[Candidate], *, waited: float, has_settled: bool
) -> QueueDecision:
    """Whether to keep the place in the queue of the donor that was asked.

    :param current: has the place that it gave
    :param left: all that have not failed, ``current`` included
    :param waited: seconds in which nothing of the state has come
    """
    position = current.position
    if waited >= WAIT_PATIENCE and has_alternative(current, left):
        reason = f"nothing but place {position} in its queue for {figures.duration(waited)}"
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
