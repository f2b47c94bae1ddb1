"""The messages of one round, between the members of its group, and what makes them well-formed. Pure.

Tensor bytes travel as payloads, not in here. Members are numbers: positions in the group's agreed order, the leader
first. Texts of others become printable where they enter.
"""

from __future__ import annotations

import enum
import math
from collections.abc import Iterable
from typing import Annotated, TypeAlias

import msgspec

from shoal.averaging.group import GROUP_ID_BYTES, MAX_WEIGHT
from shoal.errors import ProtocolViolation
from shoal.p2p.rpc import Method
from shoal.utils.text import printable

MAX_REASON_CHARS = 1000
_EXCLUSION_CHARS = 120_000
"""Characters of all reasons in one list of exclusions: four bytes each, they fit into a message of 1 MiB."""

GroupID: TypeAlias = Annotated[bytes, msgspec.Meta(min_length=GROUP_ID_BYTES, max_length=GROUP_ID_BYTES)]

EXCLUSION_PHASES = ("join", "snapshot", "exchange")


class Contribute(msgspec.Struct, frozen=True, tag=True, forbid_unknown_fields=True):
    """A member opens the exchange with an owner: its weight, and its parts of the owner's span, will follow.

    A payload's tag is the number of its part in the owner's span, in both directions.
    """

    prefix: str
    group_id: GroupID


class ReadyForParts(msgspec.Struct, frozen=True, tag=True, forbid_unknown_fields=True):
    """The owner has memory for the parts; averages will follow as payloads."""


class DeclareWeight(msgspec.Struct, frozen=True, tag=True, forbid_unknown_fields=True):
    """The member's weight in the average; before its first part. With 0 no parts follow."""

    weight: float


class JoinRound(msgspec.Struct, frozen=True, tag=True, forbid_unknown_fields=True):
    """A member tells the leader that it takes part; its reports will follow."""

    prefix: str
    group_id: GroupID


# Reports of a member to the leader.


class Ready(msgspec.Struct, frozen=True, tag=True, forbid_unknown_fields=True):
    """The member holds every average, and gives its word to wait for the outcome."""

    weight: float


class AveragesReceived(msgspec.Struct, frozen=True, tag=True, forbid_unknown_fields=True):
    """The member has taken so many averages of other owners, and misses some: it is slow, but not stuck."""

    count: int


class SpanAveraged(msgspec.Struct, frozen=True, tag=True, forbid_unknown_fields=True):
    """An owner has averaged its whole span.

    ``weights``: what each member told it (None: nothing). ``square_distance``: over the span, the sum of the squared
    distances of the members' values from the average, as the mean of the members; ``square_average``: the sum of the
    average's squares. Both are estimates; None: unknown.
    """

    weights: tuple[float | None, ...]
    square_distance: float | None
    square_average: float | None


class GaveUp(msgspec.Struct, frozen=True, tag=True, forbid_unknown_fields=True):
    """The member leaves the round, and serves nobody any more."""

    reason: str


class StandsAside(msgspec.Struct, frozen=True, tag=True, forbid_unknown_fields=True):
    """The member cannot commit, but goes on to serve the averages of its span."""

    phase: str
    reason: str


class SenderExcluded(msgspec.Struct, frozen=True, tag=True, forbid_unknown_fields=True):
    """An owner goes on without a sender."""

    sender: int
    reason: str


class Loss(enum.Enum):
    """How a member lost an owner."""

    BROKEN = "broken"
    """The stream to the owner ended, or what the owner sent was wrong."""
    UNDIALABLE = "undialable"
    """No address of the owner could be dialed."""
    TIMED_OUT = "timed out"
    """The owner is there, but took too long."""


class OwnerFailed(msgspec.Struct, frozen=True, tag=True, forbid_unknown_fields=True):
    """A member cannot get an owner's averages."""

    owner: int
    reason: str
    loss: Loss


Report: TypeAlias = (
    Ready | AveragesReceived | SpanAveraged | GaveUp | StandsAside | SenderExcluded | OwnerFailed
)


# The leader's word.


class Excluded(msgspec.Struct, frozen=True, tag=True, forbid_unknown_fields=True):
    """The round goes on without a member: ``seconds`` into the leader's all-reduce, in which phase, and why."""

    member: int
    phase: str
    seconds: float
    reason: str


class Outcome(msgspec.Struct, frozen=True, tag=True, forbid_unknown_fields=True):
    """The leader's decision: committed (``reason`` None) for all that are not excluded, or why the round failed.

    ``weights``: each member's in the average, 0 for those excluded. The sums are those of :class:`SpanAveraged` over
    the whole vector. ``undialable``: of a round that failed, the owners that members could not dial.
    """

    reason: str | None
    excluded: tuple[Excluded, ...] = ()
    weights: tuple[float, ...] = ()
    square_distance: float | None = None
    square_average: float | None = None
    undialable: tuple[int, ...] = ()


class AskOutcome(msgspec.Struct, frozen=True, tag=True, forbid_unknown_fields=True):
    """An orphan asks another member what it knows of the leader's decision."""

    prefix: str
    group_id: GroupID


class OutcomeAnswer(msgspec.Struct, frozen=True, tag=True, forbid_unknown_fields=True):
    """The phase of the member that was asked, by name (None: it does not know the round), and the leader's decision
    if it knows that.
    """

    phase: str | None
    outcome: Outcome | None = None


ToOwner: TypeAlias = Contribute | DeclareWeight
ToLeader: TypeAlias = JoinRound | Report
FromLeader: TypeAlias = Excluded | Outcome

EXCHANGE: Method[ToOwner, ReadyForParts] = Method("averaging.exchange", ToOwner, ReadyForParts)  # type: ignore[arg-type]  # a union is no type
COMMIT: Method[ToLeader, FromLeader] = Method("averaging.commit", ToLeader, FromLeader)  # type: ignore[arg-type]
OUTCOME: Method[AskOutcome, OutcomeAnswer] = Method("averaging.outcome", AskOutcome, OutcomeAnswer)


def reason_text(text: str) -> str:
    """A reason as it is sent and shown: one printable line of bounded length."""
    return printable(text, MAX_REASON_CHARS)


def exclusion_text(text: str, size: int) -> str:
    """A reason for an exclusion in a group of ``size``: short enough that the whole list fits into a message."""
    return printable(text, max(1, min(MAX_REASON_CHARS, _EXCLUSION_CHARS // size)))


def is_weight(value: float) -> bool:
    """Whether a number can be a member's weight."""
    return 0 <= value <= MAX_WEIGHT


def check_report(report: Report, size: int) -> Report:
    """A member's report in a group of ``size``, with its text made printable.

    :raises ProtocolViolation: it is not well-formed
    """
    match report:
        case Ready(weight):
            _check(is_weight(weight), f"weight {weight}")
        case AveragesReceived(count):
            _check(count > 0, f"{count} averages")
        case SpanAveraged(weights, distance, average):
            _check(len(weights) == size, f"{len(weights)} weights in a group of {size}")
            _check(all(one is None or is_weight(one) for one in weights), "a weight is negative or too large")
            _check_sums(distance, average)
        case StandsAside(phase, reason):
            _check(phase in EXCLUSION_PHASES, "an unknown phase")
            return StandsAside(phase, reason_text(reason))
        case GaveUp(reason):
            return GaveUp(reason_text(reason))
        case SenderExcluded(sender, reason):
            _check(0 <= sender < size, f"member {sender} of {size}")
            return SenderExcluded(sender, reason_text(reason))
        case OwnerFailed(owner, reason, loss):
            _check(0 <= owner < size, f"member {owner} of {size}")
            return OwnerFailed(owner, reason_text(reason), loss)
    return report


def check_excluded(excluded: Excluded, size: int) -> Excluded:
    """A notice of the leader; as :func:`check_report`."""
    _check(0 <= excluded.member < size, f"member {excluded.member} of {size}")
    _check(excluded.phase in EXCLUSION_PHASES, "an unknown phase")
    _check(math.isfinite(excluded.seconds) and excluded.seconds >= 0, f"{excluded.seconds} seconds")
    return msgspec.structs.replace(excluded, reason=reason_text(excluded.reason))


def check_outcome(outcome: Outcome, size: int) -> Outcome:
    """A decision of the leader; as :func:`check_report`."""
    excluded = tuple(check_excluded(one, size) for one in outcome.excluded)
    _check(len({one.member for one in excluded}) == len(excluded), "a member is excluded twice")
    _check(len(outcome.weights) in (0, size), f"{len(outcome.weights)} weights in a group of {size}")
    _check(all(map(is_weight, outcome.weights)), "a weight is negative or too large")
    _check_sums(outcome.square_distance, outcome.square_average)
    _check(all(0 <= one < size for one in outcome.undialable), "an unknown member could not be dialed")
    _check(len(outcome.undialable) <= size, "more members could not be dialed than there are")
    reason = None if outcome.reason is None else reason_text(outcome.reason)
    return msgspec.structs.replace(outcome, reason=reason, excluded=excluded)


def add_up(values: Iterable[float | None]) -> float | None:
    """The sum, if all are known and it is finite."""
    total = 0.0
    for value in values:
        if value is None:
            return None
        total += value  # math.fsum raises where this becomes infinite
    return total if math.isfinite(total) else None


def _check_sums(*sums: float | None) -> None:
    for value in sums:
        _check(value is None or (math.isfinite(value) and value >= 0), f"a sum of squares is {value}")


def _check(holds: bool, problem: str) -> None:
    if not holds:
        raise ProtocolViolation(f"a message of the round is wrong: {problem}")
