"""One round of butterfly all-reduce, as seen by one member: who owes which part to whom, who is excluded, and
whether the round commits.

Theory of operation
-------------------
The flat vector of a group is cut into spans, one an owner, and each span into parts (:mod:`shoal.averaging.partition`).
Every contributor sends each owner its weight and its version of the owner's parts, in order; the owner averages a
part once everybody it waits for has delivered it, and returns the average to every member (reduce-scatter and
all-gather; Thakur et al. 2005, "Optimization of collective communication operations in MPICH", section 4.4, with
unequal spans).

A sender that stalls, is lost or breaks the protocol is excluded by the owner that notices: the parts that it has not
delivered are averaged over the weights that did arrive. The owner tells the leader, and the leader everybody. A
member that is excluded and lives stands aside: it will not commit, but serves the averages of its span until the
group is decided. The clock of a sender runs while the owner waits for its next part: not before the owner's own
snapshot, not while the owner holds it back because others are slower, and not while the owner itself is late. The
clock of an owner runs while everything that its next average needs of this member was sent. An owner whose averages
others still need cannot be excluded: the round fails. When everything has been averaged, the leader's clocks run for
members that are not ready, since each last said that it has taken a further average.

A round commits everywhere or nowhere. The leader decides (:mod:`.coordination`), as in two-phase commit (Gray 1978,
"Notes on data base operating systems", section 5.8.3.3): a member that holds every average *reports ready* and from
then on may not give up by itself; the round commits when every member that is not excluded is ready. A member that
loses the leader while it is ready is *orphaned*: it asks the others (the cooperative termination protocol of
Bernstein, Hadzilacos and Goodman 1987, section 7.4). One that knows the leader's decision passes it on; if no member
that can still be reached knows it, the round fails.

Why no two members end differently, excluded ones aside:

1. Nobody commits without the leader's decision, and there is one: the leader decides once.
2. If it is to commit, every member that is not excluded was ready when it was made, and a ready member ends in three
   ways only: by the decision, by the notice that it is excluded (which the leader gives to no member whose report of
   readiness it has), or as an orphan.
3. An orphan commits if anybody tells it of the decision. It fails when each other member is gone, or has said that it
   is an orphan too, or that it ended without knowing the decision. Whoever has said one of these can learn the
   decision later only from another member's answer: orphans do not listen to the leader any more, and members that
   gave up do not listen at all. Whoever may still hear from the leader (exchanging, excluded or ready) is asked again.
   One that is gone may have told an orphan, after that orphan's answer, and then died: so when somebody turned out to
   be gone, all orphans are asked once more, until nobody is newly gone. Then none of them knew the decision when that
   last inquiry began, nobody else does, and none will: all of them fail.
   Two members that own nothing may not reach each other (both are clients), but every owner reaches everybody:
   whoever owns nothing asks owners that are orphans until they are decided, and owners wait for nobody so. This takes
   an owner that lives and is to commit, or an auxiliary one that has averaged its span, and becomes an orphan with the
   others. An owner that is excluded gives up with the leader, and asks nobody.
4. A member that fails by itself, because it was excluded, gave up or was never ready, has never given its word: the
   leader cannot have counted it. That is its own failure and not the group's: to an orphan it answers that it knows
   of no decision; an excluded leader, or member, that knows the decision passes that on.

A member that an orphan cannot reach counts as dead only after a while (see :mod:`.commit`): in a silent partition, that
long after the transport's keep-alive has noticed.

This module is pure: no I/O; the time is an argument. :meth:`AllReduce.handle` is its one mutating entry point; the
shell is :mod:`.round`.
"""

from __future__ import annotations

import math

from shoal.averaging.allreduce.books import Collection, Returns
from shoal.averaging.allreduce.coordination import PROGRESS_INTERVAL, Coordinator, CoordinatorEvent
from shoal.averaging.allreduce.events import (
    DECIDED,
    TRANSITIONS,
    AnnounceExclusion,
    AnnounceOutcome,
    AskForOutcome,
    AveragePart,
    AverageReceived,
    DropSender,
    Effect,
    Event,
    ExchangeBegan,
    ExchangeOpened,
    ExcludedByOwner,
    ExclusionReceived,
    Finish,
    JoinTimedOut,
    MemberEvent,
    MemberLost,
    MemberReported,
    OutcomeAnswered,
    OutcomeReceived,
    OwnerEvent,
    OwnerLost,
    PartAveraged,
    PartDelivered,
    PartSent,
    Phase,
    ReturnAverage,
    Roles,
    RoundTimeouts,
    SenderAwaited,
    SenderEvent,
    SenderHeld,
    SenderLost,
    SnapshotFailed,
    SnapshotTaken,
    StopContributing,
    TellLeader,
    WeightDeclared,
    Withdrawn,
)
from shoal.averaging.allreduce.messages import (
    AveragesReceived,
    Excluded,
    GaveUp,
    Loss,
    Outcome,
    OwnerFailed,
    Ready,
    Report,
    SenderExcluded,
    SpanAveraged,
    StandsAside,
    reason_text,
)
from shoal.errors import AllreduceException, ProtocolViolation
from shoal.sansio.core import NEVER, TimePassed
from shoal.sansio.machine import Machine

CATCH_UP = 1.0
"""Seconds that a process which was stopped, or busy, takes to read what has arrived meanwhile."""
NO_LIMITS = RoundTimeouts()
SERVING = (Phase.EXCHANGING, Phase.EXCLUDED)
"""While the own span may still have to be averaged: a member that is ready has done that."""


class AllReduce:
    """The state of one member in one round.

    ``failure`` is why this member failed, ``outcome`` the leader's decision as far as it is known here: an excluded
    member fails in a round that commits for others.
    """

    def __init__(self, roles: Roles, timeouts: RoundTimeouts = NO_LIMITS) -> None:
        if not any(roles.contributes):
            raise AllreduceException("no member of the group contributes tensors: all of them only help")
        self.roles = roles
        self._machine = Machine(Phase.EXCHANGING, TRANSITIONS)
        self.failure: str | None = None
        self.outcome: Outcome | None = None
        self.collection = Collection(roles, timeouts.sender)
        self._contributes = roles.contributes[roles.me]
        self._coordinator = Coordinator(roles, timeouts.reducer) if roles.me == roles.leader else None
        self._began: float | None = None
        self.returns = Returns(roles, timeouts.reducer)
        self._progress_told = -math.inf
        self._failed_owners: set[int] = set()
        self._answers: dict[int, Phase | None] = {}
        self._lost_some = False
        """Whether somebody did not answer, since the orphans that did were asked."""

    @property
    def phase(self) -> Phase:
        """Where this member stands."""
        return self._machine.state

    def handle(self, event: Event, now: float) -> list[Effect]:
        """Take in one event; return what has to be done, in order.

        :param now: seconds of any steady clock, the same one for all events
        :raises ProtocolViolation: the event is something that an honest peer would not have caused; the state
          is unchanged
        """
        self._machine.note(event, now)
        match event:
            case SnapshotTaken(weight):
                return self._on_snapshot(weight, now)
            case SnapshotFailed(reason):
                return self._stand_aside("snapshot", reason, now) if self.phase is Phase.EXCHANGING else []
            case TimePassed(late):
                return self._on_time(late, now)
            case Withdrawn(reason):
                return self._on_withdrawn(reason, now)
            case (
                WeightDeclared()
                | SenderHeld()
                | SenderAwaited()
                | PartDelivered()
                | PartAveraged()
                | SenderLost()
            ):
                return self._as_owner(event, now)
            case ExchangeOpened() | PartSent() | AverageReceived() | OwnerLost() | ExcludedByOwner():
                return self._as_sender(event, now)
            case _:
                return self._as_member(event, now)

    def _as_owner(self, event: OwnerEvent, now: float) -> list[Effect]:
        match event:
            case WeightDeclared(sender, weight):
                self.collection.declare(sender, weight)
            case SenderHeld(sender):
                self.collection.hold(sender)
            case SenderAwaited(sender):
                self.collection.resume(sender, now)
            case PartDelivered(sender, index):
                self.collection.deliver(sender, index, now)
            case PartAveraged():
                return self._on_averaged(event, now)
            case SenderLost(sender, reason):
                return self._on_sender_lost(sender, reason, now)
        return self._release()

    def _as_sender(self, event: SenderEvent, now: float) -> list[Effect]:
        match event:
            case ExchangeOpened(owner):
                self.returns.open(owner, now)
            case PartSent(owner, index):
                self.returns.send(owner, index, now)
            case AverageReceived(owner, index):
                self.returns.receive(owner, index, now)
                return self._advance(now) or self._tell_progress(now)
            case OwnerLost(owner, reason, loss):
                return self._on_owner_lost(owner, reason, loss, now)
            case ExcludedByOwner(owner, reason) if self.phase is Phase.EXCHANGING:
                return self._stand_aside("exchange", f"excluded by {self.roles.name(owner)}: {reason}", now)
        return []

    def _as_member(self, event: MemberEvent, now: float) -> list[Effect]:
        match event:
            case MemberLost(member, reason):
                return self._on_lost(member, reason, now)
            case JoinTimedOut() | MemberReported():
                return self._coordinate(event, now)
            case ExclusionReceived(excluded):
                return self._on_exclusion(excluded, now)
            case OutcomeReceived(outcome):
                return self._on_outcome(outcome)
            case OutcomeAnswered(member, phase, known):
                return self._on_answer(member, phase, known)

    @property
    def deadline(self) -> float:
        """When :class:`TimePassed` is due, if nothing else happens before."""
        if self.phase not in SERVING:
            return NEVER
        awaited = NEVER if self._coordinator is None else self._coordinator.deadline
        return min(self.collection.clocks.deadline, self.returns.clocks.deadline, awaited)

    # as an owner

    def _on_snapshot(self, weight: float, now: float) -> list[Effect]:
        if self.phase is not Phase.EXCHANGING:
            return []
        if self._contributes:
            self.returns.begin(weight, now)
        self._settle(weight if self._contributes else None, now)
        return [*self._release(), *self._advance(now)]

    def _settle(self, weight: float | None, now: float) -> None:
        self._began = now
        if self._coordinator is not None:
            self._coordinator.handle(ExchangeBegan(), now)
        self.collection.settle(weight, now)

    def _release(self) -> list[Effect]:
        return [AveragePart(part) for part in self.collection.release()] if self.phase in SERVING else []

    def _on_averaged(self, event: PartAveraged, now: float) -> list[Effect]:
        if self.phase not in SERVING:
            return []
        self.collection.average(event.index)
        effects: list[Effect] = [ReturnAverage(event.index)]
        if self.collection.is_averaged:
            weights = tuple(self.collection.weights)
            effects += self._tell(SpanAveraged(weights, event.square_distance, event.square_average), now)
        return [*effects, *self._advance(now)]

    def _on_sender_lost(
        self, sender: int, reason: str, now: float, *, is_silent: bool = False
    ) -> list[Effect]:
        if not self._takes_from(sender) or sender == self.roles.me:
            return []  # whoever still waits for averages notices by itself
        dropped = self._drop(sender, reason, is_silent=is_silent)
        return [*dropped, *self._tell(SenderExcluded(sender, reason_text(reason)), now)]

    def _takes_from(self, sender: int) -> bool:
        """Whether this owner still counts on a member's part in the exchange."""
        book = self.collection
        if self.phase not in SERVING or book.is_averaged:
            return False
        return self.roles.contributes[sender] and sender not in book.dropped

    def _drop(self, sender: int, reason: str, *, is_silent: bool = False) -> list[Effect]:
        self.collection.drop(sender, reason)
        return [DropSender(sender, reason, is_silent), *self._release()]

    # as a member

    def _on_owner_lost(self, owner: int, reason: str, loss: Loss, now: float) -> list[Effect]:
        if self.phase is not Phase.EXCHANGING or not self.returns.missing_from(owner):
            return []
        if owner in self._failed_owners:
            return []
        self._failed_owners.add(owner)
        self.returns.clocks.stop(owner)
        if owner == self.roles.leader and loss is not Loss.TIMED_OUT:
            return self._give_up(f"lost {self.roles.name(owner)}: {reason}")
        return self._tell(OwnerFailed(owner, reason_text(reason), loss), now)

    def _advance(self, now: float) -> list[Effect]:
        """Become ready, if this member has contributed and holds every average."""
        weight = self.collection.weights[self.roles.me]
        if self.phase is not Phase.EXCHANGING or not self._contributes or weight is None:
            return []
        if not (self.collection.is_averaged and self.returns.is_complete):
            return []
        if self._coordinator is None:
            self._move_to(Phase.READY)
        return self._tell(Ready(weight), now)

    def _tell_progress(self, now: float) -> list[Effect]:
        """Let the leader know, now and then, that this member is not stuck."""
        is_due = now - self._progress_told >= PROGRESS_INTERVAL
        if self._coordinator is not None or self.phase is not Phase.EXCHANGING or not is_due:
            return []
        if self.returns.is_complete:
            return []
        self._progress_told = now
        return [TellLeader(AveragesReceived(self.returns.received))]

    def _on_time(self, late: float, now: float) -> list[Effect]:
        uncounted = late + CATCH_UP if late else 0.0
        self.collection.clocks.shift(uncounted)
        self.returns.clocks.shift(uncounted)
        effects: list[Effect] = []
        for sender in self.collection.clocks.expired(now):
            begun = self.collection.delivered_by(sender)
            what = "no further part, or took no average," if begun else "no part"
            reason = f"it sent {what} within sender_timeout={self.collection.clocks.timeout:g} s"
            effects += self._on_sender_lost(sender, reason, now, is_silent=not begun)
        for owner in self.returns.clocks.expired(now):
            reason = f"it returned no average within reducer_timeout={self.returns.clocks.timeout:g} s"
            effects += self._on_owner_lost(owner, reason, Loss.TIMED_OUT, now)
        if self._coordinator is not None:
            effects += self._coordinate(TimePassed(uncounted), now)
        return effects

    # exclusion

    def _stand_aside(self, phase: str, reason: str, now: float, *, by_leader: bool = False) -> list[Effect]:
        """This member will not commit. It goes on to serve its span; without one, it is done."""
        if self._coordinator is None and not self.collection.count:
            return [TellLeader(StandsAside(phase, reason_text(reason))), *self._finish(reason)]
        self._move_to(Phase.EXCLUDED)
        self.failure = reason
        effects: list[Effect] = [StopContributing()]
        self.returns.clocks.clear()
        if self._began is None:
            self._settle(None, now)
            effects += self._release()
        return effects if by_leader else [*effects, *self._tell(StandsAside(phase, reason_text(reason)), now)]

    def _on_exclusion(self, excluded: Excluded, now: float) -> list[Effect]:
        """The leader's word: nobody waits any more for what this member has not delivered."""
        member, reason = excluded.member, excluded.reason
        if member == self.roles.me:
            waiting = self.phase in (Phase.EXCHANGING, Phase.READY)
            return self._stand_aside(excluded.phase, reason, now, by_leader=True) if waiting else []
        return self._drop(member, reason) if self._takes_from(member) else []

    # commit

    def _tell(self, report: Report, now: float) -> list[Effect]:
        if self._coordinator is None:
            return [TellLeader(report)]
        return self._coordinate(MemberReported(self.roles.me, report), now)

    def _coordinate(self, event: CoordinatorEvent, now: float) -> list[Effect]:
        """What the leader announces holds for itself too."""
        if self._coordinator is None:
            raise ProtocolViolation("a member reported to one that does not lead")
        effects: list[Effect] = []
        for announcement in self._coordinator.handle(event, now):
            effects.append(announcement)
            match announcement:
                case AnnounceExclusion(excluded):
                    effects += self._on_exclusion(excluded, now)
                case AnnounceOutcome(outcome):
                    effects += self._conclude(outcome)
        return effects

    def _on_lost(self, member: int, reason: str, now: float) -> list[Effect]:
        if self._coordinator is not None:
            return self._coordinate(MemberLost(member, reason), now)
        if member == self.roles.leader:
            return self._on_leader_lost(f"lost {self.roles.name(member)}: {reason}")
        return []

    def _on_leader_lost(self, story: str) -> list[Effect]:
        if self.phase in SERVING and not self._can_witness():
            return self._give_up(story)
        if self.phase in (Phase.EXCHANGING, Phase.READY):
            self._move_to(Phase.ORPHANED)
            self.failure = story
            return [AskForOutcome(self.roles.others)]
        return []

    def _can_witness(self) -> bool:
        """Whether this member, which only helps, stays to pass the leader's decision on: it has served its span, so
        that there may be one, and clients reach each other through owners alone.
        """
        only_helps = self.phase is Phase.EXCHANGING and not self._contributes
        return only_helps and self.collection.count > 0 and self.collection.is_averaged

    def _on_withdrawn(self, reason: str, now: float) -> list[Effect]:
        if self.phase not in SERVING:
            return []  # a member that is ready has given its word: only the outcome can free it
        if self._coordinator is not None:
            return self._coordinate(Withdrawn(reason), now)
        return self._give_up(reason)

    def _give_up(self, reason: str) -> list[Effect]:
        report = TellLeader(GaveUp(reason_text(reason)))
        return [report, *self._finish(self.failure if self.phase is Phase.EXCLUDED else reason)]

    def _on_outcome(self, outcome: Outcome) -> list[Effect]:
        if self._coordinator is not None:
            raise ProtocolViolation("the leader was sent an outcome")
        # an orphan, and whoever ended by itself, may have answered others that it knows of no decision
        return self._conclude(outcome) if self.phase not in (*DECIDED, Phase.ORPHANED) else []

    def _conclude(self, outcome: Outcome) -> list[Effect]:
        reason = outcome.reason
        mine = next((one for one in outcome.excluded if one.member == self.roles.me), None)
        if reason is None and mine is not None:
            reason = f"excluded from the round: {mine.reason}"
        elif reason is None and self.phase is Phase.EXCLUDED:
            reason = self.failure
        elif reason is None and self._is_unready():
            raise ProtocolViolation("the leader committed a round before this member was ready")
        self.outcome = outcome
        return self._finish(reason)

    def _is_unready(self) -> bool:
        return self.phase is Phase.EXCHANGING and self._contributes and self._coordinator is None

    def _on_answer(self, member: int, phase: Phase | None, outcome: Outcome | None) -> list[Effect]:
        if self.phase is not Phase.ORPHANED:
            return []
        if outcome is not None:
            return self._conclude(outcome)
        may_hear = phase in (Phase.EXCHANGING, Phase.READY, Phase.EXCLUDED)
        if may_hear or (phase is Phase.ORPHANED and self._relies_on(member)):
            return [AskForOutcome((member,))]
        self._answers[member] = phase
        self._lost_some |= phase is None
        if len(self._answers) < len(self.roles.others):
            return []
        return self._conclude_answers()

    def _relies_on(self, member: int) -> bool:
        """Owners reach everybody, and can be reached; two members that own nothing may both be clients."""
        owned = self.roles.parts_owned
        return owned[member] > 0 and owned[self.roles.me] == 0

    def _conclude_answers(self) -> list[Effect]:
        """Everybody has answered, or counts as dead."""
        answers = self._answers.items()
        others = tuple(one for one, phase in answers if phase is Phase.ORPHANED)
        if others and self._lost_some:
            # Who died may have told one of the orphans before, after that one's answer.
            self._lost_some = False
            for one in others:
                del self._answers[one]
            return [AskForOutcome(others)]
        return self._finish(f"{self.failure}; no member that can be reached knows of a decision")

    def _finish(self, reason: str | None) -> list[Effect]:
        self._move_to(Phase.COMMITTED if reason is None else Phase.FAILED)
        self.failure = reason
        return [Finish(reason)]

    def _move_to(self, phase: Phase) -> None:
        self._machine.move(phase)
