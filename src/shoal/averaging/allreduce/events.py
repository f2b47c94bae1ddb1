"""What can happen in a round of all-reduce: the words that :mod:`.core` hears. Pure.

Events are in the past tense; what has to be done then is in :mod:`.effects`. Members are numbers: positions in the
group's agreed order, the founding leader first.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum, auto

from shoal.averaging.allreduce.assignment import Repair, SpanId
from shoal.averaging.allreduce.messages import Answer, Excluded, Loss, Outcome, Report, SpanAveraged
from shoal.sansio.core import NEVER, TimePassed


class Phase(Enum):
    """Where this member stands in the round; names are sent on the wire."""

    EXCHANGING = auto()
    """Parts and averages are on their way; this member may still give up by itself."""
    EXCLUDED = auto()
    """It knows that it will not commit, serves the averages of its span, and votes, until the group is decided."""
    READY = auto()
    """It holds every average, has said so, and waits for the outcome."""
    COMMITTED = auto()
    FAILED = auto()
    IN_DOUBT = auto()
    """It was ready, and cannot learn the outcome: others may have committed."""


DECIDED = (Phase.COMMITTED, Phase.FAILED)
OVER = (*DECIDED, Phase.IN_DOUBT)
"""Phases in which this member waits for nothing."""

TRANSITIONS: dict[Phase, tuple[Phase, ...]] = {
    Phase.EXCHANGING: (Phase.READY, Phase.EXCLUDED, Phase.COMMITTED, Phase.FAILED, Phase.IN_DOUBT),
    Phase.EXCLUDED: (Phase.FAILED, Phase.IN_DOUBT),
    Phase.READY: (Phase.EXCHANGING, Phase.EXCLUDED, Phase.COMMITTED, Phase.FAILED, Phase.IN_DOUBT),
    Phase.COMMITTED: (),
    Phase.FAILED: (),
    Phase.IN_DOUBT: (Phase.COMMITTED, Phase.FAILED),
}
"""A ready member exchanges again when a span was repaired. An auxiliary member commits without having been ready: it
has nothing to be ready with. So has an excluded leader: both come to be in doubt if they lead, and propose to commit.
What a member in doubt learns later, from another one's answer, ends its doubt.
"""


class Lead(Enum):
    """How this member stands to the leader of its term."""

    FOLLOWING = auto()
    """It hears the leader, or has just promised to."""
    LEADING = auto()
    LEADERLESS = auto()
    """It lost the leader: it asks the others what they know, and waits for its turn to lead."""
    CANDIDATE = auto()
    """It has asked the others for their promises."""


LEAD_TRANSITIONS: dict[Lead, tuple[Lead, ...]] = {
    Lead.FOLLOWING: (Lead.LEADERLESS, Lead.FOLLOWING),
    Lead.LEADING: (Lead.LEADERLESS, Lead.FOLLOWING),
    Lead.LEADERLESS: (Lead.CANDIDATE, Lead.FOLLOWING),
    Lead.CANDIDATE: (Lead.LEADING, Lead.LEADERLESS, Lead.FOLLOWING),
}
"""A member that promises a higher term follows its leader, whatever it did before."""


LEADER_PATIENCE = 60.0
"""Seconds after ``reducer_timeout``, by which the leader has gone on without a member that does nothing."""


@dataclass(frozen=True)
class AdaptedDeadlines:
    """Limits in seconds that follow from recent rounds (:mod:`.deadlines`); infinite: nothing is known.

    :param offset: by which a sender's first part may come later than those of half of the group
    :param part: for which an owner waits for a further part of a sender
    """

    offset: float = NEVER
    part: float = NEVER


@dataclass(frozen=True)
class RoundTimeouts:
    """Limits in seconds; None: no limit.

    :param allreduce: for the whole exchange, from a member's own snapshot on
    :param sender: for which an owner waits for a sender's next part, before it goes on without that sender
    :param reducer: for which a member waits for an owner's next average, before the span is given to others
    :param leader: for which a member that is ready waits for a leader that lives, before it looks for another one
    :param doubt: for which a member that lost the leader when it was ready tries to learn the outcome
    :param adapted: deadlines below that for senders, which exclude a member only while enough others are in time
    :param each_part: that a sender's parts may take on the average, beside ``sender`` once: one that sends each of its
      parts in time may take too long in all
    """

    allreduce: float | None = None
    sender: float | None = None
    reducer: float | None = None
    leader: float = 120.0
    doubt: float = 60.0
    adapted: AdaptedDeadlines = AdaptedDeadlines()
    each_part: float | None = None

    @classmethod
    def of(
        cls, allreduce: float | None, sender: float, reducer: float, each_part: float | None = None
    ) -> RoundTimeouts:
        """Those of a round in which the leader gives up a member that does nothing before others give up the leader."""
        leader = max(cls.leader, reducer + LEADER_PATIENCE)
        return cls(allreduce, sender, reducer, leader=leader, each_part=each_part)


@dataclass(frozen=True)
class Roles:
    """Who is who in a round.

    :param parts_owned: number of parts of each member's first span (0: owns nothing)
    :param contributes: whether each member takes part with its tensors; False for those that only help
    :param can_serve: whether each member can be reached by all others, and so may own spans and lead; empty: all of
      them
    :param min_size: members that must be left for the round to commit
    """

    me: int
    parts_owned: tuple[int, ...]
    contributes: tuple[bool, ...]
    names: tuple[str, ...] = ()
    can_serve: tuple[bool, ...] = ()
    min_size: int = 1

    @property
    def size(self) -> int:
        return len(self.parts_owned)

    @property
    def others(self) -> tuple[int, ...]:
        return tuple(member for member in range(self.size) if member != self.me)

    def serves(self, member: int) -> bool:
        """Whether a member may own spans and lead."""
        return not self.can_serve or self.can_serve[member]

    def can_talk(self, one: int, other: int) -> bool:
        """Whether there can be a way between two members. Between two clients there never is, though both live."""
        return self.serves(one) or self.serves(other)

    def name(self, member: int) -> str:
        """How a member is called in reasons."""
        return self.names[member] if self.names else f"member {member}"


# Events: what happened.


@dataclass(frozen=True)
class SnapshotTaken:
    """The own tensors lie in the arena, and their weight is final: the own contribution to the own span counts as
    delivered.
    """

    weight: float


@dataclass(frozen=True)
class SnapshotFailed:
    """This member has nothing to contribute; it can still serve its span."""

    reason: str


@dataclass(frozen=True)
class WeightDeclared:
    """``sender`` said with which weight it contributes to a span of this owner."""

    span: SpanId
    sender: int
    weight: float


@dataclass(frozen=True)
class SenderHeld:
    """The shell takes no more from ``sender`` for now, which is ahead: its clock stands still."""

    span: SpanId
    sender: int


@dataclass(frozen=True)
class SenderAwaited:
    """The shell takes from ``sender`` again."""

    span: SpanId
    sender: int


@dataclass(frozen=True)
class PartDelivered:
    """``sender`` delivered its version of the ``index``-th part of an own span."""

    span: SpanId
    sender: int
    index: int


@dataclass(frozen=True)
class PartAveraged:
    """The average of the ``index``-th part of an own span lies in the arena.

    With the last one: how far apart the senders were; see :class:`~.messages.SpanAveraged`.
    """

    span: SpanId
    index: int
    square_distance: float | None = None
    square_average: float | None = None


@dataclass(frozen=True)
class SenderLost:
    """Nothing more can come from ``sender`` for a span: its stream ended, it broke the protocol, it sent NaN.

    Only its first ``kept`` parts are in the average; None: all that it delivered.
    """

    span: SpanId
    sender: int
    reason: str
    loss: Loss = Loss.BROKEN
    kept: int | None = None


@dataclass(frozen=True)
class ExchangeOpened:
    """The owner of a span takes this member's parts from now on."""

    span: SpanId


@dataclass(frozen=True)
class PartSent:
    """This member's version of the ``index``-th part of a span was handed to the network."""

    span: SpanId
    index: int


@dataclass(frozen=True)
class AverageReceived:
    """The owner returned the average of the ``index``-th part of a span, and it lies in the arena."""

    span: SpanId
    index: int


@dataclass(frozen=True)
class SpanReceived:
    """After the last average of a span: what its owner says of it."""

    report: SpanAveraged


@dataclass(frozen=True)
class OwnerLost:
    """No more averages of a span can come: its owner could not be dialed, the stream ended, or what came was wrong."""

    span: SpanId
    reason: str
    loss: Loss = Loss.BROKEN


@dataclass(frozen=True)
class ExcludedByOwner:
    """The owner of a span goes on without this member."""

    span: SpanId
    reason: str


@dataclass(frozen=True)
class MemberLost:
    """The connection to ``member`` ended, or the stream of reports and words with it. Streams of parts end for
    themselves.
    """

    member: int
    reason: str


@dataclass(frozen=True)
class MemberLeft:
    """``member`` said that its process ends: nothing comes from it any more."""

    member: int


@dataclass(frozen=True)
class VoteHandedOn:
    """The founding leader leaves, and hands on its casting vote to this member."""


@dataclass(frozen=True)
class JoinTimedOut:
    """To the leader: ``member`` has not joined the round in time, or never will."""

    member: int
    reason: str


@dataclass(frozen=True)
class MemberReported:
    """To the leader: a member's report."""

    member: int
    report: Report


@dataclass(frozen=True)
class ExclusionReceived:
    """The leader of ``term`` says that the round goes on without a member, possibly this one."""

    excluded: Excluded
    term: int = 0


@dataclass(frozen=True)
class RepairReceived:
    """The leader of ``term`` assigned spans anew."""

    order: Repair
    term: int = 0


@dataclass(frozen=True)
class OutcomeReceived:
    """The decision arrived, from a leader to which a quorum accepted it."""

    outcome: Outcome


@dataclass(frozen=True)
class PromiseAsked:
    """``member`` lost the leader and wants to lead, in ``term``; a :class:`Reply` is due.

    ``floor``: no decision of a lower term was made, or ever will be. 0: nothing is known.
    """

    member: int
    term: int
    floor: int = 0


@dataclass(frozen=True)
class AcceptanceAsked:
    """``member`` leads in ``term`` and proposes how the round ends; a :class:`Reply` is due."""

    member: int
    term: int
    outcome: Outcome


@dataclass(frozen=True)
class MemberAnswered:
    """``member`` answered a question; None: it could not be reached.

    :param term: of the promise or acceptance that it was asked for; None: it was asked for the outcome alone
    :param is_dead: nobody has listened at its address for a while: its process seems to have ended
    :param burials: how many members had been found dead when it was asked
    """

    member: int
    term: int | None
    answer: Answer | None
    is_dead: bool = False
    burials: int = 0


@dataclass(frozen=True)
class ExchangeBegan:
    """The leader's own exchange has begun: what it notes of others counts its seconds from here."""


@dataclass(frozen=True)
class Withdrawn:
    """This member cannot or will not go on, and serves nobody any more: cancelled, a deadline passed, ...

    ``leaves``: its vote ends, too, since its averager or its process does.
    """

    reason: str
    leaves: bool = False


OwnerEvent = WeightDeclared | SenderHeld | SenderAwaited | PartDelivered | PartAveraged | SenderLost
SenderEvent = ExchangeOpened | PartSent | AverageReceived | SpanReceived | OwnerLost | ExcludedByOwner
MemberEvent = (
    MemberLost
    | MemberLeft
    | VoteHandedOn
    | JoinTimedOut
    | MemberReported
    | ExclusionReceived
    | RepairReceived
    | OutcomeReceived
)
VoteEvent = PromiseAsked | AcceptanceAsked | MemberAnswered
Event = (
    OwnerEvent
    | SenderEvent
    | MemberEvent
    | VoteEvent
    | SnapshotTaken
    | SnapshotFailed
    | TimePassed
    | Withdrawn
)
