"""A member's part in the decision of a round: as a follower, without a leader, as a candidate, or as the leader. Pure.

:mod:`.election` knows who leads and what was promised, :mod:`.coordination` what a leader knows of its group, and
:mod:`.patience` for how long a member waits. Here they meet. What becomes of the member itself is a verdict, which its
core carries out.
"""

from __future__ import annotations

from shoal.averaging.allreduce.assignment import Assignment
from shoal.averaging.allreduce.coordination import Coordinator, CoordinatorEvent
from shoal.averaging.allreduce.effects import (
    AnnounceOutcome,
    AnnounceRepair,
    AskForAcceptance,
    Effect,
    FollowLeader,
    LeadMembers,
    Reply,
    StopLeading,
)
from shoal.averaging.allreduce.election import ASK_AGAIN, Election
from shoal.averaging.allreduce.events import (
    DECIDED,
    OVER,
    AcceptanceAsked,
    ExchangeBegan,
    Lead,
    MemberAnswered,
    MemberLost,
    MemberReported,
    Phase,
    PromiseAsked,
    Roles,
    RoundTimeouts,
    VoteEvent,
    Withdrawn,
)
from shoal.averaging.allreduce.evidence import Hope
from shoal.averaging.allreduce.ledger import CATCH_UP
from shoal.averaging.allreduce.messages import (
    Accepted,
    Knows,
    Outcome,
    Promised,
    Refused,
    Report,
    SpanAveraged,
    Undecided,
)
from shoal.averaging.allreduce.patience import Patience
from shoal.averaging.allreduce.verdicts import Concluded, Doubted, GivenUp, Member, Step, Verdict
from shoal.errors import ProtocolViolation
from shoal.sansio.core import NEVER, TimePassed

ASK_OTHERS_AGAIN = 1.0
"""Seconds after which a leader asks a member again that has voted."""


class Decision:
    """Whom this member follows or leads, and until when it waits."""

    def __init__(self, member: Member, roles: Roles, timeouts: RoundTimeouts) -> None:
        self.roles = roles
        self.election = Election(roles)
        self.coordinator: Coordinator | None = None
        """What this member knows as the leader; None: it does not lead."""
        if roles.me == 0:
            self.coordinator = Coordinator(roles, member.ledger.assignment, timeouts.reducer)
        self._member = member
        self._timeouts = timeouts
        self._early: list[tuple[int, CoordinatorEvent]] = []
        """What a candidate heard of its followers, and in which term: it counts once the candidate leads."""
        self._refused_by: set[int] = set()
        """Members that do not accept what this leader proposes."""
        self._patience = Patience(timeouts, self.election.evidence, len(roles.others))

    @property
    def is_bound(self) -> bool:
        """Whether the round may commit with this member, whatever it wishes."""
        has_voted = self._member.phase in (Phase.READY, Phase.COMMITTED, Phase.IN_DOUBT)
        leads_free = self.coordinator is not None and not self.coordinator.is_bound
        return has_voted and not (leads_free and not self.election.evidence.has_told)

    @property
    def has_begun(self) -> bool:
        """Whether the exchange has begun here."""
        return self._patience.has_begun

    @property
    def deadline(self) -> float:
        """When something is due though nothing happens."""
        leads = NEVER if self.coordinator is None else self.coordinator.deadline
        return min(leads, self.election.deadline, self._patience_ends)

    def describe(self) -> Promised:
        """Where this member stands, for a new leader."""
        member, voter = self._member, self.election.voter
        ledger = member.ledger
        return Promised(
            member.phase.name,
            ledger.weight,
            member.failure,
            ledger.assignment.orders,
            ledger.knows_of(),
            voter.accepted,
            voter.floor,
            voter.casts,
        )

    def answer(self) -> Knows | Undecided:
        """What this member knows of the decision."""
        if self._member.outcome is not None:
            return Knows(self._member.outcome)
        voter = self.election.voter
        has_leader = self.election.has_leader and not self._is_over
        return Undecided(self._member.phase.name, has_leader, voter.has_accepted_commit, voter.casts)

    @property
    def _is_over(self) -> bool:
        return self._member.phase in OVER

    # how far the member is

    def begin(self, now: float) -> list[Step]:
        """The exchange begins."""
        self._patience.begin(now)
        return [] if self.coordinator is None else list(self.coordinator.handle(ExchangeBegan(), now))

    def wait(self, now: float) -> None:
        """From now on this member waits for the decision, and for nothing else."""
        self._patience.wait(now)

    def work(self) -> None:
        """There is more to do than to wait."""
        self._patience.work()

    # what is told to the leader

    @property
    def reports_to_itself(self) -> bool:
        """Whether what this member has to report stays here: it leads, or there is nobody to tell."""
        return self.coordinator is not None or not self.election.has_leader

    def report(self, report: Report, now: float) -> list[Step]:
        """This leader's own report. Without a leader it is dropped: a new one asks."""
        if self.coordinator is None:
            return []
        return self.coordinate(MemberReported(self.roles.me, report), now)

    def learn(self, report: SpanAveraged, now: float) -> list[Step]:
        """The averages of a span have come, and what they are made of."""
        return [] if self.coordinator is None else list(self.coordinator.learn(report, now))

    def coordinate(self, event: CoordinatorEvent, now: float) -> list[Step]:
        """Something that concerns the leader.

        :raises ProtocolViolation: this member does not lead, and never did
        """
        if self.coordinator is not None:
            return list(self.coordinator.handle(event, now))
        if self.election.lead is Lead.CANDIDATE:
            self._early.append((self.election.term, event))
        elif not self.election.term and self.roles.me:
            raise ProtocolViolation("a member reported to one that does not lead")
        return []  # or it does not lead any more

    def is_unvoted(self, ask: AskForAcceptance) -> bool:
        """Whether this leader has not accepted its own proposal yet."""
        accepted = self.election.voter.accepted
        return accepted is None or accepted[0] < ask.term

    def vote_for_own(self, ask: AskForAcceptance, now: float) -> list[Step]:
        """The leader accepts what it proposes. In a pair that decides: then nobody is asked."""
        assert self.coordinator is not None
        self._patience.wait(now)
        self.election.accept(self.roles.me, ask.term, ask.outcome)
        if ask.outcome.reason is None:
            self.election.evidence.tell(ask.term)
        return list(self.coordinator.accept(self.roles.me, casts=self.election.voter.casts))

    def tell_followers(self, outcome: Outcome) -> list[Effect]:
        """What a leader, or a candidate, learned from another member is news to those that follow it."""
        is_news = self.coordinator is None or self.coordinator.outcome is None
        has_followers = self.election.lead in (Lead.LEADING, Lead.CANDIDATE)
        return [AnnounceOutcome(outcome)] if is_news and has_followers else []

    # the leader's word

    def hears(self, term: int) -> bool:
        """Whether the word of the leader of ``term`` counts."""
        is_leader = term == self.election.term and self.election.lead is Lead.FOLLOWING
        return is_leader and term >= self.election.voter.promised

    def lose(self, member: int, reason: str, now: float) -> list[Step]:
        """The connection to a member ended."""
        self.election.lose_member(member)
        if self.coordinator is not None or self.election.lead is Lead.CANDIDATE:
            return [*self.coordinate(MemberLost(member, reason), now), *self._try_to_lead(now)]
        if member == self.election.leader and self.election.lead is Lead.FOLLOWING:
            return self._lose_leader(f"lost {self.roles.name(member)}: {reason}", now)
        return [*self.election.consider(now), *self._try_to_lead(now)]

    def withdraw(self, event: Withdrawn, now: float) -> list[Step]:
        """This leader cannot or will not go on. In a group of three or more the others find another one."""
        assert self.coordinator is not None
        if self.coordinator.proposed is None and self.roles.size > 2:
            heir = self.coordinator.heir if event.leaves else None
            hands_on = heir is not None and self.election.voter.hand_on()
            return [StopLeading(heir if hands_on else None), self.give_up(event.reason)]
        steps = self.coordinate(event, now)
        is_undecided = self.coordinator.outcome is None and not self.coordinator.is_bound
        if is_undecided and self._concerns_nobody:
            steps.append(GivenUp(event.reason))
        return steps

    @property
    def _concerns_nobody(self) -> bool:
        """Whether no other member is in reach, and none counts this one: it may fail without a vote."""
        evidence = self.election.evidence
        out_of_reach = self.election.lost | evidence.dead
        return all(one in out_of_reach for one in evidence.others) and not evidence.may_be_counted()

    def see_leave(self, member: int, now: float) -> list[Step]:
        """A member's process ends."""
        burials = self.election.evidence.burials
        self.election.evidence.leave(member)
        asked = self.election.ask_followers(self.election.promises, burials)
        return [*asked, *self.election.consider(now), *self._try_to_lead(now), *self._despair(now)]

    def give_up(self, reason: str) -> Verdict:
        """What becomes of this member if it waits no longer."""
        return (
            Doubted(f"{reason}; others may have decided")
            if self.election.evidence.may_be_counted()
            else GivenUp(reason)
        )

    # time, and the lack of a leader

    def on_time(self, late: float, now: float) -> list[Step]:
        """Time has passed; ``late`` seconds of it do not count."""
        if late:
            self._patience.shift(late)
            self.election.shift(late + CATCH_UP)
        steps: list[Step] = []
        if self.coordinator is not None:
            had_proposed = self.coordinator.proposed is not None
            steps += self.coordinate(TimePassed(late + CATCH_UP if late else 0.0), now)
            if self.coordinator.proposed is not None and not had_proposed:
                self._patience.wait(now)  # for votes, from now on; before, for a member that it has given up
        if now >= self._patience_ends:
            return [*steps, *self._lose_patience(now)]
        return [*steps, *self.election.consider(now), *self._try_to_lead(now)]

    @property
    def _patience_ends(self) -> float:
        """Until when this member waits for a decision, or for a leader."""
        if self.coordinator is not None:
            proposed = self.coordinator.proposed
            return NEVER if proposed is None else self._patience.for_votes(is_bound=self.is_bound)
        if self.election.since != NEVER:
            return self._patience.without_leader(self.election.since, is_bound=self.is_bound)
        return self._patience.with_leader

    def _lose_patience(self, now: float) -> list[Step]:
        story = self.election.story
        if self.coordinator is not None:
            proposed = self.coordinator.proposed
            return [self.give_up((proposed and proposed.reason) or "too few members answered to decide")]
        if self.election.since == NEVER:
            name, waited = self.roles.name(self.election.leader), now - self._patience.waits_since
            return self._lose_leader(f"{name} has led without a decision for {waited:.0f} s", now)
        if self._member.phase is Phase.READY:
            return [self.give_up(story)]
        return [self.give_up(self._member.failure or f"{story}; no other leader was found")]

    def _lose_leader(self, story: str, now: float, *, others_first: bool = False) -> list[Step]:
        is_first = self.election.since == NEVER  # else a candidate may just have stepped down
        effects = self.election.lose_leader(story, now, others_first=others_first)
        evidence = self.election.evidence
        without = self.election.lost | evidence.dead
        is_ready = self._member.phase is Phase.READY
        if is_first and not is_ready and not evidence.may_decide_without(without):
            return [self.give_up(self._member.failure or story)]
        return [*effects, *self._try_to_lead(now)]

    def _try_to_lead(self, now: float) -> list[Step]:
        """Lead from now on, if a quorum has promised to follow, and knows what this one found out by that."""
        election = self.election
        told = election.tell_floor(now)
        if not election.is_elected(now):
            return [*told]
        own = self.describe()
        adopted = election.win(own)
        longest = max(election.promises.values(), key=lambda one: [order.epoch for order in one.orders][-1:])
        assignment = Assignment.replay(self.roles.parts_owned, longest.orders)
        self.coordinator = Coordinator(self.roles, assignment, self._timeouts.reducer, election.term)
        self._patience.wait(now)
        # What may have been decided is not dropped any more, by whatever order a follower of the old leader knows.
        orders = [AnnounceRepair(order) for order in assignment.orders] if adopted is None else []
        announced = self.coordinator.take_over(election.promises, adopted, now)
        early = self._hear_early(now)
        return [
            LeadMembers(election.term),
            *orders,
            *announced,
            *early,
            *self._member.ledger.complain_again(),
        ]

    def _hear_early(self, now: float) -> list[Step]:
        """What members have reported since they promised."""
        early, self._early = self._early, []
        steps: list[Step] = []
        for term, event in early:
            if term == self.election.term:
                try:
                    steps += self.coordinate(event, now)
                except ProtocolViolation as e:
                    assert isinstance(event, MemberReported)
                    steps += self.coordinate(MemberLost(event.member, str(e)), now)
        return steps

    # the vote

    def on_vote(self, event: VoteEvent, now: float) -> list[Step]:
        """A question of another member, or an answer to one of this member's."""
        match event:
            case PromiseAsked(member, term, floor):
                return self._on_promise_asked(member, term, floor)
            case AcceptanceAsked(member, term, outcome):
                return self._on_acceptance_asked(member, term, outcome, now)
            case MemberAnswered():
                return self._on_answer(event, now)

    def _denies(self, outcome: Outcome) -> bool:
        """Whether this member has failed, and the outcome counts it all the same."""
        has_failed = self._member.phase is Phase.FAILED and self.roles.contributes[self.roles.me]
        return has_failed and outcome.counts(self.roles.me)

    def _on_acceptance_asked(self, member: int, term: int, outcome: Outcome, now: float) -> list[Step]:
        voter = self.election.voter
        if self._member.outcome is not None:
            return [Reply(Knows(self._member.outcome))]
        if voter.is_closed or self._denies(outcome):
            return [Reply(self.answer())]
        if not self.election.accept(member, term, outcome):
            return [Reply(Refused(voter.promised))]
        reply = Reply(Accepted(voter.casts))
        if term == self.election.term and self.election.lead is Lead.FOLLOWING:
            self.election.heard_leader()
        elif self.election.has_leader and not self._is_over:
            # Of the leader whose term this member has followed, or led, nothing counts any more.
            return [reply, *self._depose(f"{self.roles.name(member)} leads in a later term", now)]
        elif self.election.lead is Lead.CANDIDATE and not self._is_over:
            return [reply, *self.election.step_down(now)]
        return [reply]

    def _depose(self, story: str, now: float) -> list[Step]:
        """The leader that this member follows, or is itself, is one no more."""
        led = [StopLeading()] if self.coordinator is not None else []
        self.coordinator = None
        self._refused_by.clear()
        return [*led, *self._lose_leader(story, now, others_first=True)]

    def _on_promise_asked(self, member: int, term: int, floor: int) -> list[Step]:
        election = self.election
        if self._member.outcome is not None:
            return [Reply(Knows(self._member.outcome))]
        is_again = election.lead is Lead.FOLLOWING and election.term == term
        if election.voter.is_closed or (election.has_leader and not self._is_over and not is_again):
            return [Reply(self.answer())]
        was_candidate = election.lead is Lead.CANDIDATE
        if not election.promise(member, term, floor):
            return [Reply(Refused(election.voter.promised))]
        reply = Reply(self.describe())
        if self._is_over or is_again:
            return [reply]
        left = [StopLeading()] if was_candidate else []
        return [*left, reply, FollowLeader(member, term), *self._member.ledger.complain_again()]

    def _on_answer(self, event: MemberAnswered, now: float) -> list[Step]:
        if self._member.phase in DECIDED:
            return []
        if isinstance(event.answer, Knows):
            return [Concluded(event.answer.outcome)]
        if self._is_over:
            return []
        if self.coordinator is not None:
            return self._on_vote_counted(self.coordinator, event, now)
        effects = self.election.on_answer(event, now)
        return [*effects, *self._try_to_lead(now), *self._despair(now)]

    def _on_vote_counted(self, coordinator: Coordinator, event: MemberAnswered, now: float) -> list[Step]:
        member, answer = event.member, event.answer
        if event.term != self.election.term or coordinator.proposed is None:
            return []
        evidence = self.election.evidence
        self.election.weigh(event, now)
        steps: list[Step] = []
        if isinstance(answer, Accepted):
            steps += coordinator.accept(member, casts=answer.casts)
        elif isinstance(answer, Refused) and answer.promised > self.election.term:
            steps += self._on_refused(member, now)
        if coordinator.outcome is not None or self.coordinator is None:
            return steps
        if member in evidence.dead | self.election.lost:
            steps += self._despair(now)
        if member in evidence.left:
            return steps
        # Once more, also one that has accepted: the decision may become known there by another leader.
        is_soon = member not in evidence.dead and (answer is None or isinstance(answer, Undecided))
        again = ASK_AGAIN if is_soon else ASK_OTHERS_AGAIN
        return [*steps, AskForAcceptance((member,), self.election.term, coordinator.proposed, again)]

    def _on_refused(self, member: int, now: float) -> list[Step]:
        """A member has promised more to another one. That matters if too few are left without it."""
        self._refused_by.add(member)
        if self.election.evidence.may_decide_without(self._refused_by | self.election.evidence.dead):
            return []
        return self._depose("most members follow another leader", now)

    def _despair(self, now: float) -> list[Step]:
        """Give up, if no member that seems to live knows more, or can decide."""
        if self._is_over:
            return []
        evidence = self.election.evidence
        if self.coordinator is not None:
            proposed = self.coordinator.proposed
            if proposed is None:
                return []
            if proposed.reason is not None and self._concerns_nobody:
                return [GivenUp(proposed.reason)]
            if evidence.may_decide_without(evidence.dead):
                return []
            is_alone = len(evidence.dead) == len(self.roles.others)
            reason = proposed.reason or "too few members live to decide"
        elif self.election.has_leader or evidence.hope is Hope.QUORUM:
            return []
        else:
            is_alone = evidence.hope is Hope.NONE
            story = f"{self.election.story}; no member that can be reached knows of a decision"
            reason = self._member.failure or story
        # A leader that proposed waits for news of one that lives, and so does a member that is ready.
        if not self.is_bound or (is_alone and not self.election.evidence.may_be_counted()):
            return [self.give_up(reason)]
        return self._lose_patience(now) if now >= self._patience_ends else []
