"""One round of butterfly all-reduce, as seen by one member: who owes which part to whom, who is excluded, and
whether the round commits.

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
   they hold the averages of that epoch. One that has dropped them since, by the order of a later leader, fails: that
   leader's quorum had accepted nothing, so that the decision can only be of a term that nobody in the quorum heard of.
3. A member that is not ready may fail at any time: nobody counts it as one that will commit. It goes on to vote.
4. A member that is ready and cannot learn the decision is *in doubt*. Others may have committed, and it says so.

This module is pure: no I/O; the time is an argument. :meth:`AllReduce.handle` is its one mutating entry point; the
shell is :mod:`.round`.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

from shoal.averaging.allreduce.assignment import Assignment, Repair
from shoal.averaging.allreduce.coordination import PROGRESS_INTERVAL, Coordinator, CoordinatorEvent
from shoal.averaging.allreduce.effects import (
    AnnounceExclusion,
    AnnounceOutcome,
    AnnounceRepair,
    AskForAcceptance,
    Effect,
    Finish,
    FollowLeader,
    LeadMembers,
    Reply,
    StopContributing,
    StopLeading,
    TellLeader,
)
from shoal.averaging.allreduce.election import ASK_AGAIN, Election, Hope
from shoal.averaging.allreduce.events import (
    DECIDED,
    OVER,
    TRANSITIONS,
    AcceptanceAsked,
    AverageReceived,
    Event,
    ExchangeBegan,
    ExchangeOpened,
    ExcludedByOwner,
    ExclusionReceived,
    JoinTimedOut,
    Lead,
    MemberAnswered,
    MemberEvent,
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
    VoteEvent,
    WeightDeclared,
    Withdrawn,
)
from shoal.averaging.allreduce.ledger import CATCH_UP, Ledger
from shoal.averaging.allreduce.messages import (
    Accepted,
    AveragesReceived,
    Excluded,
    GaveUp,
    Knows,
    NotKnown,
    Outcome,
    Promised,
    Ready,
    Refused,
    StandsAside,
    Undecided,
    reason_text,
)
from shoal.errors import AllreduceException, ProtocolViolation
from shoal.sansio.core import NEVER, TimePassed
from shoal.sansio.machine import Machine

NO_LIMITS = RoundTimeouts()
SLOWER = 4
"""The leader may wait for members whose links are so many times slower, before others look for another leader."""
GIVE_UP_AFTER = 15.0
"""Seconds without a leader after which a member that is not ready gives up."""
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
        self.election = Election(roles)
        self._timeouts = timeouts
        self._machine = Machine(Phase.EXCHANGING, TRANSITIONS)
        self._contributes = roles.contributes[roles.me]
        self._coordinator = (
            Coordinator(roles, self.ledger.assignment, timeouts.reducer) if roles.me == 0 else None
        )
        self._early: list[tuple[int, CoordinatorEvent]] = []
        """What a candidate heard of its followers, and in which term: it counts once the candidate leads."""
        self._refused_by: set[int] = set()
        """Members that do not accept what this leader proposes."""
        self._began_at = math.inf
        """When the exchange began here; infinity: it has not yet."""
        self._told_progress = -math.inf
        self._waits_since = NEVER
        """When this member had nothing left to do but to wait for the decision."""

    @property
    def phase(self) -> Phase:
        """Where this member stands."""
        return self._machine.state

    @property
    def leader(self) -> int:
        """The member that this one follows, or followed last."""
        return self.election.leader

    @property
    def is_bound(self) -> bool:
        """Whether the round may commit with this member, whatever it wishes."""
        if self._coordinator is not None:
            return self._coordinator.is_bound and self.phase in (Phase.READY, Phase.COMMITTED, Phase.IN_DOUBT)
        return self.phase in (Phase.READY, Phase.COMMITTED, Phase.IN_DOUBT)

    def handle(self, event: Event, now: float) -> list[Effect]:
        """Take in one event; return what has to be done, in order.

        :param now: seconds of any steady clock, the same one for all events
        :raises ProtocolViolation: the event is something that an honest peer would not have caused; the state
          is unchanged
        """
        self._machine.note(event, now)
        return self._route(self._take(event, now), now)

    @property
    def deadline(self) -> float:
        """When :class:`TimePassed` is due, if nothing else happens before."""
        if self.phase in OVER:
            return NEVER
        ends = [self.election.deadline, self._patience_ends]
        if self.phase in SERVING:
            ends.append(self.ledger.deadline)
        if self._coordinator is not None:
            ends.append(self._coordinator.deadline)
        return min(ends)

    def describe(self) -> Promised:
        """Where this member stands, for a new leader."""
        return Promised(
            self.phase.name,
            self.ledger.weight,
            self.failure,
            self.ledger.assignment.orders,
            self.ledger.knows_of(),
            self.election.voter.accepted,
            self.election.voter.floor,
        )

    def answer(self) -> Knows | Undecided:
        """What this member knows of the decision."""
        if self.outcome is not None:
            return Knows(self.outcome)
        return Undecided(self.phase.name, self.election.has_leader and self.phase not in OVER)

    def _take(self, event: Event, now: float) -> list[Effect]:
        match event:
            case PromiseAsked() | AcceptanceAsked() | MemberAnswered():
                return self._on_vote(event, now)
            case _ if self.phase in OVER:
                return self._learn(event)
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
                if self.phase not in SERVING:
                    return []
                effects = self.ledger.on_owner_event(event, now)
                return [*effects, *self._advance(now)] if isinstance(event, PartAveraged) else effects
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

    def _route(self, effects: Iterable[Effect], now: float) -> list[Effect]:
        """What the leader would report, it tells its own coordinator; what it announces holds for itself, too."""
        routed: list[Effect] = []
        for effect in effects:
            match effect:
                case TellLeader(report) if self._coordinator is not None:
                    routed += self._coordinate(MemberReported(self.roles.me, report), now)
                case TellLeader() if not self.election.has_leader:
                    pass  # a new leader asks
                case _:
                    routed.append(effect)
        return routed

    # the exchange

    def _on_snapshot(self, weight: float, now: float) -> list[Effect]:
        if self.phase is not Phase.EXCHANGING:
            return []
        return [*self._begin(weight if self._contributes else None, now), *self._advance(now)]

    def _begin(self, weight: float | None, now: float) -> list[Effect]:
        self._began_at = now
        began = [] if self._coordinator is None else self._coordinate(ExchangeBegan(), now)
        return [*began, *self.ledger.settle(weight, now)]

    def _as_sender(self, event: SenderEvent, now: float) -> list[Effect]:
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
                    learnt = [] if self._coordinator is None else self._coordinator.learn(report, now)
                    return [*self._announce(learnt, now), *self._advance(now)]
            case OwnerLost(span, reason, loss):
                return ledger.lose_owner(span, reason, loss)
            case ExcludedByOwner(span_id, reason):
                span_ = ledger.assignment.by_id.get(span_id)
                if span_ is not None:
                    return self._stand_aside(
                        "exchange", f"excluded by {self.roles.name(span_.owner)}: {reason}", now
                    )
        return []

    def _advance(self, now: float) -> list[Effect]:
        """Become ready, if this member has contributed and holds every average."""
        if self.phase is not Phase.EXCHANGING or self._began_at == math.inf or not self.ledger.is_complete:
            return []
        self._waits_since = now
        if not self._contributes or self.ledger.weight is None:
            return []
        self._machine.move(Phase.READY)
        return [TellLeader(Ready(self.ledger.weight, self.ledger.assignment.epoch))]

    def _tell_progress(self, now: float) -> list[Effect]:
        """Let the leader know, now and then, that this member is not stuck."""
        if now - self._told_progress < PROGRESS_INTERVAL:
            return []
        self._told_progress = now
        return [TellLeader(AveragesReceived(self.ledger.returns.received))]

    def _on_time(self, late: float, now: float) -> list[Effect]:
        effects: list[Effect] = []
        if self.phase in SERVING:
            effects += self.ledger.on_time(late, now)
        if self._coordinator is not None:
            uncounted = late + CATCH_UP if late else 0.0
            effects += self._coordinate(TimePassed(uncounted), now)
        if self.phase not in OVER and now >= self._patience_ends:
            return [*effects, *self._lose_patience(now)]
        effects += self.election.consider(now)
        return [*effects, *self._try_to_lead(now)]

    def _on_repair(self, order: Repair, now: float) -> list[Effect]:
        if order in self.ledger.assignment.orders:
            return []
        if self.phase is Phase.READY:
            self._machine.move(Phase.EXCHANGING)
        if self.phase is not Phase.EXCLUDED:
            self._waits_since = NEVER
        self.election.voter.raise_floor(order.epoch.term)
        effects = self.ledger.repair(order, now)
        if self.phase is Phase.EXCHANGING:
            effects += self._advance(now)
        return effects

    # exclusion

    def _stand_aside(self, phase: str, reason: str, now: float, *, by_leader: bool = False) -> list[Effect]:
        """This member will not commit. It goes on to serve its spans, and to vote."""
        self._machine.move(Phase.EXCLUDED)
        self.failure = reason
        self._waits_since = now
        effects: list[Effect] = [StopContributing()]
        self.ledger.stop_taking()
        if self._began_at == math.inf:
            effects += self._begin(None, now)
        return effects if by_leader else [*effects, TellLeader(StandsAside(phase, reason_text(reason)))]

    def _on_exclusion(self, excluded: Excluded, now: float) -> list[Effect]:
        """The leader's word: nobody waits any more for what this member has not delivered."""
        member, reason = excluded.member, excluded.reason
        if member == self.roles.me:
            waiting = self.phase in (Phase.EXCHANGING, Phase.READY)
            return self._stand_aside(excluded.phase, reason, now, by_leader=True) if waiting else []
        return [*self.ledger.exclude(member, reason), *self._advance(now)]

    # the leader's word, and the own words of a leader

    def _as_member(self, event: MemberEvent, now: float) -> list[Effect]:
        match event:
            case MemberLost(member, reason):
                return self._on_lost(member, reason, now)
            case JoinTimedOut() | MemberReported():
                return self._coordinate(event, now)
            case ExclusionReceived(excluded, term):
                if self._hears(term):
                    return self._on_exclusion(excluded, now)
            case RepairReceived(order, term):
                if self._hears(term):
                    return self._on_repair(order, now)
            case OutcomeReceived(outcome):
                return self._conclude(outcome)
        return []

    def _hears(self, term: int) -> bool:
        if term != self.election.term or self.election.lead is not Lead.FOLLOWING:
            return False
        self.election.heard_leader()
        return True

    def _coordinate(self, event: CoordinatorEvent, now: float) -> list[Effect]:
        if self._coordinator is None:
            if self.election.lead is Lead.CANDIDATE:
                self._early.append((self.election.term, event))
                return []
            if self.election.term:
                return []  # a report to one that does not lead any more
            raise ProtocolViolation("a member reported to one that does not lead")
        return self._announce(self._coordinator.handle(event, now), now)

    def _announce(self, announcements: list[Effect], now: float) -> list[Effect]:
        """What the leader announces holds for itself too."""
        effects: list[Effect] = []
        for announcement in announcements:
            if not isinstance(announcement, AskForAcceptance):
                effects.append(announcement)
            match announcement:
                case AnnounceExclusion(excluded):
                    effects += self._route(self._on_exclusion(excluded, now), now)
                case AnnounceRepair(order):
                    effects += self._route(self._on_repair(order, now), now)
                case AskForAcceptance(_, term, outcome):
                    self._waits_since = now
                    effects += self._vote_for_own(announcement, term, outcome, now)
                case AnnounceOutcome(outcome):
                    effects += self._conclude(outcome)
        return effects

    def _vote_for_own(self, ask: Effect, term: int, outcome: Outcome, now: float) -> list[Effect]:
        """The leader accepts what it proposes. In a pair that decides: then nobody is asked."""
        assert self._coordinator is not None
        self.election.accept(self.roles.me, term, outcome)
        decided = self._coordinator.accept(self.roles.me)
        return self._announce(decided, now) or [ask]

    def _on_lost(self, member: int, reason: str, now: float) -> list[Effect]:
        self.election.lose_member(member)
        if self._coordinator is not None or self.election.lead is Lead.CANDIDATE:
            heard = self._coordinate(MemberLost(member, reason), now)
            return [*heard, *self._try_to_lead(now)]
        if member == self.leader and self.election.lead is Lead.FOLLOWING:
            return self._on_leader_lost(f"lost {self.roles.name(member)}: {reason}", now)
        return [*self.election.consider(now), *self._try_to_lead(now)]

    # without a leader

    def _on_leader_lost(self, story: str, now: float) -> list[Effect]:
        is_first = self.election.since == NEVER  # else a candidate may just have stepped down
        effects = self.election.lose_leader(story, now)
        without = self.election.lost | self.election.dead
        if is_first and self.phase is not Phase.READY and not self.election.may_be_quorum(without):
            return self._finish(self.failure or story)
        return [*effects, *self._try_to_lead(now)]

    def _try_to_lead(self, now: float) -> list[Effect]:
        election = self.election
        if not election.is_elected(now):
            return []
        adopted = election.win(self.describe())
        longest = max(election.promises.values(), key=lambda one: [order.epoch for order in one.orders][-1:])
        assignment = Assignment.replay(self.roles.parts_owned, longest.orders)
        self._coordinator = Coordinator(self.roles, assignment, self._timeouts.reducer, election.term)
        effects: list[Effect] = [LeadMembers(election.term)]
        for order in assignment.orders:
            effects += [AnnounceRepair(order), *self._on_repair(order, now)]
        self._waits_since = now
        standings = dict(election.promises) | {self.roles.me: self.describe()}
        effects += self._announce(self._coordinator.take_over(standings, adopted, now), now)
        return [*effects, *self._hear_early(now), *self.ledger.complain_again()]

    def _hear_early(self, now: float) -> list[Effect]:
        """What members have reported since they promised."""
        early, self._early = self._early, []
        effects: list[Effect] = []
        for term, event in early:
            if term == self.election.term:
                try:
                    effects += self._coordinate(event, now)
                except ProtocolViolation as e:
                    assert isinstance(event, MemberReported)
                    effects += self._coordinate(MemberLost(event.member, str(e)), now)
        return effects

    @property
    def _patience_ends(self) -> float:
        """Until when this member waits for a decision, or for a leader."""
        if self._coordinator is not None:
            if self._coordinator.proposed is None:
                return NEVER
            is_bound = self.is_bound
            return self._waits_since + (self._timeouts.doubt if is_bound else GIVE_UP_AFTER)
        if self.election.since != NEVER:
            return self.election.since + (
                self._timeouts.doubt if self.phase is Phase.READY else GIVE_UP_AFTER
            )
        took = max(0.0, self._waits_since - self._began_at)
        return self._waits_since + self._timeouts.leader + SLOWER * took

    def _lose_patience(self, now: float) -> list[Effect]:
        election = self.election
        if self._coordinator is not None:
            proposed = self._coordinator.proposed
            if self.is_bound:
                return self._doubt(
                    "too few members answered to decide; others may have decided without this one"
                )
            return self._finish((proposed and proposed.reason) or "too few members answered to decide")
        if election.since == NEVER:
            name, waited = self.roles.name(self.leader), now - self._waits_since
            return self._on_leader_lost(f"{name} has led without a decision for {waited:.0f} s", now)
        if self.phase is Phase.READY:
            return self._doubt(f"{election.story}; others may have decided")
        return self._finish(self.failure or f"{election.story}; no other leader was found")

    def _doubt(self, reason: str) -> list[Effect]:
        self._machine.move(Phase.IN_DOUBT)
        self.failure = reason
        return [Finish(reason)]

    # the vote

    def _on_vote(self, event: VoteEvent, now: float) -> list[Effect]:
        match event:
            case PromiseAsked(member, term):
                return self._on_promise_asked(member, term)
            case AcceptanceAsked(member, term, outcome):
                if self.outcome is not None:
                    return [Reply(Knows(self.outcome))]
                accepts = self.election.accept(member, term, outcome)
                if accepts and member == self.leader and self.election.lead is Lead.FOLLOWING:
                    self.election.heard_leader()
                return [Reply(Accepted() if accepts else Refused(self.election.voter.promised))]
            case MemberAnswered():
                return self._on_answer(event, now)

    def _on_promise_asked(self, member: int, term: int) -> list[Effect]:
        election = self.election
        if self.outcome is not None:
            return [Reply(Knows(self.outcome))]
        is_again = election.lead is Lead.FOLLOWING and election.term == term
        if election.has_leader and self.phase not in OVER and not is_again:
            return [Reply(self.answer())]
        was_candidate = election.lead is Lead.CANDIDATE
        if not election.promise(member, term):
            return [Reply(Refused(election.voter.promised))]
        reply = Reply(self.describe())
        if self.phase in OVER or is_again:
            return [reply]
        left = [StopLeading()] if was_candidate else []
        return [*left, reply, FollowLeader(member, term), *self.ledger.complain_again()]

    def _on_answer(self, event: MemberAnswered, now: float) -> list[Effect]:
        if self.phase in DECIDED:
            return []
        answer = event.answer
        if isinstance(answer, Knows):
            return self._conclude(answer.outcome)
        if self.phase is Phase.IN_DOUBT:
            return []
        if self._coordinator is not None:
            return self._on_vote_counted(event, now)
        effects = self.election.on_answer(event, now)
        return [*effects, *self._try_to_lead(now), *self._despair(now)]

    def _on_vote_counted(self, event: MemberAnswered, now: float) -> list[Effect]:
        coordinator = self._coordinator
        assert coordinator is not None
        if event.term != self.election.term or coordinator.proposed is None:
            return []
        answer = event.answer
        if isinstance(answer, Accepted):
            return self._announce(coordinator.accept(event.member), now)
        if isinstance(answer, Refused) and answer.promised > self.election.term:
            return self._on_refused(event.member, now)
        if event.is_dead or isinstance(answer, NotKnown):
            self.election.dead.add(event.member)
        if event.member in self.election.dead:
            return self._despair(now)
        return [AskForAcceptance((event.member,), self.election.term, coordinator.proposed, ASK_AGAIN)]

    def _on_refused(self, member: int, now: float) -> list[Effect]:
        """A member has promised more to another one. That matters if too few are left without it."""
        self._refused_by.add(member)
        if self.election.may_be_quorum(self._refused_by | self.election.dead):
            return []
        self._coordinator = None
        self._refused_by.clear()
        return [StopLeading(), *self._on_leader_lost("most members follow another leader", now)]

    def _despair(self, now: float) -> list[Effect]:
        """End the round for this member, if nobody who lives knows more, or can decide."""
        if self.phase in OVER:
            return []
        if self._coordinator is not None:
            proposed = self._coordinator.proposed
            if proposed is not None and not self.election.may_be_quorum(self.election.dead):
                reason = proposed.reason or "too few members live to decide"
                return self._finish(reason)
            return []
        hope = self.election.hope
        if self.election.has_leader or hope is Hope.QUORUM:
            return []
        if self.phase is not Phase.READY or hope is Hope.NONE:
            story = f"{self.election.story}; no member that can be reached knows of a decision"
            return self._finish(self.failure or story)
        return []

    # the end

    def _on_withdrawn(self, reason: str, now: float) -> list[Effect]:
        if self._coordinator is not None:
            if self._coordinator.proposed is None and self.roles.size > 2:
                return [StopLeading(), *self._finish(reason)]  # the others find another leader
            effects = self._coordinate(Withdrawn(reason), now)
            if self.phase not in OVER and not self._coordinator.is_bound and not self._others_live:
                effects += self._finish(reason)
            return effects
        if self.phase not in SERVING:
            return []  # a member that is ready has given its word: only the outcome can free it
        report = TellLeader(GaveUp(reason_text(reason)))
        return [report, *self._finish(self.failure if self.phase is Phase.EXCLUDED else reason)]

    @property
    def _others_live(self) -> bool:
        return any(one not in self.election.lost for one in self.election.others)

    def _learn(self, event: Event) -> list[Effect]:
        """After the end of this member's round: only the decision is news, to one that is in doubt, or is asked."""
        if isinstance(event, OutcomeReceived) and self.outcome is None:
            return self._conclude(event.outcome)
        return []

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
        is_news = self._coordinator is None or self._coordinator.outcome is None
        has_followers = self.election.lead in (Lead.LEADING, Lead.CANDIDATE)
        told = [AnnounceOutcome(outcome)] if is_news and has_followers else []
        return [*told, *self._finish(reason)]

    def _holds(self, outcome: Outcome) -> bool:
        is_ready = self.phase in (Phase.READY, Phase.IN_DOUBT)
        return is_ready and self.ledger.assignment.epoch == outcome.epoch

    def _finish(self, reason: str | None) -> list[Effect]:
        self._machine.move(Phase.COMMITTED if reason is None else Phase.FAILED)
        self.failure = reason
        return [Finish(reason)]
