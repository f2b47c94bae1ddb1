"""One round of butterfly all-reduce, as seen by one member: who owes which part to whom, and whether the
round commits.

Theory of operation
-------------------
The flat vector of a group is cut into spans, one an owner, and each span into parts (:mod:`.partition`).
Every contributor sends each owner its version of the owner's parts, in order; the owner averages a part once
every contributor has delivered it, and returns the average to every member (reduce-scatter and all-gather;
Thakur et al. 2005, "Optimization of collective communication operations in MPICH", section 4.4, with unequal
spans).

A round commits everywhere or nowhere. The leader coordinates, as in two-phase commit (Gray 1978, "Notes on
data base operating systems", section 5.8.3.3): a member that holds every average *reports ready* and from
then on may not give up by itself; the leader decides to commit when everybody is ready, and to fail the round
when somebody is lost or gives up before it was ready. A member that loses the leader while it is ready is
*orphaned*: it asks the others (the cooperative termination protocol of Bernstein, Hadzilacos and Goodman
1987, section 7.4). One that knows the outcome passes it on; if every member that can still be reached is
orphaned too, nobody can have learned that the round was committed, and it fails. A closed connection that
cannot be opened again counts as a death; what happens in a silent partition is bounded by the transport's
keep-alive.

This module is pure: no I/O, no clock. :meth:`AllReduce.handle` is its one mutating entry point; the shell is
:mod:`.round`.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import Enum, auto

from shoal.errors import AllreduceException, ProtocolViolation

HISTORY_LENGTH = 64


class Phase(Enum):
    """Where this member stands in the round."""

    EXCHANGING = auto()
    """Parts and averages are on their way; this member may still give up by itself."""
    READY = auto()
    """It holds every average, has said so, and waits for the outcome."""
    ORPHANED = auto()
    """It was ready when it lost the leader: it asks the others for the outcome."""
    COMMITTED = auto()
    FAILED = auto()


DECIDED = (Phase.COMMITTED, Phase.FAILED)

TRANSITIONS: dict[Phase, tuple[Phase, ...]] = {
    Phase.EXCHANGING: (Phase.READY, Phase.COMMITTED, Phase.FAILED),
    Phase.READY: (Phase.ORPHANED, Phase.COMMITTED, Phase.FAILED),
    Phase.ORPHANED: (Phase.COMMITTED, Phase.FAILED),
    Phase.COMMITTED: (),
    Phase.FAILED: (),
}
"""An exchanging leader commits without a step in between: its own readiness may be the last."""


# Events: what happened.


@dataclass(frozen=True)
class SnapshotTaken:
    """The own tensors lie in the arena: the own contribution to the own span counts as delivered."""


@dataclass(frozen=True)
class PartDelivered:
    """``sender`` delivered its version of the ``index``-th part of the own span."""

    sender: int
    index: int


@dataclass(frozen=True)
class PartAveraged:
    """The average of the ``index``-th part of the own span lies in the arena."""

    index: int


@dataclass(frozen=True)
class AverageReceived:
    """``owner`` returned the average of the ``index``-th part of its span, and it lies in the arena."""

    owner: int
    index: int


@dataclass(frozen=True)
class MemberReported:
    """To the leader: ``member`` is ready (``reason`` is None) or gives up because of ``reason``."""

    member: int
    reason: str | None = None


@dataclass(frozen=True)
class MemberLost:
    """The connection to ``member`` ended, or a stream of this round with it failed."""

    member: int
    reason: str


@dataclass(frozen=True)
class OutcomeReceived:
    """The leader's decision arrived; ``reason`` says why the round failed, None that it committed."""

    reason: str | None = None


@dataclass(frozen=True)
class OutcomeAnswered:
    """``member`` answered the question of an orphan; phase None: it cannot be reached, or no longer knows the
    round.
    """

    member: int
    phase: Phase | None
    reason: str = ""


@dataclass(frozen=True)
class Withdrawn:
    """This member cannot or will not go on: cancelled, a deadline passed, its tensors are not finite, ..."""

    reason: str


Event = (
    SnapshotTaken
    | PartDelivered
    | PartAveraged
    | AverageReceived
    | MemberReported
    | MemberLost
    | OutcomeReceived
    | OutcomeAnswered
    | Withdrawn
)


# Effects: what the shell has to do.


@dataclass(frozen=True)
class AveragePart:
    """Every contributor has delivered the ``index``-th part of the own span: average it."""

    index: int


@dataclass(frozen=True)
class ReturnAverage:
    """Send the average of the ``index``-th part of the own span to every other member."""

    index: int


@dataclass(frozen=True)
class ReportToLeader:
    """Tell the leader that this member is ready (``reason`` None), or why it gives up."""

    reason: str | None = None


@dataclass(frozen=True)
class AnnounceOutcome:
    """The leader's decision, for every other member."""

    reason: str | None = None


@dataclass(frozen=True)
class AskForOutcome:
    """Ask these members in which phase they are; each is asked once for each time that it is named."""

    members: tuple[int, ...]


@dataclass(frozen=True)
class Finish:
    """The round is decided for this member; ``reason`` None: committed."""

    reason: str | None = None


Effect = AveragePart | ReturnAverage | ReportToLeader | AnnounceOutcome | AskForOutcome | Finish


@dataclass(frozen=True)
class Roles:
    """Who is who in a round. Members are numbers: positions in the group's agreed order, the leader first.

    :param parts_owned: number of parts of each member's span (0: owns nothing)
    :param contributes: whether each member sends its tensors
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


@dataclass
class AllReduce:
    """The state of one member in one round."""

    roles: Roles
    phase: Phase = Phase.EXCHANGING
    failure: str | None = None
    _delivered: list[int] = field(default_factory=list)
    _received: list[int] = field(default_factory=list)
    _averaged: int = 0
    _snapshot_taken: bool = False
    _reported_loss: bool = False
    _ready: list[bool] = field(default_factory=list)
    _answers: dict[int, Phase | None] = field(default_factory=dict)
    _history: deque[str] = field(default_factory=lambda: deque(maxlen=HISTORY_LENGTH))

    def __post_init__(self) -> None:
        if not any(self.roles.contributes):
            raise AllreduceException("no member of the group contributes tensors: all of them only help")
        size = self.roles.size
        self._delivered, self._received, self._ready = [0] * size, [0] * size, [False] * size

    def handle(self, event: Event) -> list[Effect]:
        """Take in one event; return what has to be done, in order.

        :raises ProtocolViolation: the event is something that an honest peer would not have caused; the state
          is unchanged
        """
        self._history.append(f"{self.phase.name} {event}")
        match event:
            case SnapshotTaken():
                return self._on_snapshot()
            case PartDelivered(sender, index):
                return self._on_part(sender, index)
            case PartAveraged(index):
                return self._on_averaged(index)
            case AverageReceived(owner, index):
                return self._on_average(owner, index)
            case MemberReported(member, reason):
                return self._on_report(member, reason)
            case MemberLost(member, reason):
                return self._on_lost(member, reason)
            case OutcomeReceived(reason):
                return self._on_outcome(reason)
            case OutcomeAnswered(member, phase, reason):
                return self._on_answer(member, phase, reason)
            case Withdrawn(reason):
                return self._on_withdrawn(reason)

    def parts_missing_from(self, owner: int) -> int:
        """How many averages ``owner`` still has to return to this member."""
        have = self._averaged if owner == self.roles.me else self._received[owner]
        return self.roles.parts_owned[owner] - have

    # the exchange

    def _on_snapshot(self) -> list[Effect]:
        if self.phase is not Phase.EXCHANGING:
            return []
        self._snapshot_taken = True
        me = self.roles.me
        if not self.roles.contributes[me]:
            return self._advance(())
        before = self._complete_parts()
        self._delivered[me] = self.roles.parts_owned[me]
        return self._advance(range(before, self._complete_parts()))

    def _on_part(self, sender: int, index: int) -> list[Effect]:
        mine = self.roles.parts_owned[self.roles.me]
        if not self.roles.contributes[sender] or sender == self.roles.me:
            raise ProtocolViolation(f"{self.roles.name(sender)} sent a part, but contributes none")
        if index != self._delivered[sender] or index >= mine:
            raise ProtocolViolation(
                f"{self.roles.name(sender)} sent part {index} of {mine}, expected {self._delivered[sender]}"
            )
        before = self._complete_parts()
        self._delivered[sender] += 1
        return [
            AveragePart(part) for part in range(before, self._complete_parts()) if self.phase not in DECIDED
        ]

    def _on_averaged(self, index: int) -> list[Effect]:
        if index != self._averaged or index >= self._complete_parts():
            raise AssertionError(f"part {index} averaged out of turn: {list(self._history)}")
        self._averaged += 1
        if self.phase is not Phase.EXCHANGING:
            return []
        return [ReturnAverage(index), *self._advance(())]

    def _on_average(self, owner: int, index: int) -> list[Effect]:
        theirs = self.roles.parts_owned[owner]
        if index != self._received[owner] or index >= theirs or owner == self.roles.me:
            raise ProtocolViolation(
                f"{self.roles.name(owner)} returned part {index} of {theirs}, expected "
                f"{self._received[owner]}"
            )
        self._received[owner] += 1
        return self._advance(()) if self.phase is Phase.EXCHANGING else []

    def _complete_parts(self) -> int:
        """How many parts of the own span every contributor has delivered."""
        counts = [count for count, does in zip(self._delivered, self.roles.contributes, strict=True) if does]
        return min(counts, default=0)

    def _advance(self, complete: Sequence[int]) -> list[Effect]:
        effects: list[Effect] = [AveragePart(part) for part in complete]
        if self._snapshot_taken and not any(
            self.parts_missing_from(owner) for owner in range(self.roles.size)
        ):
            effects += self._become_ready()
        return effects

    # commit

    def _become_ready(self) -> list[Effect]:
        if self.roles.me == self.roles.leader:
            return self._on_report(self.roles.me, None)
        self._move_to(Phase.READY)
        return [ReportToLeader()]

    def _on_report(self, member: int, reason: str | None) -> list[Effect]:
        if self.roles.me != self.roles.leader:
            raise ProtocolViolation(f"{self.roles.name(member)} reported to a member that does not lead")
        if self.phase in DECIDED:
            return []
        if reason is not None:
            if self._ready[member]:
                raise ProtocolViolation(f"{self.roles.name(member)} gave up after it had reported ready")
            return self._decide(f"{self.roles.name(member)} gave up: {reason}")
        self._ready[member] = True
        return self._decide(None) if all(self._ready) else []

    def _decide(self, reason: str | None) -> list[Effect]:
        return [AnnounceOutcome(reason), *self._finish(reason)]

    def _on_lost(self, member: int, reason: str) -> list[Effect]:
        if self.phase in DECIDED:
            return []
        story = f"lost {self.roles.name(member)}: {reason}"
        if self.roles.me == self.roles.leader:
            return [] if self._ready[member] else self._decide(story)
        if self.phase is Phase.EXCHANGING and member == self.roles.leader:
            return self._give_up(story)
        if self.phase is Phase.EXCHANGING:
            return self._report_loss(story)
        if self.phase is Phase.READY and member == self.roles.leader:
            self._move_to(Phase.ORPHANED)
            self.failure = story
            return [AskForOutcome(self.roles.others)]
        return []

    def _report_loss(self, story: str) -> list[Effect]:
        """The round cannot commit any more; the leader, who may know better why, fails it for everybody alike."""
        if self._reported_loss:
            return []
        self._reported_loss = True
        return [ReportToLeader(story)]

    def _on_withdrawn(self, reason: str) -> list[Effect]:
        if self.phase is Phase.EXCHANGING and self.roles.me == self.roles.leader:
            return self._decide(f"the leader gave up: {reason}")
        # a member that is ready has given its word: only the outcome can free it
        return self._give_up(reason) if self.phase is Phase.EXCHANGING else []

    def _give_up(self, reason: str) -> list[Effect]:
        return [ReportToLeader(reason), *self._finish(reason)]

    def _on_outcome(self, reason: str | None) -> list[Effect]:
        if self.roles.me == self.roles.leader:
            raise ProtocolViolation("the leader was sent an outcome")
        if self.phase in DECIDED:
            return []
        if reason is None and self.phase is Phase.EXCHANGING:
            raise ProtocolViolation("the leader committed a round before this member was ready")
        return self._finish(reason)

    def _on_answer(self, member: int, phase: Phase | None, reason: str) -> list[Effect]:
        if self.phase is not Phase.ORPHANED:
            return []
        if phase is Phase.COMMITTED:
            return self._finish(None)
        if phase is Phase.FAILED:
            return self._finish(reason or self.failure)
        if phase in (Phase.EXCHANGING, Phase.READY):
            return [AskForOutcome((member,))]
        # an orphan that answers has given its word to learn the outcome from others only
        self._answers[member] = phase
        if len(self._answers) < len(self.roles.others):
            return []
        return self._finish(f"{self.failure}; no member that can be reached knows of a decision")

    def _finish(self, reason: str | None) -> list[Effect]:
        self._move_to(Phase.COMMITTED if reason is None else Phase.FAILED)
        self.failure = reason
        return [Finish(reason)]

    def _move_to(self, phase: Phase) -> None:
        if phase not in TRANSITIONS[self.phase]:
            raise AssertionError(f"{self.phase.name} -> {phase.name} is no transition: {list(self._history)}")
        self.phase = phase
