"""What a member may conclude from silence, refusals, goodbyes and answers: when it fails, and when it is in doubt."""

from __future__ import annotations

import pytest
from tests.averaging.allreduce.aimed import Aimed, founder_proposes
from tests.averaging.allreduce.test_election import (
    COMMITTED,
    FAILED,
    Member,
    follow,
    promised,
    proposal,
    reply,
)

from shoal.averaging.allreduce.assignment import Epoch, Repair, SpanId
from shoal.averaging.allreduce.core import AllReduce
from shoal.averaging.allreduce.effects import AskForOutcome, AskForPromise, Finish, StopLeading
from shoal.averaging.allreduce.events import (
    AcceptanceAsked,
    AverageReceived,
    Event,
    ExclusionReceived,
    JoinTimedOut,
    Lead,
    MemberAnswered,
    MemberLeft,
    MemberLost,
    MemberReported,
    Phase,
    PromiseAsked,
    RepairReceived,
    Roles,
    SnapshotTaken,
    SpanReceived,
    VoteHandedOn,
    Withdrawn,
)
from shoal.averaging.allreduce.evidence import NOT_KNOWN_FOR, Hope
from shoal.averaging.allreduce.messages import (
    Accepted,
    Excluded,
    NotKnown,
    Promised,
    Ready,
    SpanAveraged,
    Undecided,
)
from shoal.averaging.allreduce.patience import GIVE_UP_AFTER
from shoal.sansio.core import TimePassed

NO_NEWS = Undecided("READY", has_leader=False)


def wait(member: Member, phase: Phase = Phase.READY) -> Member:
    """Let time pass until the member has ended its round."""
    while member.core.phase is phase:
        member.at(member.core.deadline).handle(TimePassed())
    return member


def answered(member: Member, other: int, answer: object) -> MemberAnswered:
    """To a question of now."""
    burials = member.core.election.evidence.burials
    return MemberAnswered(other, None, answer, burials=burials)  # type: ignore[arg-type]


def refused(other: int) -> MemberAnswered:
    return MemberAnswered(other, None, None, is_dead=True)


# taken for dead: this decides nothing


def test_a_ready_member_whose_founder_is_killed_is_in_doubt():
    """The founder of a pair decides alone, and may have told its user before it died."""
    member = Member(1, 2)
    member.handle(MemberLost(0, "killed"), refused(0))
    assert member.core.phase is Phase.READY
    wait(member)
    assert (member.core.phase, member.now) == (Phase.IN_DOUBT, GIVE_UP_AFTER)


def test_a_member_that_is_not_ready_fails_at_once():
    member = Member(1, 2, ready=False)
    member.handle(MemberLost(0, "killed"))
    assert member.core.phase is Phase.FAILED


def test_all_others_refused_may_be_a_firewall():
    member = Member(2, 4)
    member.handle(MemberLost(0, "reset"), *(refused(other) for other in (0, 1, 3)))
    assert member.core.election.evidence.hope is Hope.NONE
    wait(member)
    assert (member.core.phase, member.now) == (Phase.IN_DOUBT, GIVE_UP_AFTER)


def test_a_member_that_is_taken_for_dead_is_asked_on_and_may_come_back():
    member = Member(2, 4)
    member.handle(MemberLost(0, "reset"))
    effects = member.handle(refused(0))
    assert any(isinstance(one, AskForOutcome) and one.members == (0,) for one in effects)
    assert member.core.election.evidence.dead == {0}
    member.handle(answered(member, 0, NO_NEWS))
    assert member.core.election.evidence.dead == set()


def test_a_member_that_is_taken_for_dead_and_asks_counts_as_living():
    member = Member(2, 4)
    member.handle(MemberLost(0, "reset"), refused(1), PromiseAsked(1, 5))
    assert member.core.election.evidence.dead == set()


def test_a_member_that_does_not_know_the_round_yet_may_learn_of_it():
    member = Member(2, 3)
    member.handle(MemberLost(0, "reset"), answered(member, 1, NotKnown()))
    assert member.core.election.evidence.dead == set()
    member.at(NOT_KNOWN_FOR).handle(answered(member, 1, NotKnown()))
    assert member.core.election.evidence.dead == {1}


def test_a_leader_that_finds_all_others_dead_is_in_doubt():
    """They may follow another leader behind a firewall, and decide what this one proposed."""
    member = Member(0, 3)
    for other in (1, 2):
        member.handle(MemberReported(other, Ready(1.0)))
    member.handle(*(MemberAnswered(other, 0, None, is_dead=True) for other in (1, 2)))
    wait(member)
    assert (member.core.phase, member.now) == (Phase.IN_DOUBT, GIVE_UP_AFTER)


def test_a_leader_that_cannot_have_the_round_failed_gives_up():
    """Nobody counts it: a quorum knows that no former leader's proposal was decided, and it has told no later one."""
    member = Member(1, 5, min_size=5)
    member.handle(MemberLost(0, "cut"), MemberAnswered(0, 1, None), MemberAnswered(4, 1, None))
    member.handle(MemberAnswered(2, 1, promised()))
    assert "fewer than min_group_size=5" in (proposal(follow(member, 3)).reason or "")
    assert wait(member).core.phase is Phase.FAILED


@pytest.mark.parametrize("other", [1, 2, 3])
def test_half_of_a_group_without_its_founder_doubts_as_soon_as_one_that_is_alone(other: int):
    """One of the two that are left stands in vain. The promise of the other one is no reason to hope for news."""
    group = Aimed(5, sizes=(4,))
    began: list[float] = []

    def die(me: int) -> None:
        began.append(group.now)
        group.kill(0)
        group.kill(other)

    group.when(founder_proposes, die)
    group.run()
    assert group.check() == "in doubt"
    assert [one.core.phase for one in group.living()] == [Phase.IN_DOUBT] * 2
    assert group.now < began[0] + GIVE_UP_AFTER + 1.0


def test_a_founder_that_nobody_has_heard_of_fails_at_once():
    """It was stopped as its group formed: its followers left before they heard that it begins."""
    member = Member(0, 4, ready=False, min_size=2)
    member.handle(*(JoinTimedOut(other, "it left") for other in (1, 2, 3)))
    for other in (1, 2):
        member.handle(MemberAnswered(other, 0, NotKnown()))
        assert member.core.phase is Phase.EXCHANGING
    member.handle(MemberAnswered(3, 0, NotKnown()))
    assert (member.core.phase, member.now) == (Phase.FAILED, 0.0)


def test_a_founder_that_one_member_follows_waits_for_the_others():
    """The one would have nobody else to follow."""
    member = Member(0, 5, ready=False, min_size=3)
    member.handle(*(JoinTimedOut(other, "it left") for other in (1, 2, 3)))
    member.handle(
        *(MemberAnswered(other, 0, NotKnown()) for other in (1, 2, 3)), MemberAnswered(4, 0, Accepted())
    )
    assert member.core.phase is Phase.EXCHANGING


# left: what it proves


def test_all_others_left_after_this_member_was_ready():
    """They may have decided before: nobody is left to ask, so that the doubt comes at once."""
    member = Member(2, 4)
    member.handle(MemberLost(0, "goodbye"), *(MemberLeft(other) for other in (0, 1, 3)))
    assert (member.core.phase, member.now) == (Phase.IN_DOUBT, 0.0)


def test_members_that_left_before_have_accepted_nothing():
    """The founder alone is no quorum of three."""
    member = Member(1, 3, ready=False)
    member.handle(MemberLeft(2), SnapshotTaken(1.0), MemberLost(0, "killed"), refused(0))
    assert (member.core.phase, member.now) == (Phase.FAILED, 0.0)


def test_a_founder_that_left_alone_has_decided_nothing_if_no_other_accepted():
    """Member 3 left before this one was ready, member 1 has accepted nothing: the founder was alone."""
    member = Member(2, 4, ready=False)
    member.handle(MemberLeft(3), SnapshotTaken(1.0), MemberLost(0, "goodbye"), MemberLeft(0))
    assert member.core.phase is Phase.READY  # member 1 has not been heard
    member.handle(answered(member, 1, NO_NEWS))
    assert member.core.phase is Phase.FAILED


@pytest.mark.parametrize("accepts", ["this member", "the other one"])
def test_a_founder_that_left_may_have_counted_an_acceptance(accepts: str):
    member = Member(2, 4, ready=False)
    member.handle(MemberLeft(3), SnapshotTaken(1.0))
    if accepts == "this member":
        assert reply(member.handle(AcceptanceAsked(0, 0, COMMITTED))) == Accepted()
    other = Undecided("READY", has_leader=False, has_accepted=accepts == "the other one")
    member.handle(MemberLost(0, "goodbye"), MemberLeft(0), answered(member, 1, other))
    assert member.core.phase is not Phase.FAILED
    assert wait(member).core.phase is Phase.IN_DOUBT


def test_an_answer_from_before_a_goodbye_proves_nothing():
    member = Member(2, 4, ready=False)
    member.handle(MemberLeft(3), SnapshotTaken(1.0), MemberLost(0, "goodbye"))
    before = answered(member, 1, NO_NEWS)
    member.handle(MemberLeft(0), before)
    assert member.core.phase is Phase.READY


def test_readiness_that_nobody_heard_of_contradicts_nothing():
    """It became ready when it had no leader any more."""
    member = Member(2, 4, ready=False)
    member.handle(MemberLost(0, "killed"), SnapshotTaken(1.0), refused(0), refused(1))
    member.handle(answered(member, 3, NO_NEWS))
    assert member.core.phase is Phase.FAILED


def test_a_promise_tells_that_this_member_is_ready():
    member = Member(2, 4, ready=False)
    member.handle(MemberLost(0, "killed"), SnapshotTaken(1.0), PromiseAsked(1, 1), MemberLost(1, "killed"))
    member.handle(refused(0), refused(1), answered(member, 3, NO_NEWS))
    assert wait(member).core.phase is Phase.IN_DOUBT


def test_a_leader_that_was_ready_before_it_led_may_give_up():
    """What the founder may have proposed is void: a quorum knows that."""
    member = Member(1, 5)
    member.handle(MemberLost(0, "cut"), MemberAnswered(0, 1, None))
    for other in (2, 3, 4):
        follow(member, other, phase=Phase.EXCHANGING)
    assert member.lead is Lead.LEADING
    effects = member.handle(Withdrawn("cancelled"))
    assert StopLeading() in effects
    assert member.core.phase is Phase.FAILED


def ready_with(*events: Event) -> AllReduce:
    """Member 2 of 5 that was ready in the first epoch, and what happened then."""
    core, span = AllReduce(Roles(2, (1, 0, 0, 0, 0), (True,) * 5)), SpanId(0)
    averaged = SpanAveraged(span, (1.0,) * 5, None, None)
    for event in (SnapshotTaken(1.0), AverageReceived(span, 0), SpanReceived(averaged), *events):
        core.handle(event, 0.0)
    return core


def test_a_member_that_averages_anew_is_counted_by_no_former_leader():
    """The founder may have proposed what this member held when it was ready. A quorum knows that this is void."""
    repair = RepairReceived(Repair(Epoch(1, 1), (SpanId(0),), (1,)), 1)
    core = ready_with(MemberLost(0, "cut"), PromiseAsked(1, 1), repair)
    assert core.phase is Phase.EXCHANGING
    core.handle(Withdrawn("cancelled"), 0.0)
    assert core.phase is Phase.FAILED


def test_a_leader_that_repairs_has_proposed_nothing():
    core = ready_with(RepairReceived(Repair(Epoch(0, 1), (SpanId(0),), (1,))), Withdrawn("cancelled"))
    assert core.phase is Phase.FAILED


# the casting vote


def founder(size: int = 4) -> Member:
    return Member(0, size, ready=False)


def test_a_founder_that_leaves_hands_on_its_casting_vote():
    member = founder()
    assert StopLeading(1) in member.handle(Withdrawn("it leaves", leaves=True))
    assert reply(member.handle(PromiseAsked(1, 1))) == Undecided("FAILED", has_leader=False)
    assert reply(member.handle(AcceptanceAsked(1, 1, FAILED))) == Undecided("FAILED", has_leader=False)


def test_the_heir_seems_to_live():
    member = founder(6)
    member.handle(MemberLost(1, "killed"))
    assert StopLeading(2) in member.handle(Withdrawn("it leaves", leaves=True))


@pytest.mark.parametrize(("size", "leaves"), [(4, False), (5, True)], ids=["it goes on to vote", "odd group"])
def test_a_casting_vote_is_kept(size: int, leaves: bool):
    member = founder(size)
    assert StopLeading() in member.handle(Withdrawn("cancelled", leaves=leaves))
    assert not member.core.election.voter.is_closed


def test_a_founder_that_has_proposed_keeps_its_vote():
    """It has accepted its own proposal, and may be half of a quorum."""
    member = Member(0, 4)
    for other in (1, 2, 3):
        member.handle(MemberReported(other, Ready(1.0)))
    member.handle(Withdrawn("it leaves", leaves=True))
    assert not member.core.election.voter.is_closed


def test_the_heir_and_another_one_decide_for_four():
    heir = Member(1, 4)
    heir.handle(VoteHandedOn(), MemberLost(0, "it does not lead any more"), MemberLeft(0))
    heir.handle(MemberAnswered(3, 1, None))
    follow(heir, 2)
    assert heir.lead is Lead.LEADING
    heir.handle(MemberAnswered(2, 1, Accepted()))
    assert heir.core.phase is Phase.COMMITTED


def test_a_candidate_hears_from_the_heir_that_it_has_the_casting_vote():
    member = Member(2, 4)
    member.handle(MemberLost(0, "it does not lead any more"), MemberLeft(0), MemberAnswered(3, None, None))
    effects = member.at(member.core.deadline).handle(TimePassed())
    (term,) = (one.term for one in effects if isinstance(one, AskForPromise))
    follow(member, 1, casts=True)
    assert member.lead is Lead.LEADING
    member.handle(MemberAnswered(1, term, Accepted(casts=True)))
    assert member.core.phase is Phase.COMMITTED


def test_half_without_the_casting_vote_decides_nothing():
    member = Member(2, 4)
    member.handle(MemberLost(0, "it does not lead any more"), MemberLeft(0), MemberAnswered(3, None, None))
    effects = member.at(member.core.deadline).handle(TimePassed())
    (term,) = (one.term for one in effects if isinstance(one, AskForPromise))
    member.handle(MemberAnswered(1, term, promised()))
    member.at(member.now + 2.0).handle(TimePassed())
    assert member.lead is Lead.CANDIDATE


def test_the_heir_says_so_with_every_vote():
    heir = Member(1, 4)
    heir.handle(VoteHandedOn(), MemberLost(0, "it does not lead any more"))
    assert heir.core.answer() == Undecided("READY", has_leader=False, casts=True)
    answer = reply(heir.handle(PromiseAsked(2, 6)))
    assert isinstance(answer, Promised)
    assert answer.casts
    assert reply(heir.handle(AcceptanceAsked(2, 6, COMMITTED))) == Accepted(casts=True)


def test_an_excluded_member_fails_plainly():
    member = Member(2, 4)
    member.handle(ExclusionReceived(Excluded(2, "exchange", 0.0, "slow")))
    effects = member.handle(MemberLost(0, "killed"), refused(0), refused(1), refused(3))
    assert any(isinstance(one, Finish) for one in effects)
    assert member.core.phase is Phase.FAILED
