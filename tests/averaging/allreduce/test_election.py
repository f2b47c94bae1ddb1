"""How members that lost the leader find another one, in hand-made cases of their cores."""

from __future__ import annotations

import msgspec
import pytest

from shoal.averaging.allreduce.assignment import Epoch, Repair, SpanId
from shoal.averaging.allreduce.core import AllReduce
from shoal.averaging.allreduce.effects import (
    AnnounceExclusion,
    AnnounceOutcome,
    AnnounceRepair,
    AskForAcceptance,
    AskForOutcome,
    AskForPromise,
    Effect,
    Finish,
    FollowLeader,
    LeadMembers,
    Reply,
    StopLeading,
    TellLeader,
)
from shoal.averaging.allreduce.election import GATHER, STAND, TURN
from shoal.averaging.allreduce.events import (
    AcceptanceAsked,
    AverageReceived,
    Event,
    ExclusionReceived,
    Lead,
    MemberAnswered,
    MemberLost,
    MemberReported,
    OutcomeReceived,
    OwnerLost,
    Phase,
    PromiseAsked,
    RepairReceived,
    Roles,
    RoundTimeouts,
    SnapshotTaken,
    SpanReceived,
)
from shoal.averaging.allreduce.messages import (
    Accepted,
    Excluded,
    Knows,
    Loss,
    Outcome,
    OwnerFailed,
    Promised,
    Ready,
    Refused,
    SpanAveraged,
    Undecided,
)
from shoal.sansio.core import TimePassed

COMMITTED, FAILED = Outcome(None), Outcome("no")
WITHOUT_2 = Outcome(None, (Excluded(2, "exchange", 0.0, "lost"),))
LOST = Excluded(0, "exchange", 0.0, "lost together with the leader, or before it")


class Member:
    """A core of a group in which nobody owns parts, so that a snapshot makes it ready."""

    def __init__(self, me: int, size: int = 3, *, ready: bool = True, **options: object) -> None:
        roles = Roles(me, (0,) * size, (True,) * size, **options)  # type: ignore[arg-type]
        self.core = AllReduce(roles, RoundTimeouts())
        self.now = 0.0
        if ready:
            self.handle(SnapshotTaken(1.0))

    @property
    def lead(self) -> Lead:
        return self.core.election.lead

    def at(self, now: float) -> Member:
        self.now = now
        return self

    def handle(self, *events: Event) -> list[Effect]:
        """All events in turn; the effects of the last one."""
        effects: list[Effect] = []
        for event in events:
            effects = self.core.handle(event, self.now)
        return effects


def promised(phase: Phase = Phase.READY, **options: object) -> Promised:
    return Promised(phase.name, 1.0, **options)  # type: ignore[arg-type]


def follow(member: Member, other: int, **options: object) -> list[Effect]:
    """Another member promises to follow this candidate, and then to keep its floor in mind, if it is told one."""
    election = member.core.election
    effects = member.handle(MemberAnswered(other, election.term, promised(**options)))  # type: ignore[arg-type]
    told = [one for one in effects if isinstance(one, AskForPromise) and one.floor]
    for one in told:
        for follower in one.members:
            standing = msgspec.structs.replace(election.promises[follower], floor=one.floor)
            effects = member.handle(MemberAnswered(follower, election.term, standing))
            if election.lead is not Lead.CANDIDATE:
                return effects
    return effects


def proposal(effects: list[Effect]) -> Outcome:
    (outcome,) = (effect.outcome for effect in effects if isinstance(effect, AskForAcceptance))
    return outcome


def reply(effects: list[Effect]) -> object:
    (answer,) = (effect.answer for effect in effects if isinstance(effect, Reply))
    return answer


# standing


def test_the_first_member_stands_at_once_and_the_others_wait_for_their_turn():
    first, second = Member(1, 4), Member(2, 4)
    assert first.handle(MemberLost(0, "killed")) == [
        AskForOutcome((0, 2, 3)),
        AskForPromise((0, 2, 3), 1),
    ]
    assert second.handle(MemberLost(0, "killed")) == [AskForOutcome((0, 1, 3))]
    assert second.core.deadline == TURN
    assert AskForPromise((0, 1, 3), 2) in second.at(TURN).handle(TimePassed())


def test_a_member_that_was_lost_with_the_leader_has_no_turn():
    member = Member(2, 4)
    member.handle(MemberLost(0, "killed"))
    assert AskForPromise((0, 1, 3), 2) in member.handle(MemberAnswered(1, None, None))


def test_a_client_never_stands():
    member = Member(1, 4, can_serve=(True, False, True, True))
    member.handle(MemberLost(0, "killed"))
    member.at(30.0).handle(TimePassed())
    assert member.lead is Lead.LEADERLESS


def test_a_member_that_hears_its_leader_promises_nothing():
    member = Member(2, 4)
    assert reply(member.handle(PromiseAsked(1, 1))) == Undecided("READY", has_leader=True)
    assert member.core.election.voter.promised == 0


def test_a_member_that_lost_the_leader_promises_and_follows():
    member = Member(2, 4)
    member.handle(MemberLost(0, "killed"))
    assert member.handle(PromiseAsked(1, 1)) == [Reply(promised()), FollowLeader(1, 1)]
    assert member.handle(PromiseAsked(1, 1)) == [Reply(promised())]  # the answer was lost


def test_a_lower_term_is_refused():
    member = Member(3, 5)
    member.handle(MemberLost(0, "killed"), PromiseAsked(2, 7))
    member.handle(MemberLost(2, "killed"))
    assert reply(member.handle(PromiseAsked(1, 6))) == Refused(7)
    assert reply(member.handle(AcceptanceAsked(0, 0, COMMITTED))) == Refused(7)


def test_a_term_belongs_to_one_member():
    member = Member(3, 5)
    member.handle(MemberLost(0, "killed"))
    assert isinstance(reply(member.handle(PromiseAsked(1, 7))), Refused)
    assert isinstance(reply(member.handle(AcceptanceAsked(1, 7, COMMITTED))), Refused)


def test_a_candidate_that_is_refused_steps_down_and_stands_later_in_a_higher_term():
    member = Member(1, 4)
    member.handle(MemberLost(0, "killed"))
    effects = member.handle(MemberAnswered(2, 1, Refused(6)))
    assert effects == [StopLeading(), AskForOutcome((0, 2, 3))]
    effects = member.at(member.core.deadline).handle(TimePassed())
    (term,) = (effect.term for effect in effects if isinstance(effect, AskForPromise))
    assert term == 9


def test_a_candidate_without_a_quorum_tells_its_followers_that_it_steps_down():
    """They would hear nothing of it, and be in doubt until their patience ends."""
    member = Member(1, 5)
    member.handle(MemberLost(0, "killed"), MemberAnswered(2, 1, promised()))
    effects = member.at(STAND).handle(TimePassed())
    assert StopLeading() in effects
    assert member.lead is Lead.LEADERLESS


# leading


def elected(**options: object) -> tuple[Member, list[Effect]]:
    """Member 1 of 3, after the leader died, and what it does when the last member promises to follow."""
    member = Member(1)
    member.handle(MemberLost(0, "killed"))
    member.handle(MemberAnswered(0, 1, None))
    return member, follow(member, 2, **options)


def test_a_candidate_leads_once_a_quorum_knows_that_nothing_was_decided():
    """Before, another candidate may adopt what one of its own quorum accepted, and nothing may be undone."""
    member = Member(1, 5)
    member.handle(MemberLost(0, "killed"), MemberAnswered(0, 1, None))
    member.handle(*(MemberAnswered(other, 1, promised()) for other in (2, 3)))
    assert member.handle(MemberAnswered(4, 1, promised())) == [AskForPromise((2, 3, 4), 1, floor=1)]
    member.handle(MemberAnswered(2, 1, promised(floor=1)))
    assert member.lead is Lead.CANDIDATE
    member.handle(MemberAnswered(4, 1, promised(floor=1)))
    assert member.lead is Lead.LEADING


def test_a_candidate_that_has_told_its_floor_waits_for_nobody_else():
    """The old leader, which it cannot hear, may answer meanwhile."""
    member = Member(1, 5)
    member.handle(MemberLost(0, "killed"), MemberAnswered(0, 1, None))
    member.handle(*(MemberAnswered(other, 1, promised()) for other in (2, 3, 4)))
    member.handle(MemberAnswered(0, 1, Undecided("EXCHANGING", has_leader=True)))
    member.handle(*(MemberAnswered(other, 1, promised(floor=1)) for other in (2, 3)))
    assert member.lead is Lead.LEADING


def test_a_member_that_promises_late_or_did_not_hear_the_floor_is_told_it():
    member = Member(1, 5)
    member.handle(MemberLost(0, "killed"), *(MemberAnswered(other, 1, None) for other in (0, 4)))
    member.handle(*(MemberAnswered(other, 1, promised()) for other in (2, 3)))
    for late in (MemberAnswered(4, 1, promised()), MemberAnswered(2, 1, None)):
        (asked,) = member.handle(late)
        assert isinstance(asked, AskForPromise)
        assert (asked.members, asked.floor) == ((late.member,), 1)
    assert member.lead is Lead.CANDIDATE


def test_a_candidate_that_cannot_tell_its_floor_lets_others_stand():
    member = Member(1, 3)
    member.handle(MemberLost(0, "killed"), MemberAnswered(0, 1, None), MemberAnswered(2, 1, promised()))
    assert member.core.deadline == STAND
    assert StopLeading() in member.at(STAND).handle(TimePassed())
    assert member.lead is Lead.LEADERLESS


def test_a_member_keeps_a_floor_that_it_is_told():
    member = Member(2, 4)
    member.handle(MemberLost(0, "killed"), PromiseAsked(1, 1))
    assert member.handle(PromiseAsked(1, 1, floor=1)) == [Reply(promised(floor=1))]
    member.handle(MemberLost(1, "killed"))
    assert reply(member.handle(PromiseAsked(3, 7))) == promised(floor=1)


def test_a_new_leader_goes_on_without_the_old_one():
    member, effects = elected()
    assert member.lead is Lead.LEADING
    assert effects[:2] == [LeadMembers(1), AnnounceExclusion(LOST)]
    assert proposal(effects) == Outcome(None, (LOST,), (0.0, 1.0, 1.0), 0.0, 0.0)
    assert member.handle(MemberAnswered(2, 1, Accepted()))[0] == AnnounceOutcome(proposal(effects))
    assert member.core.phase is Phase.COMMITTED


def test_a_new_leader_adopts_what_a_member_of_its_quorum_accepted():
    decided = Outcome(None, (), (1.0, 1.0, 1.0))
    _, effects = elected(accepted=(0, decided))
    assert proposal(effects) == decided
    assert not any(isinstance(effect, AnnounceExclusion) for effect in effects)


def test_a_new_leader_adopts_nothing_from_below_a_floor():
    _, effects = elected(accepted=(0, Outcome(None, (), (1.0, 1.0, 1.0))), floor=1)
    assert proposal(effects).excluded == (LOST,)


def test_a_member_that_is_not_ready_is_waited_for_by_the_new_leader():
    member, effects = elected(phase=Phase.EXCHANGING)
    assert not any(isinstance(effect, AskForAcceptance) for effect in effects)
    assert proposal(member.handle(MemberReported(2, Ready(1.0)))).weights == (0.0, 1.0, 1.0)


def test_what_followers_report_before_the_election_counts_after_it():
    member = Member(1, 4)
    member.handle(MemberLost(0, "killed"), MemberAnswered(0, 1, None))
    member.handle(MemberAnswered(2, 1, promised(Phase.EXCHANGING)))
    assert member.handle(MemberReported(2, Ready(1.0))) == []
    assert proposal(follow(member, 3)).weights == (0.0, 1.0, 1.0, 1.0)


def test_a_follower_that_is_lost_before_the_election_is_lost_after_it():
    member = Member(1, 5)
    member.handle(MemberLost(0, "killed"), MemberAnswered(0, 1, None))
    member.handle(MemberAnswered(2, 1, promised(Phase.EXCHANGING)), MemberAnswered(3, 1, promised()))
    member.handle(MemberLost(2, "killed"))
    effects = follow(member, 4)
    assert [one.member for one in proposal(effects).excluded] == [0, 2]


def test_readiness_that_came_with_the_promise_may_be_reported_again():
    member, _ = elected()
    assert member.handle(MemberReported(2, Ready(1.0))) == []


def test_orders_that_a_member_knows_are_taken_over():
    order = Repair(Epoch(0, 1), (SpanId(0),), (2,))
    roles = Roles(1, (1, 0, 0), (True,) * 3)
    core = AllReduce(roles)
    for event in (SnapshotTaken(1.0), MemberLost(0, "killed"), MemberAnswered(0, 1, None)):
        core.handle(event, 0.0)
    for floor in (0, 1):
        standing = promised(Phase.EXCHANGING, orders=(order,), floor=floor)
        effects = core.handle(MemberAnswered(2, 1, standing), 0.0)
    assert AnnounceRepair(order) in effects
    assert [span.owner for span in core.ledger.assignment.spans] == [2]


def test_what_may_have_been_decided_is_dropped_by_no_order():
    """The founder was cut off, excluded the others and ordered a repair. It comes back, and accepts what they decide in
    a term of their own. The next leader meets the founder alone.
    """
    order, decided = Repair(Epoch(0, 1), (SpanId(2),), (0,)), Outcome(None, (LOST,), (0.0, 1.0, 1.0))
    core = AllReduce(Roles(2, (1, 0, 1), (True,) * 3))
    for event in (SnapshotTaken(1.0), MemberLost(0, "silent"), MemberAnswered(1, None, None)):
        core.handle(event, 0.0)
    standing = promised(orders=(order,), accepted=(1, decided))
    effects = core.handle(MemberAnswered(0, 2, standing), GATHER)
    assert proposal(effects) == decided
    assert not any(isinstance(effect, AnnounceRepair) for effect in effects)
    assert core.ledger.assignment.orders == ()


def test_the_word_of_a_leader_that_was_replaced_is_not_heard():
    member = Member(2, 4)
    member.handle(MemberLost(0, "killed"), PromiseAsked(1, 1))
    assert member.handle(ExclusionReceived(Excluded(2, "exchange", 0.0, "slow"), 0)) == []
    assert member.handle(RepairReceived(Repair(Epoch(0, 1), (), ()), 0)) == []
    assert member.core.phase is Phase.READY


def test_a_new_leader_that_is_lost_before_it_led_fails_nobody():
    """It may have promised to follow another candidate."""
    member = Member(2, 4, ready=False)
    member.handle(MemberLost(0, "killed"), PromiseAsked(1, 1), MemberLost(1, "it does not lead any more"))
    assert member.core.phase is Phase.EXCHANGING
    assert member.lead is Lead.CANDIDATE  # it is its turn


def test_clients_do_not_take_each_other_for_lost():
    """They cannot ask each other. A second leader that is lost would fail the round for them, though a quorum lives."""
    member = Member(3, 5, can_serve=(True, True, True, False, False), ready=False)
    member.handle(MemberLost(0, "killed"), MemberAnswered(4, None, None))
    member.handle(PromiseAsked(1, 1), ExclusionReceived(LOST, 1))
    assert AskForOutcome((0, 1, 2, 4)) in member.handle(MemberLost(1, "killed"))
    assert member.core.phase is Phase.EXCHANGING


# the outcome


@pytest.mark.parametrize("outcome", [COMMITTED, FAILED])
def test_a_member_that_lost_the_leader_takes_over_a_decision(outcome: Outcome):
    member = Member(2)
    member.handle(MemberLost(0, "killed"))
    assert Finish(outcome.reason) in member.handle(MemberAnswered(1, None, Knows(outcome)))


def test_a_member_tells_the_decision_that_it_knows():
    member = Member(1)
    member.handle(OutcomeReceived(COMMITTED))
    for question in (PromiseAsked(2, 2), AcceptanceAsked(2, 2, FAILED)):
        assert reply(member.handle(question)) == Knows(COMMITTED)


def test_a_ready_member_that_cannot_know_is_in_doubt():
    member = Member(2, 4)
    member.handle(MemberLost(0, "it is silent"))
    while member.core.phase is Phase.READY:
        effects = member.at(member.core.deadline).handle(TimePassed())
    assert member.core.phase is Phase.IN_DOUBT
    assert Finish("lost member 0: it is silent; others may have decided") in effects
    assert member.now == RoundTimeouts().doubt
    member.handle(OutcomeReceived(COMMITTED))
    assert member.core.phase is Phase.COMMITTED


def test_a_member_that_is_not_ready_does_not_doubt():
    member = Member(2, 4, ready=False)
    member.handle(MemberLost(0, "it is silent"))
    while member.core.phase is Phase.EXCHANGING:
        effects = member.at(member.core.deadline).handle(TimePassed())
    assert Finish("lost member 0: it is silent; no other leader was found") in effects


def test_a_pair_without_its_founder_cannot_decide():
    member = Member(1, 2, ready=False)
    assert Finish("lost member 0: killed") in member.handle(MemberLost(0, "killed"))


def test_a_member_that_gave_up_still_votes():
    member = Member(2, 4, ready=False)
    member.handle(MemberLost(0, "killed"))
    while member.core.phase is Phase.EXCHANGING:
        member.at(member.core.deadline).handle(TimePassed())
    answer = reply(member.handle(PromiseAsked(1, 9)))
    assert isinstance(answer, Promised)
    assert (answer.phase, answer.failure) == ("FAILED", member.core.failure)
    assert reply(member.handle(AcceptanceAsked(1, 9, WITHOUT_2))) == Accepted()
    assert reply(member.handle(AcceptanceAsked(0, 8, FAILED))) == Refused(9)


def test_reports_of_a_member_without_a_leader_wait_for_the_next_one():
    member = Member(2, 4, ready=False)
    member.handle(MemberLost(0, "killed"))
    assert not any(isinstance(effect, TellLeader) for effect in member.handle(SnapshotTaken(1.0)))
    assert isinstance(answer := reply(member.handle(PromiseAsked(1, 1))), Promised)
    assert (answer.phase, answer.weight) == ("READY", 1.0)


def test_a_complaint_of_what_came_after_all_is_not_told_to_a_new_leader():
    """It would be a lie of a ready member, or break the core that tells it to itself."""
    core, span = AllReduce(Roles(1, (1, 0, 0), (True,) * 3)), SpanId(0)
    for event in (SnapshotTaken(1.0), OwnerLost(span, "slow", Loss.TIMED_OUT), MemberLost(0, "killed")):
        core.handle(event, 0.0)
    told = TellLeader(OwnerFailed(span, "slow", Loss.TIMED_OUT))
    assert core.ledger.complain_again() == [told]
    core.handle(AverageReceived(span, 0), 0.0)
    core.handle(SpanReceived(SpanAveraged(span, (1.0,) * 3, None, None)), 0.0)
    assert core.phase is Phase.READY
    assert core.ledger.complain_again() == []


def test_a_complaint_that_a_promise_overtook_makes_no_liar_of_a_ready_member():
    core = AllReduce(Roles(1, (1, 0, 0), (True,) * 3))
    averaged = SpanAveraged(SpanId(0), (1.0,) * 3, None, None)
    for event in (
        SnapshotTaken(1.0),
        MemberLost(0, "killed"),
        MemberAnswered(0, 1, None),
        *(MemberAnswered(2, 1, promised(spans=(averaged,), floor=floor)) for floor in (0, 1)),
    ):
        core.handle(event, 0.0)
    assert core.election.lead is Lead.LEADING
    report = OwnerFailed(SpanId(0), "slow", Loss.TIMED_OUT)
    assert core.handle(MemberReported(2, report), 5.0) == []


def test_an_answer_that_was_asked_for_before_a_death_counts_for_nothing():
    """The member that died may have told the decision to the one that answers, after it had answered."""
    member = Member(1, 5)
    member.handle(MemberLost(0, "cut"), *(MemberAnswered(one, None, None, is_dead=True) for one in (3, 4)))
    member.handle(MemberAnswered(0, None, None, is_dead=True))
    term = member.core.election.term
    stale = MemberAnswered(2, term, Undecided("READY", has_leader=False), burials=2)
    effects = member.handle(stale)
    assert member.core.phase is Phase.READY
    (again,) = (one for one in effects if isinstance(one, AskForOutcome | AskForPromise))
    assert (again.members, again.burials) == ((2,), 3)


def test_a_member_that_gave_up_accepts_nothing_that_counts_it():
    member = Member(2, 4, ready=False)
    member.handle(MemberLost(0, "killed"))
    while member.core.phase is Phase.EXCHANGING:
        member.at(member.core.deadline).handle(TimePassed())
    assert reply(member.handle(AcceptanceAsked(1, 9, COMMITTED))) == Undecided("FAILED", has_leader=False)


def propose_with_all(founder: Member) -> None:
    """All others are ready, so that the founder proposes to commit."""
    for other in founder.core.roles.others:
        founder.handle(MemberReported(other, Ready(1.0)))
    assert founder.core.is_bound


def test_a_leader_that_proposed_waits_for_news_of_a_member_that_lives():
    member = Member(0, 5)
    propose_with_all(member)
    for dead in (1, 2, 3):
        member.handle(MemberAnswered(dead, 0, None, is_dead=True))
    assert member.core.phase is Phase.READY  # member 4 may know of a decision by another leader
    member.handle(MemberAnswered(4, 0, Knows(COMMITTED)))
    assert member.core.phase is Phase.COMMITTED


def test_time_in_which_the_process_was_stopped_does_not_count_against_the_doubt():
    member = Member(0, 3)
    propose_with_all(member)
    effects = member.at(member.core.deadline + 300.0).handle(TimePassed(late=300.0))
    assert member.core.phase is Phase.READY, effects
    member.handle(MemberAnswered(1, 0, Knows(COMMITTED)))
    assert member.core.phase is Phase.COMMITTED


def test_a_leader_below_an_acceptance_is_not_heard():
    member = Member(2, 5)
    member.handle(AcceptanceAsked(1, 6, COMMITTED))
    assert not member.core.decision.hears(0)


@pytest.mark.parametrize("me", [0, 2], ids=["the leader", "a follower"])
def test_a_member_that_accepts_a_later_leaders_proposal_leaves_the_former_one(me: int):
    """It would hear neither: not the former one, whose term is over, nor the later one, which it has not joined."""
    member = Member(me, 5, ready=False)
    effects = member.handle(AcceptanceAsked(1, 6, COMMITTED))
    assert reply(effects) == Accepted()
    assert (StopLeading() in effects) == (me == 0)
    assert member.lead is Lead.LEADERLESS
    assert any(isinstance(effect, AskForOutcome) for effect in effects)


def test_a_candidate_that_accepts_a_later_leaders_proposal_stands_no_more():
    member = Member(1, 5)
    member.handle(MemberLost(0, "killed"))
    assert member.lead is Lead.CANDIDATE
    effects = member.handle(AcceptanceAsked(2, 7, COMMITTED))
    assert reply(effects) == Accepted()
    assert StopLeading() in effects
    assert member.lead is Lead.LEADERLESS
