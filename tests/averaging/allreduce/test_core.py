"""The pure core of one round, in hand-made cases; whole groups are in test_allreduce_swarm.py."""

from __future__ import annotations

import pytest

from shoal.averaging.allreduce.core import AllReduce
from shoal.averaging.allreduce.events import (
    AnnounceExclusion,
    AnnounceOutcome,
    AskForOutcome,
    AveragePart,
    AverageReceived,
    DropSender,
    Effect,
    Event,
    ExchangeOpened,
    ExcludedByOwner,
    ExclusionReceived,
    Finish,
    MemberLost,
    MemberReported,
    OutcomeAnswered,
    OutcomeReceived,
    OwnerLost,
    PartAveraged,
    PartDelivered,
    PartSent,
    Phase,
    ReturnAverage,
    Roles,
    RoundTimeouts,
    SenderAwaited,
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
    SenderExcluded,
    SpanAveraged,
    StandsAside,
)
from shoal.errors import AllreduceException, ProtocolViolation
from shoal.sansio.core import NEVER, TimePassed

TIMEOUTS = RoundTimeouts(None, sender=10.0, reducer=20.0)


LIMIT = 21.0
"""How long the leader awaits a member: ``reducer``, and the interval between two words of progress."""


class Member:
    """A core with a clock: ``at`` sets the time of what follows."""

    def __init__(
        self,
        me: int,
        owned: tuple[int, ...] = (1, 1),
        contributes: tuple[bool, ...] | None = None,
        timeouts: RoundTimeouts = TIMEOUTS,
    ) -> None:
        self.core = AllReduce(Roles(me, owned, contributes or (True,) * len(owned)), timeouts)
        self.now = 0.0

    @property
    def phase(self) -> Phase:
        return self.core.phase

    def at(self, now: float) -> Member:
        self.now = now
        return self

    def handle(self, *events: Event) -> list[Effect]:
        """All events in turn; the effects of the last one."""
        effects: list[Effect] = []
        for event in events:
            effects = self.core.handle(event, self.now)
        return effects

    def make_ready(self) -> list[Effect]:
        """In a pair, each of which owns one part."""
        other = 1 - self.core.roles.me
        self.handle(SnapshotTaken(1.0), WeightDeclared(other, 1.0), PartDelivered(other, 0), PartAveraged(0))
        return self.handle(AverageReceived(other, 0))


def excluded(effects: list[Effect]) -> list[int]:
    return [effect.excluded.member for effect in effects if isinstance(effect, AnnounceExclusion)]


def failure(effects: list[Effect]) -> str | None:
    """Why the leader failed the round for everybody, if it did."""
    return next((e.outcome.reason for e in effects if isinstance(e, AnnounceOutcome)), None)


# the exchange


def test_a_part_is_averaged_once_every_contributor_has_delivered_it():
    member = Member(0, (2, 0, 0), (True, True, False))
    assert member.handle(WeightDeclared(1, 1.0), PartDelivered(1, 0)) == []
    assert member.handle(SnapshotTaken(1.0)) == [AveragePart(0)]
    assert member.handle(PartDelivered(1, 1)) == [AveragePart(1)]
    assert member.handle(PartAveraged(0)) == [ReturnAverage(0)]


def test_a_member_reports_ready_only_when_it_holds_every_average():
    member = Member(1)
    assert member.handle(SnapshotTaken(3.0), WeightDeclared(0, 2.0), PartDelivered(0, 0)) == [AveragePart(0)]
    assert member.handle(PartAveraged(0, 0.5, 0.25)) == [
        ReturnAverage(0),
        TellLeader(SpanAveraged((2.0, 3.0), 0.5, 0.25)),
    ]
    assert member.handle(AverageReceived(0, 0)) == [TellLeader(Ready(3.0))]
    assert member.phase is Phase.READY


def test_an_auxiliary_member_averages_after_its_trigger_and_commits_with_the_leader():
    member = Member(1, (0, 1), (True, False))
    assert member.handle(WeightDeclared(0, 1.0), PartDelivered(0, 0)) == []
    assert member.handle(SnapshotTaken(7.0)) == [AveragePart(0)]
    assert member.handle(PartAveraged(0)) == [
        ReturnAverage(0),
        TellLeader(SpanAveraged((1.0, 0.0), None, None)),
    ]
    assert member.phase is Phase.EXCHANGING
    assert member.handle(OutcomeReceived(Outcome(None))) == [Finish()]


def test_nobody_waits_for_a_member_with_weight_0():
    member = Member(0, (1, 0))
    assert member.handle(SnapshotTaken(1.0)) == []
    assert member.handle(WeightDeclared(1, 0.0)) == [AveragePart(0)]
    with pytest.raises(ProtocolViolation, match="declared no weight"):
        member.handle(PartDelivered(1, 0))


def test_a_member_with_weight_0_waits_for_averages_like_any_other():
    member = Member(1, (1, 0))
    assert member.handle(SnapshotTaken(0.0)) == []
    assert member.handle(AverageReceived(0, 0)) == [TellLeader(Ready(0.0))]


@pytest.mark.parametrize("weight", [-1.0, float("nan"), float("inf")])
def test_a_weight_that_is_none_is_a_violation(weight: float):
    with pytest.raises(ProtocolViolation, match="declared the weight"):
        Member(0).handle(WeightDeclared(1, weight))


@pytest.mark.parametrize(
    "event",
    [
        PartDelivered(1, 0),
        PartDelivered(0, 0),
        AverageReceived(1, 1),
        AverageReceived(0, 0),
        OutcomeReceived(Outcome(None)),
        WeightDeclared(0, 1.0),
    ],
    ids=str,
)
def test_what_no_honest_peer_sends_is_a_violation_and_changes_nothing(event: Event):
    member = Member(0)
    with pytest.raises(ProtocolViolation):
        member.handle(event)
    assert member.phase is Phase.EXCHANGING
    assert member.handle(WeightDeclared(1, 1.0), PartDelivered(1, 0)) == []
    with pytest.raises(ProtocolViolation, match="twice"):
        member.handle(WeightDeclared(1, 1.0))


# timeouts


def test_a_sender_that_stalls_is_left_out_of_what_it_has_not_delivered():
    member = Member(1, (0, 2, 0))
    assert member.handle(SnapshotTaken(1.0), WeightDeclared(0, 1.0), WeightDeclared(2, 1.0)) == []
    member.at(4.0).handle(PartDelivered(0, 0), PartDelivered(0, 1))
    assert member.at(5.0).handle(PartDelivered(2, 0)) == [AveragePart(0)]
    assert member.core.deadline == 15.0
    assert member.at(14.9).handle(TimePassed()) == []
    reason = "it sent no further part, or took no average, within sender_timeout=10 s"
    assert member.at(15.0).handle(TimePassed()) == [
        DropSender(2, reason),
        AveragePart(1),
        TellLeader(SenderExcluded(2, reason)),
    ]
    assert member.core.deadline == NEVER


def test_a_sender_that_never_comes_is_awaited_from_the_owners_own_snapshot_on():
    member = Member(1, (0, 2, 0))
    member.handle(WeightDeclared(0, 1.0), PartDelivered(0, 0))
    assert member.core.deadline == NEVER  # the own user may take any time
    member.at(50.0).handle(SnapshotTaken(1.0))
    assert member.core.deadline == 60.0
    assert DropSender(2, "it sent no part within sender_timeout=10 s") in member.at(60.0).handle(TimePassed())


def test_the_clock_of_a_sender_stands_still_while_it_is_held():
    member = Member(1, (0, 5))
    member.handle(SnapshotTaken(1.0), WeightDeclared(0, 1.0), PartDelivered(0, 0), SenderHeld(0))
    assert member.core.deadline == NEVER
    member.at(100.0).handle(SenderAwaited(0))
    assert member.core.deadline == 110.0


def test_a_sender_that_was_held_before_the_snapshot_stays_so():
    member = Member(1, (0, 5))
    member.handle(WeightDeclared(0, 1.0), PartDelivered(0, 0), SenderHeld(0), SnapshotTaken(1.0))
    assert member.core.deadline == NEVER


def test_time_by_which_the_owner_itself_is_late_does_not_count():
    member = Member(1, (0, 1))
    member.handle(SnapshotTaken(1.0))
    assert member.at(500.0).handle(TimePassed(late=490.0)) == []
    assert member.core.deadline == 501.0
    assert member.at(501.0).handle(TimePassed()) != []


def test_the_clock_of_an_owner_runs_while_it_has_all_that_it_needs_of_this_member():
    member = Member(1, (2, 0))
    member.handle(SnapshotTaken(1.0))
    assert member.core.deadline == 20.0  # it may never open
    member.at(10.0).handle(ExchangeOpened(0))
    assert member.core.deadline == NEVER  # this member's own part is on its way
    member.at(50.0).handle(PartSent(0, 0))
    assert member.core.deadline == 70.0
    member.at(60.0).handle(PartSent(0, 1))
    assert member.core.deadline == 70.0
    member.at(65.0).handle(AverageReceived(0, 0))
    assert member.core.deadline == 85.0
    assert member.at(85.0).handle(TimePassed()) == [
        TellLeader(OwnerFailed(0, "it returned no average within reducer_timeout=20 s", Loss.TIMED_OUT))
    ]
    assert member.at(200.0).handle(TimePassed()) == []


def test_the_clock_of_an_owner_runs_at_once_for_a_member_with_weight_0():
    member = Member(1, (2, 0))
    member.handle(SnapshotTaken(0.0))
    member.at(10.0).handle(ExchangeOpened(0))
    assert member.core.deadline == 30.0


def test_without_timeouts_there_is_no_deadline():
    member = Member(1, (1, 1), timeouts=RoundTimeouts())
    member.handle(SnapshotTaken(1.0), ExchangeOpened(0), PartSent(0, 0))
    assert member.core.deadline == NEVER
    assert member.at(1e9).handle(TimePassed()) == []


@pytest.mark.parametrize("waiting", [0, 2], ids=["the leader", "an owner"])
def test_an_owner_that_times_out_fails_the_round_for_everybody(waiting: int):
    leader = Member(0, (0, 1, 1))
    leader.handle(SnapshotTaken(1.0))
    report = MemberReported(2, OwnerFailed(1, "too slow", Loss.TIMED_OUT))
    effects = leader.handle(report) if waiting else leader.at(20.0).handle(TimePassed())
    assert f"member {waiting} got no averages from member 1: " in (failure(effects) or "")


def test_a_member_that_owns_nothing_cannot_fail_the_round_by_calling_an_owner_slow():
    leader = Member(0, (1, 1, 0))
    assert excluded(leader.handle(MemberReported(2, OwnerFailed(1, "too slow", Loss.TIMED_OUT)))) == [2]
    # the word of an owner is believed
    effects = leader.handle(MemberReported(1, OwnerFailed(0, "too slow", Loss.TIMED_OUT)))
    assert failure(effects) == "member 1 got no averages from member 0: too slow"


def test_members_that_own_nothing_are_believed_when_all_of_them_call_the_owner_slow():
    """Its user may never have given the trigger: it must not be left behind in a round of its own."""
    leader = Member(0, (1, 0, 0))
    assert excluded(leader.handle(MemberReported(2, OwnerFailed(0, "too slow", Loss.TIMED_OUT)))) == [2]
    effects = leader.handle(MemberReported(1, OwnerFailed(0, "too slow", Loss.TIMED_OUT)))
    assert failure(effects) == "member 1 got no averages from member 0: too slow"


def averaged_everything(owned: tuple[int, ...], contributes: tuple[bool, ...] | None = None) -> Member:
    """A leader that is ready, with what it could hear from an owner: member 1."""
    leader = Member(0, owned, contributes)
    others = [member for member in range(1, len(owned)) if contributes is None or contributes[member]]
    leader.handle(SnapshotTaken(1.0))
    for member in others:
        leader.handle(WeightDeclared(member, 1.0), PartDelivered(member, 0))
    leader.handle(PartAveraged(0), AverageReceived(1, 0))
    return leader


def test_who_is_not_ready_when_everything_was_averaged_is_awaited_and_then_excluded():
    leader = averaged_everything((1, 1, 0))
    leader.handle(MemberReported(1, SpanAveraged((1.0,) * 3, None, None)), MemberReported(1, Ready(1.0)))
    assert leader.core.deadline == LIMIT
    leader.at(15.0).handle(MemberReported(2, AveragesReceived(1)))  # it does take averages
    assert leader.core.deadline == 15.0 + LIMIT
    effects = leader.at(15.0 + LIMIT).handle(TimePassed())
    assert excluded(effects) == [2]
    assert leader.phase is Phase.COMMITTED


def test_nobody_is_awaited_while_an_owner_may_still_wait_for_parts():
    leader = Member(0, (1, 1, 0))
    leader.handle(SnapshotTaken(0.0), MemberReported(2, Ready(1.0)))
    leader.core.collection.clocks.clear()
    leader.core.returns.clocks.clear()
    assert leader.core.deadline == NEVER


def test_an_owner_that_never_says_what_it_averaged_is_not_waited_for():
    """Only an auxiliary one can hold up the others by that, which are all ready."""
    leader = averaged_everything((1, 1, 0), (True, False, True))
    leader.handle(MemberReported(2, Ready(1.0)))
    assert leader.core.deadline == LIMIT
    assert excluded(leader.at(LIMIT).handle(TimePassed())) == [1]
    assert leader.phase is Phase.COMMITTED


@pytest.mark.parametrize("counts", [(1, 1), (2,), (3,)])
def test_progress_that_is_none_breaks_the_protocol(counts: tuple[int, ...]):
    leader = Member(0, (1, 1, 0))
    *before, last = [MemberReported(2, AveragesReceived(count)) for count in counts]
    leader.handle(*before)
    with pytest.raises(ProtocolViolation, match="out of turn or too many"):
        leader.handle(last)


def test_a_member_tells_the_leader_now_and_then_that_averages_come():
    member = Member(2, (3, 3, 0))
    member.handle(SnapshotTaken(1.0))
    assert member.handle(AverageReceived(0, 0)) == [TellLeader(AveragesReceived(1))]
    assert member.at(0.9).handle(AverageReceived(0, 1)) == []
    assert member.at(1.0).handle(AverageReceived(1, 0)) == [TellLeader(AveragesReceived(3))]


# exclusion


def test_the_leader_tells_everybody_whom_an_owner_excludes():
    leader = Member(0, (1, 1, 0))
    leader.handle(SnapshotTaken(1.0))
    effects = leader.at(3.0).handle(MemberReported(1, SenderExcluded(2, "NaN")))
    assert effects == [
        AnnounceExclusion(Excluded(2, "exchange", 3.0, "excluded by member 1: NaN")),
        DropSender(2, "excluded by member 1: NaN"),
    ]
    assert leader.handle(MemberReported(1, SenderExcluded(2, "NaN"))) == []


def test_an_excluded_member_without_a_span_is_done():
    member = Member(1, (1, 0))
    assert member.handle(SnapshotTaken(1.0), ExcludedByOwner(0, "slow")) == [
        TellLeader(StandsAside("exchange", "excluded by member 0: slow")),
        Finish("excluded by member 0: slow"),
    ]


def test_an_excluded_owner_serves_until_the_group_is_decided():
    member = Member(2, (1, 1, 1))
    member.handle(SnapshotTaken(1.0))
    assert member.handle(ExclusionReceived(Excluded(2, "exchange", 1.0, "slow"))) == [StopContributing()]
    assert member.phase is Phase.EXCLUDED
    member.handle(WeightDeclared(0, 1.0), PartDelivered(0, 0), WeightDeclared(1, 1.0))
    assert member.handle(PartDelivered(1, 0)) == [AveragePart(0)]
    assert member.handle(PartAveraged(0)) == [
        ReturnAverage(0),
        TellLeader(SpanAveraged((1.0, 1.0, 1.0), None, None)),
    ]
    outcome = Outcome(None, (Excluded(2, "exchange", 1.0, "slow"),))
    assert member.handle(OutcomeReceived(outcome)) == [Finish("excluded from the round: slow")]
    assert (member.phase, member.core.outcome) == (Phase.FAILED, outcome)


def test_a_member_without_a_snapshot_averages_what_the_others_sent():
    member = Member(1, (0, 1, 0))
    member.handle(WeightDeclared(0, 1.0), PartDelivered(0, 0), WeightDeclared(2, 0.0))
    assert member.handle(SnapshotFailed("NaN")) == [
        StopContributing(),
        AveragePart(0),
        TellLeader(StandsAside("snapshot", "NaN")),
    ]


def test_an_excluded_leader_commits_for_the_others_and_fails_itself():
    leader = Member(0, (0, 1, 0))
    leader.handle(SnapshotTaken(1.0))
    assert leader.handle(ExcludedByOwner(1, "slow"))[0] == StopContributing()
    leader.handle(MemberReported(1, SpanAveraged((1.0, 1.0, 1.0), None, None)))
    assert leader.handle(MemberReported(1, Ready(1.0))) == []
    effects = leader.handle(MemberReported(2, Ready(1.0)))
    assert isinstance(effects[0], AnnounceOutcome)
    assert effects[0].outcome.reason is None
    assert effects[0].outcome.weights == (0.0, 1.0, 1.0)
    assert leader.phase is Phase.FAILED
    assert leader.core.outcome == effects[0].outcome  # which is what an orphan is told


def test_a_member_that_owns_nothing_may_be_lost():
    leader = Member(0, (1, 0, 0))
    leader.handle(SnapshotTaken(1.0), WeightDeclared(1, 1.0), PartDelivered(1, 0))
    effects = leader.handle(MemberLost(2, "killed"))
    assert excluded(effects) == [2]
    assert AveragePart(0) in effects
    assert failure(effects) is None


def test_an_owner_whose_averages_are_needed_may_not_be_lost():
    leader = Member(0, (1, 1, 0))
    assert failure(leader.handle(MemberLost(1, "killed"))) == "lost member 1: killed"


def test_an_owner_that_everybody_is_ready_without_may_be_lost():
    leader = Member(0, (0, 1, 0))
    leader.handle(SnapshotTaken(1.0), AverageReceived(1, 0), MemberReported(2, Ready(1.0)))
    effects = leader.handle(MemberLost(1, "killed"))
    assert excluded(effects) == [1]
    assert leader.phase is Phase.COMMITTED


def test_a_member_that_cannot_reach_an_owner_is_excluded_but_fails_the_round_if_the_owner_is_lost():
    leader = Member(0, (0, 1, 0))
    assert excluded(leader.handle(MemberReported(2, OwnerFailed(1, "reset", Loss.BROKEN)))) == [2]
    leader.handle(MemberReported(1, SpanAveraged((1.0,) * 3, None, None)), MemberReported(1, Ready(1.0)))
    assert failure(leader.handle(MemberLost(1, "killed"))) == "lost member 1: killed"


def test_a_member_that_cannot_reach_an_owner_that_is_lost_fails_the_round():
    leader = Member(0, (0, 1, 0))
    leader.handle(MemberReported(1, SpanAveraged((1.0,) * 3, None, None)), MemberReported(1, Ready(1.0)))
    assert leader.handle(MemberLost(1, "killed")) == []
    effects = leader.handle(MemberReported(2, OwnerFailed(1, "reset", Loss.BROKEN)))
    assert failure(effects) == "member 2 got no averages from member 1: reset"


def test_an_owner_that_cannot_reach_another_one_fails_the_round():
    leader = Member(0, (1, 1, 1))
    effects = leader.handle(MemberReported(1, OwnerFailed(2, "reset", Loss.BROKEN)))
    assert failure(effects) == "member 1 got no averages from member 2: reset"


def test_a_failed_round_names_the_owner_that_could_not_be_dialed():
    leader = Member(0, (1, 1, 1))
    effects = leader.handle(MemberReported(1, OwnerFailed(2, "no address", Loss.UNDIALABLE)))
    assert [effect.outcome.undialable for effect in effects if isinstance(effect, AnnounceOutcome)] == [(2,)]


def test_an_owner_whose_stream_broke_counts_as_dialed():
    leader = Member(0, (1, 1, 1))
    effects = leader.handle(MemberReported(1, OwnerFailed(2, "reset", Loss.BROKEN)))
    assert [effect.outcome.undialable for effect in effects if isinstance(effect, AnnounceOutcome)] == [()]


def test_a_member_tells_the_leader_how_it_lost_an_owner():
    member = Member(1, (1, 1, 1))
    effects = member.handle(OwnerLost(2, "no address", Loss.UNDIALABLE))
    assert effects == [TellLeader(OwnerFailed(2, "no address", Loss.UNDIALABLE))]


def test_a_member_that_told_different_weights_is_named():
    leader = Member(0, (1, 1, 0))
    leader.handle(MemberReported(2, Ready(2.0)))
    effects = leader.handle(MemberReported(1, SpanAveraged((1.0, 1.0, 3.0), None, None)))
    assert failure(effects) == (
        "member 2 contributed with different weights: 2 by the word of member 2, 3 by that of member 1"
    )


def test_when_nobody_is_left_the_round_fails():
    leader = Member(0, (1, 0))
    leader.handle(MemberLost(1, "killed"))
    assert "no member is left" in (failure(leader.handle(SnapshotFailed("NaN"))) or "")


# commit


def test_the_leader_commits_when_the_last_member_is_ready():
    leader = Member(0)
    leader.make_ready()
    assert leader.phase is Phase.EXCHANGING
    assert leader.handle(MemberReported(1, Ready(1.0))) == []  # its span's report is still missing
    effects = leader.handle(MemberReported(1, SpanAveraged((1.0, 1.0), 3.0, 4.0)))
    assert effects == [AnnounceOutcome(Outcome(None, (), (1.0, 1.0), None, None)), Finish()]
    assert leader.phase is Phase.COMMITTED


def test_the_sums_of_all_spans_travel_with_the_outcome():
    leader = Member(0, (0, 1, 1))
    leader.handle(SnapshotTaken(1.0), AverageReceived(1, 0), AverageReceived(2, 0))
    for owner in (1, 2):
        leader.handle(MemberReported(owner, SpanAveraged((1.0,) * 3, 3.0 * owner, 5.0)))
        effects = leader.handle(MemberReported(owner, Ready(1.0)))
    assert effects[0] == AnnounceOutcome(Outcome(None, (), (1.0,) * 3, 9.0, 10.0))


def test_a_commit_before_this_member_was_ready_is_a_violation():
    with pytest.raises(ProtocolViolation, match="before this member was ready"):
        Member(1).handle(OutcomeReceived(Outcome(None)))


@pytest.mark.parametrize("report", [GaveUp("changed my mind"), StandsAside("exchange", "slow")])
def test_giving_up_after_reporting_ready_is_a_violation(report: GaveUp | StandsAside):
    leader = Member(0)
    leader.handle(MemberReported(1, Ready(1.0)))
    with pytest.raises(ProtocolViolation, match="after it had reported ready"):
        leader.handle(MemberReported(1, report))


def test_a_member_lost_after_it_was_ready_is_averaged_all_the_same():
    leader = Member(0)
    leader.handle(MemberReported(1, SpanAveraged((1.0, 1.0), None, None)), MemberReported(1, Ready(1.0)))
    assert leader.handle(MemberLost(1, "connection reset")) == []
    leader.make_ready()  # its streams of parts have ended in order
    assert leader.phase is Phase.COMMITTED
    assert leader.core.outcome is not None
    assert leader.core.outcome.weights == (1.0, 1.0)


def test_a_ready_member_is_not_excluded_any_more():
    leader = Member(0, (1, 1, 0))
    leader.handle(MemberReported(2, Ready(1.0)))
    assert leader.handle(MemberReported(1, SenderExcluded(2, "slow"))) == []


def test_a_ready_member_does_not_withdraw():
    member = Member(1)
    member.make_ready()
    assert member.handle(Withdrawn("cancelled")) == []
    assert member.phase is Phase.READY


def test_a_member_that_withdraws_earlier_tells_the_leader():
    assert Member(1).handle(Withdrawn("cancelled")) == [TellLeader(GaveUp("cancelled")), Finish("cancelled")]


def test_a_leader_that_withdraws_fails_the_round():
    assert failure(Member(0).handle(Withdrawn("cancelled"))) == "the leader gave up: cancelled"


COMMITTED, FAILED_BY_LEADER = Outcome(None), Outcome("lost member 3")


@pytest.mark.parametrize(
    ("phase", "outcome", "ends"),
    [
        (Phase.COMMITTED, COMMITTED, Phase.COMMITTED),
        (Phase.FAILED, COMMITTED, Phase.COMMITTED),  # an excluded leader that committed for the others
        (Phase.FAILED, FAILED_BY_LEADER, Phase.FAILED),
        (None, None, Phase.FAILED),
    ],
)
def test_an_orphan_takes_over_the_leaders_decision(phase: Phase | None, outcome: Outcome | None, ends: Phase):
    member = Member(1)
    member.make_ready()
    assert member.handle(MemberLost(0, "killed")) == [AskForOutcome((0,))]
    member.handle(OutcomeAnswered(0, phase, outcome))
    assert member.phase is ends


def test_what_became_of_a_member_itself_is_no_decision():
    orphan = Member(2, (0, 0, 0))
    orphan.handle(SnapshotTaken(1.0), MemberLost(0, "cut off"))
    assert orphan.handle(OutcomeAnswered(1, Phase.FAILED, None)) == []  # it gave up by itself
    assert orphan.handle(OutcomeAnswered(0, Phase.COMMITTED, COMMITTED)) == [Finish()]


def test_an_orphan_asks_again_while_somebody_may_still_hear_from_the_leader():
    orphan = Member(2, (0, 0, 0))
    orphan.handle(SnapshotTaken(1.0), MemberLost(0, "killed"))
    for phase in (Phase.READY, Phase.EXCHANGING, Phase.EXCLUDED):
        assert orphan.handle(OutcomeAnswered(1, phase)) == [AskForOutcome((1,))]
    assert orphan.handle(OutcomeAnswered(0, Phase.FAILED)) == []
    assert isinstance(orphan.handle(OutcomeAnswered(1, Phase.ORPHANED))[0], Finish)
    assert orphan.phase is Phase.FAILED


def test_an_orphan_asks_other_orphans_again_after_a_member_turned_out_to_be_gone():
    """That one may have told them the decision, after their answers, and died then."""
    orphan = Member(3, (0, 0, 0, 0))
    orphan.handle(SnapshotTaken(1.0), MemberLost(0, "killed"))
    orphan.handle(OutcomeAnswered(1, Phase.ORPHANED), OutcomeAnswered(2, Phase.ORPHANED))
    assert orphan.handle(OutcomeAnswered(0, None)) == [AskForOutcome((1, 2))]
    assert orphan.handle(OutcomeAnswered(1, Phase.ORPHANED)) == []
    assert orphan.handle(OutcomeAnswered(2, None)) == [AskForOutcome((1,))]
    assert orphan.handle(OutcomeAnswered(1, Phase.COMMITTED, COMMITTED)) == [Finish()]


def test_an_orphan_that_owns_nothing_waits_for_owners_and_an_owner_for_nobody():
    """Two clients cannot reach each other; an owner reaches everybody."""
    client, owner = Member(2, (1, 1, 0)), Member(1, (1, 1, 0))
    client.handle(SnapshotTaken(1.0), AverageReceived(0, 0), AverageReceived(1, 0), MemberLost(0, "killed"))
    assert client.phase is Phase.ORPHANED
    assert client.handle(OutcomeAnswered(1, Phase.ORPHANED)) == [AskForOutcome((1,))]
    owner.handle(SnapshotTaken(1.0), WeightDeclared(0, 0.0), WeightDeclared(2, 0.0), PartAveraged(0))
    owner.handle(AverageReceived(0, 0), MemberLost(0, "killed"))
    assert owner.phase is Phase.ORPHANED
    assert owner.handle(OutcomeAnswered(2, Phase.ORPHANED), OutcomeAnswered(0, Phase.FAILED)) != []
    assert owner.phase is Phase.FAILED


def test_an_orphan_does_not_listen_to_the_leader_any_more():
    """It may already have told another orphan that it knows of no decision."""
    orphan = Member(1, (0, 0, 0))
    orphan.handle(SnapshotTaken(1.0), MemberLost(0, "reset"))
    assert orphan.handle(OutcomeReceived(COMMITTED)) == []
    assert (orphan.phase, orphan.core.outcome) == (Phase.ORPHANED, None)


def test_a_member_that_gave_up_never_learns_the_decision():
    member = Member(1)
    member.handle(Withdrawn("cancelled"))
    assert member.handle(OutcomeReceived(COMMITTED)) == []
    assert member.core.outcome is None


def test_the_notice_of_an_exclusion_can_cross_the_report_of_readiness():
    member = Member(1)
    member.make_ready()
    notice = Excluded(1, "join", 0.0, "late")
    assert member.handle(ExclusionReceived(notice)) == [StopContributing()]
    assert member.handle(OutcomeReceived(Outcome(None, (notice,)))) == [
        Finish("excluded from the round: late")
    ]
    leader = Member(0, (1, 0))
    leader.handle(MemberLost(1, "reset"))
    assert leader.handle(MemberReported(1, Ready(1.0))) == []


def test_a_lost_sender_of_a_span_that_is_averaged_changes_nothing():
    member = Member(1)
    member.make_ready()
    assert member.handle(SenderLost(0, "reset")) == []
    assert member.handle(OwnerLost(0, "reset")) == []


def test_a_group_of_helpers_alone_has_nothing_to_average():
    with pytest.raises(AllreduceException, match="no member of the group contributes"):
        Member(0, (1, 1), (False, False))
