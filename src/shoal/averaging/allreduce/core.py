"""One round of butterfly all-reduce, as seen by one member: which parts the members owe each other, who is excluded,
and whether the round commits.

Theory of operation
-------------------
The flat vector of a group is cut into spans, and each span into parts (:mod:`shoal.averaging.partition`). Every
contributor sends each span's owner its weight and its version of the span's parts, in order. The owner averages a part
once everybody it waits for has delivered it, and returns the average to every member (reduce-scatter and all-gather;
Thakur et al. 2005, "Optimization of collective communication operations in MPICH", section 4.4, with unequal spans).

A sender that stalls, is lost or breaks the protocol is excluded by the owner that notices. The parts that it has not
delivered are averaged over the weights that did arrive. The owner tells the leader, and the leader everybody. A member
that is excluded and lives stands aside: it will not commit, but serves the averages of its spans, and votes, until the
group is decided. The clock of a sender runs while the owner waits for its next part: not before the owner's own
snapshot, not while the owner holds it back because others are slower, and not while the owner itself is late. The
clock of an owner runs while everything that its next average needs of this member was sent. When everything has been
averaged, the leader's clocks run for members that are not ready, since each last said that it took another average.

An owner that is lost or too slow is *repaired*: the leader voids its spans, and cuts them among the members that are
left (:mod:`.assignment`). Everybody drops what it holds of a void span, sends its parts to the new owners, from the
snapshot, and is ready again when it has their averages. So all members that commit hold the same averages, of the same
epoch.

A round commits everywhere or nowhere. A member that holds every average *reports ready*, and from then on may not give
up by itself. When every member that is not excluded is ready, the leader proposes to commit. The round commits once a
quorum of the group, as it was formed, has accepted that (:mod:`.voter`): exclusions never shrink it. A member that
loses the leader looks for another one (:mod:`.election`), which asks a quorum where it stands and goes on from there.

Why no two members end differently:

1. A member commits only by a decision that a quorum accepted, in some term. By the rules of the vote all such decisions
   are the same. A ready member fails only by such a decision, by the notice that it is excluded, or when no living
   member knows of a decision and too few live to take one.
2. A decision to commit names its epoch, and the members that it excludes. It was proposed when all others had said that
   they hold the averages of that epoch. A later leader has a member drop them only when a quorum knows that nothing
   was decided before (:attr:`.Voter.floor`), so that no other leader adopts that proposal any more.
3. A member that is not ready may fail at any time: nobody counts it as one that will commit. It goes on to vote.
4. A member that is ready and cannot learn the decision is *in doubt*. Others may have committed, and it says so.

This module is pure: no I/O; the time is an argument. :meth:`AllReduce.handle` is its one mutating entry point; the
shell is :mod:`.round`.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

from shoal.averaging.allreduce.assignment import Repair
from shoal.averaging.allreduce.awaited import PROGRESS_INTERVAL
from shoal.averaging.allreduce.decision import Decision
from shoal.averaging.allreduce.effects import (
    AnnounceExclusion,
    AnnounceOutcome,
    AnnounceRepair,
    AskForAcceptance,
    Effect,
    Finish,
    Reply,
    StopContributing,
    TellLeader,
)
from shoal.averaging.allreduce.election import Election
from shoal.averaging.allreduce.events import (
    DECIDED,
    OVER,
    TRANSITIONS,
    AcceptanceAsked,
    AverageReceived,
    Event,
    ExchangeOpened,
    ExcludedByOwner,
    ExclusionReceived,
    JoinTimedOut,
    MemberAnswered,
    MemberEvent,
    MemberLeft,
    MemberLost,
    MemberReported,
    OutcomeReceived,
    OwnerLost,
    PartAveraged,
    PartDelivered,
    PartSent,
    Phase,
    PromiseAsked,
    RepairReceived,
    Roles,
    RoundTimeouts,
    SenderAwaited,
    SenderEvent,
    SenderHeld,
    SenderLost,
    SnapshotFailed,
    SnapshotTaken,
    SpanReceived,
    VoteHandedOn,
    WeightDeclared,
    Withdrawn,
)
from shoal.averaging.allreduce.ledger import Ledger
from shoal.averaging.allreduce.messages import (
    AveragesReceived,
    Excluded,
    GaveUp,
    Knows,
    Outcome,
    Promised,
    Ready,
    StandsAside,
    Undecided,
    reason_text,
)
from shoal.averaging.allreduce.verdicts import Concluded, Doubted, GivenUp, Step
from shoal.errors import AllreduceException
from shoal.sansio.core import NEVER, TimePassed
from shoal.sansio.machine import Machine

NO_LIMITS = RoundTimeouts()
SERVING = (Phase.EXCHANGING, Phase.EXCLUDED)
"""While the own spans may still have to be averaged: a member that is ready has done that."""


class AllReduce:
    """The state of one member in one round.

    ``failure`` is why this member failed, ``outcome`` the decision as far as it is known here: an excluded member fails
    in a round that commits for others.
    """

    def __init__(self, roles: Roles, timeouts: RoundTimeouts = NO_LIMITS) -> None:
        if not any(roles.contributes):
            raise AllreduceException("no member of the group contributes tensors: all of them only help")
        self.roles = roles
        self.failure: str | None = None
        self.outcome: Outcome | None = None
        self.ledger = Ledger(roles, timeouts)
        self._machine = Machine(Phase.EXCHANGING, TRANSITIONS)
        self.decision = Decision(self, roles, timeouts)
        self._contributes = roles.contributes[roles.me]
        self._told_progress = -math.inf
        self._was_ready = False
        """Whether this member was ready when it came to be in doubt: then it holds the averages of its epoch."""

    @property
    def phase(self) -> Phase:
        """Where this member stands."""
        return self._machine.state

    @property
    def election(self) -> Election:
        """Whom this member follows, and what it promised."""
        return self.decision.election

    @property
    def leader(self) -> int:
        """The member that this one follows, or followed last."""
        return self.election.leader

    @property
    def is_bound(self) -> bool:
        """Whether the round may commit with this member, whatever it wishes."""
        return self.decision.is_bound

    def handle(self, event: Event, now: float) -> list[Effect]:
        """Take in one event; return what has to be done, in order.

        :param now: seconds of any steady clock, the same one for all events
        :raises ProtocolViolation: the event is something that an honest peer would not have caused; the state
          is unchanged
        """
        self._machine.note(event, now)
        return self._follow(self._take(event, now), now)

    @property
    def deadline(self) -> float:
        """When :class:`TimePassed` is due, if nothing else happens before."""
        if self.phase in OVER:
            return NEVER
        exchange = self.ledger.deadline if self.phase in SERVING else NEVER
        return min(exchange, self.decision.deadline)

    def answer(self) -> Knows | Undecided:
        """What this member knows of the decision."""
        return self.decision.answer()

    def _take(self, event: Event, now: float) -> list[Step]:
        match event:
            case PromiseAsked() | AcceptanceAsked() | MemberAnswered():
                return self.decision.on_vote(event, now)
            case OutcomeReceived(outcome) if self.phase in OVER:
                return [Concluded(outcome)] if self.outcome is None else []
            case _ if self.phase in OVER:
                return []
            case SnapshotTaken(weight):
                return self._on_snapshot(weight, now)
            case SnapshotFailed(reason):
                return self._stand_aside("snapshot", reason, now) if self.phase is Phase.EXCHANGING else []
            case TimePassed(late):
                exchange = self.ledger.on_time(late, now) if self.phase in SERVING else []
                return [*exchange, *self.decision.on_time(late, now)]
            case Withdrawn():
                return self._on_withdrawn(event, now)
            case (
                WeightDeclared()
                | SenderHeld()
                | SenderAwaited()
                | PartDelivered()
                | PartAveraged()
                | SenderLost()
            ):
                if self.phase not in SERVING:
                    return []
                effects = self.ledger.on_owner_event(event, now)
                return [*effects, *self._advance(now)] if isinstance(event, PartAveraged) else [*effects]
            case (
                ExchangeOpened()
                | PartSent()
                | AverageReceived()
                | SpanReceived()
                | OwnerLost()
                | ExcludedByOwner()
            ):
                return self._as_sender(event, now) if self.phase is Phase.EXCHANGING else []
            case _:
                return self._as_member(event, now)

    def _follow(self, steps: Iterable[Step], now: float) -> list[Effect]:
        """What is to be done by the shell. A leader's reports stay here, and its announcements hold for itself, too."""
        effects: list[Effect] = []
        for step in steps:
            match step:
                case TellLeader(report) if self.decision.reports_to_itself:
                    effects += self._follow(self.decision.report(report, now), now)
                case TellLeader(Ready()) | Reply(Promised(Phase.READY.name)):
                    self.election.evidence.tell(self.election.term)
                    effects.append(step)
                case AnnounceExclusion(excluded):
                    effects += [step, *self._follow(self._on_exclusion(excluded, now), now)]
                case AnnounceRepair(order):
                    effects += [step, *self._follow(self._on_repair(order, now), now)]
                case AnnounceOutcome(outcome):
                    effects += [step, *self._conclude(outcome)]
                case AskForAcceptance() if self.decision.is_unvoted(step):
                    effects += self._follow(self.decision.vote_for_own(step, now), now) or [step]
                case Concluded(outcome):
                    effects += self._conclude(outcome)
                case GivenUp(reason):
                    effects += [] if self.phase in OVER else self._finish(reason)
                case Doubted(reason):
                    effects += [] if self.phase in OVER else self._doubt(reason)
                case _:
                    effects.append(step)
        return effects

    # the exchange

    def _on_snapshot(self, weight: float, now: float) -> list[Step]:
        if self.phase is not Phase.EXCHANGING:
            return []
        return [*self._begin(weight if self._contributes else None, now), *self._advance(now)]

    def _begin(self, weight: float | None, now: float) -> list[Step]:
        return [*self.decision.begin(now), *self.ledger.settle(weight, now)]

    def _as_sender(self, event: SenderEvent, now: float) -> list[Step]:
        ledger = self.ledger
        match event:
            case ExchangeOpened(span):
                ledger.returns.open(span, now)
            case PartSent(span, index):
                ledger.returns.send(span, index, now)
            case AverageReceived(span, index):
                if span in ledger.assignment.by_id:
                    ledger.returns.receive(span, index, now)
                    return self._tell_progress(now)
            case SpanReceived(report):
                if report.span in ledger.assignment.by_id:
                    ledger.returns.complete(report, now)
                    return [*self.decision.learn(report, now), *self._advance(now)]
            case OwnerLost(span, reason, loss):
                return [*ledger.lose_owner(span, reason, loss)]
            case ExcludedByOwner(span_id, reason):
                owned = ledger.assignment.by_id.get(span_id)
                if owned is not None:
                    story = f"excluded by {self.roles.name(owned.owner)}: {reason}"
                    return self._stand_aside("exchange", story, now)
        return []

    def _advance(self, now: float) -> list[Step]:
        """Become ready, if this member has contributed and holds every average."""
        if self.phase is not Phase.EXCHANGING or not self.decision.has_begun or not self.ledger.is_complete:
            return []
        self.decision.wait(now)
        if not self._contributes or self.ledger.weight is None:
            return []
        self._machine.move(Phase.READY)
        return [TellLeader(Ready(self.ledger.weight, self.ledger.assignment.epoch))]

    def _tell_progress(self, now: float) -> list[Step]:
        """Let the leader know, now and then, that this member is not stuck."""
        if now - self._told_progress < PROGRESS_INTERVAL:
            return []
        self._told_progress = now
        return [TellLeader(AveragesReceived(self.ledger.returns.received))]

    def _on_repair(self, order: Repair, now: float) -> list[Step]:
        if order in self.ledger.assignment.orders:
            return []
        effects = self.ledger.repair(order, now)
        self.election.evidence.retract(order.epoch.term)
        if self.phase is Phase.READY:
            self._machine.move(Phase.EXCHANGING)
        if self.phase is not Phase.EXCLUDED:
            self.decision.work()
        return [*effects, *self._advance(now)]

    # exclusion

    def _stand_aside(self, phase: str, reason: str, now: float, *, by_leader: bool = False) -> list[Step]:
        """This member will not commit. It goes on to serve its spans, and to vote."""
        self._machine.move(Phase.EXCLUDED)
        self.failure = reason
        self.decision.wait(now)
        self.ledger.stop_taking()
        steps: list[Step] = [StopContributing()]
        if not self.decision.has_begun:
            steps += self._begin(None, now)
        return steps if by_leader else [*steps, TellLeader(StandsAside(phase, reason_text(reason)))]

    def _on_exclusion(self, excluded: Excluded, now: float) -> list[Step]:
        """The leader's word: nobody waits any more for what this member has not delivered."""
        member, reason = excluded.member, excluded.reason
        if member == self.roles.me:
            self.election.evidence.retract(self.election.term)
            waiting = self.phase in (Phase.EXCHANGING, Phase.READY)
            return self._stand_aside(excluded.phase, reason, now, by_leader=True) if waiting else []
        return [*self.ledger.exclude(member, reason, now), *self._advance(now)]

    # the leader

    def _as_member(self, event: MemberEvent, now: float) -> list[Step]:
        match event:
            case MemberLost(member, reason):
                return self.decision.lose(member, reason, now)
            case MemberLeft(member):
                return self.decision.see_leave(member, now)
            case VoteHandedOn():
                self.election.voter.casts = True
                return []
            case JoinTimedOut() | MemberReported():
                return self.decision.coordinate(event, now)
            case ExclusionReceived(excluded, term):
                return self._hear(self._on_exclusion(excluded, now)) if self.decision.hears(term) else []
            case RepairReceived(order, term):
                return self._hear(self._on_repair(order, now)) if self.decision.hears(term) else []
            case OutcomeReceived(outcome):
                return [Concluded(outcome)]

    def _hear(self, steps: list[Step]) -> list[Step]:
        """A word of the leader was taken in: it leads."""
        self.election.heard_leader()
        return steps

    def _on_withdrawn(self, event: Withdrawn, now: float) -> list[Step]:
        reason = event.reason
        if self.decision.coordinator is not None:
            return self.decision.withdraw(event, now)
        if self.phase not in SERVING:
            return []  # a member that is ready has given its word: only the outcome can free it
        story = self.failure if self.phase is Phase.EXCLUDED else None
        return [TellLeader(GaveUp(reason_text(reason))), self.decision.give_up(story or reason)]

    # the end

    def _conclude(self, outcome: Outcome) -> list[Effect]:
        self.outcome = outcome
        if self.phase in DECIDED:
            return []
        reason = outcome.reason
        mine = next((one for one in outcome.excluded if one.member == self.roles.me), None)
        if reason is None and mine is not None:
            reason = f"excluded from the round: {mine.reason}"
        elif reason is None and self.phase is Phase.EXCLUDED:
            reason = self.failure
        elif reason is None and self._contributes and not self._holds(outcome):
            reason = "the others committed averages that this member does not hold"
        return [*self.decision.tell_followers(outcome), *self._finish(reason)]

    def _holds(self, outcome: Outcome) -> bool:
        is_ready = self.phase is Phase.READY or (self.phase is Phase.IN_DOUBT and self._was_ready)
        return is_ready and self.ledger.assignment.epoch == outcome.epoch

    def _doubt(self, reason: str) -> list[Effect]:
        self._was_ready = self.phase is Phase.READY
        self._machine.move(Phase.IN_DOUBT)
        self.failure = reason
        return [Finish(reason)]

    def _finish(self, reason: str | None) -> list[Effect]:
        self._machine.move(Phase.COMMITTED if reason is None else Phase.FAILED)
        self.failure = reason
        return [Finish(reason)]
