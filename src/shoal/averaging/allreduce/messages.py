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

from shoal.averaging.allreduce.assignment import FIRST_EPOCH, Epoch, Repair, SpanId
from shoal.averaging.group import GROUP_ID_BYTES, MAX_WEIGHT
from shoal.p2p.rpc import Method
from shoal.utils.structs import Message
from shoal.utils.text import printable

MAX_REASON_CHARS = 1000
_EXCLUSION_CHARS = 120_000
"""Characters of all reasons in one list of exclusions: four bytes each, they fit into a message of 1 MiB."""

GroupID: TypeAlias = Annotated[bytes, msgspec.Meta(min_length=GROUP_ID_BYTES, max_length=GROUP_ID_BYTES)]

EXCLUSION_PHASES = ("join", "snapshot", "exchange")


class Contribute(Message, frozen=True):
    """A member opens the exchange for one span with its owner: its weight, and its parts of the span, will follow.

    A payload's tag is the number of its part in the span, in both directions.
    """

    prefix: str
    group_id: GroupID
    span: SpanId


class ReadyForParts(Message, frozen=True):
    """The owner has memory for the parts; averages will follow as payloads."""


class DeclareWeight(Message, frozen=True):
    """The member's weight in the average; before its first part. With 0 no parts follow."""

    weight: float


class JoinRound(Message, frozen=True):
    """A member tells the leader of ``term`` that it takes part; its reports will follow."""

    prefix: str
    group_id: GroupID
    term: int = 0


# Reports of a member to the leader.


class Ready(Message, frozen=True):
    """The member holds every average of the assignment of ``epoch``, and gives its word to wait for the outcome."""

    weight: float
    epoch: Epoch = FIRST_EPOCH


class AveragesReceived(Message, frozen=True):
    """The member has taken so many averages of other owners, and misses some: it is slow, but not stuck."""

    count: int


class SpanAveraged(Message, frozen=True):
    """An owner has averaged its whole span: its report to the leader, and the end of its averages to each member.

    ``weights``: what each member told it (None: nothing). ``partial``: members of which not all parts of the span are
    in the average, with the number of those that are, its first ones. ``square_distance``: over the span, the sum of
    the squared distances of the members' values from the average, as the mean of the members; ``square_average``: the
    sum of the average's squares. Both are estimates; None: unknown.
    """

    span: SpanId
    weights: tuple[float | None, ...]
    square_distance: float | None
    square_average: float | None
    partial: tuple[tuple[int, int], ...] = ()


class GaveUp(Message, frozen=True):
    """The member leaves the round, and serves nobody any more."""

    reason: str


class StandsAside(Message, frozen=True):
    """The member cannot commit, but goes on to serve the averages of its span."""

    phase: str
    reason: str


class Loss(enum.Enum):
    """How one member lost another."""

    BROKEN = "broken"
    """The stream between them ended."""
    UNDIALABLE = "undialable"
    """No address of the other could be dialed."""
    TIMED_OUT = "timed out"
    """The other is there, but took too long."""
    LATE = "late"
    """The other is later than members have been lately: the leader decides whether the round goes on without it."""
    INVALID = "invalid"
    """What the other sent was wrong, such as NaN."""


class SenderExcluded(Message, frozen=True):
    """An owner averages the rest of a span without a sender."""

    span: SpanId
    sender: int
    reason: str
    loss: Loss = Loss.BROKEN


class OwnerFailed(Message, frozen=True):
    """A member cannot get the averages of a span."""

    span: SpanId
    reason: str
    loss: Loss


Report: TypeAlias = (
    Ready | AveragesReceived | SpanAveraged | GaveUp | StandsAside | SenderExcluded | OwnerFailed
)


# The leader's word.


class Excluded(Message, frozen=True):
    """The round goes on without a member: ``seconds`` into the leader's all-reduce, in which phase, and why."""

    member: int
    phase: str
    seconds: float
    reason: str


class Outcome(Message, frozen=True):
    """The leader's decision: committed (``reason`` None) for all that are not excluded, or why the round failed.

    ``weights``: each member's in the average, 0 for those excluded. The sums are those of :class:`SpanAveraged` over
    the whole vector. ``undialable``: of a round that failed, the owners that members could not dial. ``epoch``: of the
    assignment that was averaged. ``partial``: what is in the average of excluded members, as runs of parts (member,
    first part, the part after the last).
    """

    reason: str | None
    excluded: tuple[Excluded, ...] = ()
    weights: tuple[float, ...] = ()
    square_distance: float | None = None
    square_average: float | None = None
    undialable: tuple[int, ...] = ()
    epoch: Epoch = FIRST_EPOCH
    partial: tuple[tuple[int, int, int], ...] = ()

    def counts(self, member: int) -> bool:
        """Whether the round commits with this member."""
        return self.reason is None and all(one.member != member for one in self.excluded)


# The vote: questions to any member, also to one that has left the round, and its answers.


class AskOutcome(Message, frozen=True):
    """A member that lost the leader asks what another knows of the decision."""

    prefix: str
    group_id: GroupID


class Prepare(Message, frozen=True):
    """A member that lost the leader wants to lead, in this term. ``floor``: see :class:`~.voter.Voter`."""

    prefix: str
    group_id: GroupID
    term: int
    floor: int = 0


class Propose(Message, frozen=True):
    """The leader of this term proposes how the round ends."""

    prefix: str
    group_id: GroupID
    term: int
    outcome: Outcome


class NotKnown(Message, frozen=True):
    """The member that was asked does not know the round: it never did, or is a process that was started later."""


class Knows(Message, frozen=True):
    """The round is decided."""

    outcome: Outcome


class Undecided(Message, frozen=True):
    """The member knows of no decision. ``phase``: where it stands, by name. ``has_leader``: it hears a living one.
    ``has_accepted``: it accepted a proposal to commit. ``casts``: it has the founder's casting vote.
    """

    phase: str
    has_leader: bool
    has_accepted: bool = False
    casts: bool = False


class Refused(Message, frozen=True):
    """The member has promised not to hear terms below this one."""

    promised: int


class Promised(Message, frozen=True):
    """The member hears nothing below the term that it was asked for, and says where it stands.

    ``failure``: why it will not commit; None: it may. ``weight``: its own; None: not known yet. ``orders``: the repairs
    that it knows. ``spans``: what it knows of the spans that it holds. ``accepted``: the decision that it accepted, and
    in which term. ``floor`` and ``casts``: see :class:`~.voter.Voter`.
    """

    phase: str
    weight: float | None = None
    failure: str | None = None
    orders: tuple[Repair, ...] = ()
    spans: tuple[SpanAveraged, ...] = ()
    accepted: tuple[int, Outcome] | None = None
    floor: int = 0
    casts: bool = False


class Accepted(Message, frozen=True):
    """The member accepts what was proposed. ``casts``: it has the founder's casting vote."""

    casts: bool = False


Question: TypeAlias = AskOutcome | Prepare | Propose
Answer: TypeAlias = NotKnown | Knows | Undecided | Refused | Promised | Accepted

ToOwner: TypeAlias = Contribute | DeclareWeight
ToLeader: TypeAlias = JoinRound | Report
FromLeader: TypeAlias = Excluded | Repair | Outcome
ToMember: TypeAlias = ReadyForParts | SpanAveraged

EXCHANGE: Method[ToOwner, ToMember] = Method("averaging.exchange", ToOwner, ToMember)  # type: ignore[arg-type]  # a union is no type
COMMIT: Method[ToLeader, FromLeader] = Method("averaging.commit", ToLeader, FromLeader)  # type: ignore[arg-type]
VOTE: Method[Question, Answer] = Method("averaging.vote", Question, Answer)  # type: ignore[arg-type]


def reason_text(text: str) -> str:
    """A reason as it is sent and shown: one printable line of bounded length."""
    return printable(text, MAX_REASON_CHARS)


def exclusion_text(text: str, size: int) -> str:
    """A reason for an exclusion in a group of ``size``: short enough that the whole list fits into a message."""
    return printable(text, max(1, min(MAX_REASON_CHARS, _EXCLUSION_CHARS // size)))


def is_weight(value: float) -> bool:
    """Whether a number can be a member's weight."""
    return 0 <= value <= MAX_WEIGHT


def add_up(values: Iterable[float | None]) -> float | None:
    """The sum, if all are known and it is finite."""
    total = 0.0
    for value in values:
        if value is None:
            return None
        total += value  # math.fsum raises where this becomes infinite
    return total if math.isfinite(total) else None
