"""What can happen in a round of all-reduce, and what has to be done then: the words of :mod:`.core`. Pure.

Events are in the past tense, effects in the imperative. Members are numbers: positions in the group's agreed order,
the leader first.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum, auto

from shoal.averaging.allreduce.messages import Excluded, Loss, Outcome, Report
from shoal.sansio.core import TimePassed


class Phase(Enum):
    """Where this member stands in the round; names are sent on the wire."""

    EXCHANGING = auto()
    """Parts and averages are on their way; this member may still give up by itself."""
    EXCLUDED = auto()
    """It knows that it will not commit, and serves the averages of its span until the group is decided."""
    READY = auto()
    """It holds every average, has said so, and waits for the outcome."""
    ORPHANED = auto()
    """It was ready when it lost the leader, or only helps and had averaged its span: it asks for the outcome."""
    COMMITTED = auto()
    FAILED = auto()


DECIDED = (Phase.COMMITTED, Phase.FAILED)

TRANSITIONS: dict[Phase, tuple[Phase, ...]] = {
    Phase.EXCHANGING: (Phase.READY, Phase.EXCLUDED, Phase.ORPHANED, Phase.COMMITTED, Phase.FAILED),
    Phase.EXCLUDED: (Phase.FAILED,),
    Phase.READY: (Phase.ORPHANED, Phase.EXCLUDED, Phase.COMMITTED, Phase.FAILED),
    Phase.ORPHANED: (Phase.COMMITTED, Phase.FAILED),
    Phase.COMMITTED: (),
    Phase.FAILED: (),
}
"""An exchanging leader commits without a step in between, since its own readiness may be the last; and so does an
auxiliary member, which has nothing to be ready with. Such a one becomes an orphan without having been ready, too.
"""


@dataclass(frozen=True)
class RoundTimeouts:
    """Limits in seconds; None: no limit.

    :param allreduce: for the whole exchange, from a member's own snapshot on
    :param sender: for which an owner waits for a sender's next part, before it goes on without that sender
    :param reducer: for which a member waits for an owner's next average, before the round fails
    """

    allreduce: float | None = None
    sender: float | None = None
    reducer: float | None = None


@dataclass(frozen=True)
class Roles:
    """Who is who in a round.

    :param parts_owned: number of parts of each member's span (0: owns nothing)
    :param contributes: whether each member takes part with its tensors; False for those that only help
    """

    me: int
    parts_owned: tuple[int, ...]
    contributes: tuple[bool, ...]
    names: tuple[str, ...] = ()
    leader: int = 0

    @property
    def size(self) -> int:
        return len(self.parts_owned)

    @property
    def others(self) -> tuple[int, ...]:
        return tuple(member for member in range(self.size) if member != self.me)

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
    """``sender`` said with which weight it contributes."""

    sender: int
    weight: float


@dataclass(frozen=True)
class SenderHeld:
    """The shell takes no more from ``sender`` for now, which is ahead: its clock stands still."""

    sender: int


@dataclass(frozen=True)
class SenderAwaited:
    """The shell takes from ``sender`` again."""

    sender: int


@dataclass(frozen=True)
class PartDelivered:
    """``sender`` delivered its version of the ``index``-th part of the own span."""

    sender: int
    index: int


@dataclass(frozen=True)
class PartAveraged:
    """The average of the ``index``-th part of the own span lies in the arena.

    With the last one: how far apart the senders were; see :class:`~.messages.SpanAveraged`.
    """

    index: int
    square_distance: float | None = None
    square_average: float | None = None


@dataclass(frozen=True)
class SenderLost:
    """Nothing more can come from ``sender``: its stream ended, it broke the protocol, it sent NaN."""

    sender: int
    reason: str


@dataclass(frozen=True)
class ExchangeOpened:
    """``owner`` takes this member's parts from now on."""

    owner: int


@dataclass(frozen=True)
class PartSent:
    """This member's version of the ``index``-th part of ``owner``'s span was handed to the network."""

    owner: int
    index: int


@dataclass(frozen=True)
class AverageReceived:
    """``owner`` returned the average of the ``index``-th part of its span, and it lies in the arena."""

    owner: int
    index: int


@dataclass(frozen=True)
class OwnerLost:
    """Nothing more can come from ``owner``: it could not be dialed, its stream ended, or what it sent was wrong."""

    owner: int
    reason: str
    loss: Loss = Loss.BROKEN


@dataclass(frozen=True)
class ExcludedByOwner:
    """``owner`` goes on without this member."""

    owner: int
    reason: str


@dataclass(frozen=True)
class MemberLost:
    """To the leader: the connection to ``member`` ended, or its stream of reports. To the others: that to the leader
    did. Streams of parts end for themselves.
    """

    member: int
    reason: str


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
    """The leader says that the round goes on without a member, possibly this one."""

    excluded: Excluded


@dataclass(frozen=True)
class OutcomeReceived:
    """The leader's decision arrived, from the leader itself."""

    outcome: Outcome


@dataclass(frozen=True)
class OutcomeAnswered:
    """``member`` answered the question of an orphan. ``outcome``: the leader's decision, if it knows that. Phase None:
    it cannot be reached, or does not know the round.
    """

    member: int
    phase: Phase | None
    outcome: Outcome | None = None


@dataclass(frozen=True)
class ExchangeBegan:
    """The leader's own exchange has begun: what it notes of others counts its seconds from here."""


@dataclass(frozen=True)
class Withdrawn:
    """This member cannot or will not go on, and serves nobody any more: cancelled, a deadline passed, ..."""

    reason: str


OwnerEvent = WeightDeclared | SenderHeld | SenderAwaited | PartDelivered | PartAveraged | SenderLost
SenderEvent = ExchangeOpened | PartSent | AverageReceived | OwnerLost | ExcludedByOwner
MemberEvent = (
    MemberLost | JoinTimedOut | MemberReported | ExclusionReceived | OutcomeReceived | OutcomeAnswered
)
Event = OwnerEvent | SenderEvent | MemberEvent | SnapshotTaken | SnapshotFailed | TimePassed | Withdrawn


# Effects: what the shell has to do.


@dataclass(frozen=True)
class AveragePart:
    """Everybody who is waited for has delivered the ``index``-th part of the own span: average what there is."""

    index: int


@dataclass(frozen=True)
class ReturnAverage:
    """Send the average of the ``index``-th part of the own span to every other member."""

    index: int


@dataclass(frozen=True)
class DropSender:
    """Take nothing more from ``sender``, and tell it why."""

    sender: int
    reason: str
    is_silent: bool = field(default=False, compare=False)
    """This member has waited for its first part in vain."""


@dataclass(frozen=True)
class StopContributing:
    """Send no more parts, and take no more averages: this member will not commit."""


@dataclass(frozen=True)
class TellLeader:
    """Send the leader this report."""

    report: Report


@dataclass(frozen=True)
class AnnounceExclusion:
    """The leader's word, for every other member."""

    excluded: Excluded


@dataclass(frozen=True)
class AnnounceOutcome:
    """The leader's decision, for every other member."""

    outcome: Outcome


@dataclass(frozen=True)
class AskForOutcome:
    """Ask these members what they know of the decision; each is asked once for each time that it is named."""

    members: tuple[int, ...]


@dataclass(frozen=True)
class Finish:
    """The round is over for this member; ``reason`` None: committed."""

    reason: str | None = None


Effect = (
    AveragePart
    | ReturnAverage
    | DropSender
    | StopContributing
    | TellLeader
    | AnnounceExclusion
    | AnnounceOutcome
    | AskForOutcome
    | Finish
)
