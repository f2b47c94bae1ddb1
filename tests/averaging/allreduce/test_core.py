"""The pure core of one round, in hand-made cases; whole groups are in test_allreduce_swarm.py."""

from __future__ import annotations

import pytest

from shoal.averaging.allreduce.assignment import Epoch, Repair, Span, SpanId
from shoal.averaging.allreduce.core import AllReduce
from shoal.averaging.allreduce.effects import (
    AnnounceExclusion,
    AnnounceOutcome,
    AnnounceRepair,
    AskForAcceptance,
    AveragePart,
    DropSender,
    Effect,
    Finish,
    OpenSpans,
    ReturnAverage,
    ReturnReport,
    StopContributing,
    StopLeading,
    TellLeader,
    VoidSpans,
)
from shoal.averaging.allreduce.events import (
    AverageReceived,
    Event,
    ExchangeOpened,
    ExcludedByOwner,
    ExclusionReceived,
    MemberAnswered,
    MemberLost,
    MemberReported,
    OutcomeReceived,
    OwnerLost,
    PartAveraged,
    PartDelivered,
    PartSent,
    Phase,
    RepairReceived,
    Roles,
    RoundTimeouts,
    SenderAwaited,
    SenderHeld,
    SenderLost,
    SnapshotFailed,
    SnapshotTaken,
    SpanReceived,
    WeightDeclared,
    Withdrawn,
)
from shoal.averaging.allreduce.messages import (
    Accepted,
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
from shoal.averaging.allreduce.pairs import GRACE
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
        **options: object,
    ) -> None:
        roles = Roles(me, owned, contributes or (True,) * len(owned), **options)  # type: ignore[arg-type]
        self.core = AllReduce(roles, timeouts)
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

    def hold(
        self, owner: int, parts: int = 1, weights: tuple[float | None, ...] | None = None
    ) -> list[Effect]:
        """All averages of an owner's first span, and its report."""
        self.handle(*(AverageReceived(SpanId(owner), index) for index in range(parts)))
        return self.handle(SpanReceived(report(owner, len(self.core.roles.parts_owned), weights)))

    def serve(self, parts: int = 1) -> list[Effect]:
        """Everybody's parts of the own first span, averaged."""
        me = SpanId(self.core.roles.me)
        for other in self.core.roles.others:
            if self.core.roles.contributes[other]:
                self.handle(WeightDeclared(me, other, 1.0))
                self.handle(*(PartDelivered(me, other, index) for index in range(parts)))
        return self.handle(*(PartAveraged(me, index) for index in range(parts)))

    def make_ready(self) -> list[Effect]:
        """In a group in which each member contributes 1, and owns one part or none."""
        self.handle(SnapshotTaken(1.0))
        owned = self.core.roles.parts_owned
        effects = self.serve() if owned[self.core.roles.me] else []
        for owner in self.core.roles.others:
            if owned[owner]:
                effects = self.hold(owner)
        return effects


def report(owner: int, size: int = 2, weights: tuple[float | None, ...] | None = None) -> SpanAveraged:
    return SpanAveraged(SpanId(owner), weights or (1.0,) * size, None, None)


def says_ready(member: int, size: int, owns: bool = True) -> list[MemberReported]:
    """What the leader hears of a member that is done."""
    spans = [MemberReported(member, report(member, size))] if owns else []
    return [*spans, MemberReported(member, Ready(1.0))]


def excluded(effects: list[Effect]) -> list[int]:
    return [effect.excluded.member for effect in effects if isinstance(effect, AnnounceExclusion)]


def proposed(effects: list[Effect]) -> Outcome:
    """What the leader wants decided, or has decided already."""
    (outcome,) = (e.outcome for e in effects if isinstance(e, (AskForAcceptance, AnnounceOutcome)))
    return outcome


def is_proposing(effects: list[Effect]) -> bool:
    return any(isinstance(effect, (AskForAcceptance, AnnounceOutcome)) for effect in effects)


def repair(effects: list[Effect]) -> Repair:
    (order,) = (effect.order for effect in effects if isinstance(effect, AnnounceRepair))
    return order


# the exchange


def test_a_part_is_averaged_once_every_contributor_has_delivered_it():
    member, own = Member(0, (2, 0, 0), (True, True, False)), SpanId(0)
    assert member.handle(WeightDeclared(own, 1, 1.0), PartDelivered(own, 1, 0)) == []
    assert member.handle(SnapshotTaken(1.0)) == [AveragePart(own, 0)]
    assert member.handle(PartDelivered(own, 1, 1)) == [AveragePart(own, 1)]
    assert member.handle(PartAveraged(own, 0)) == [ReturnAverage(own, 0)]


def test_a_member_reports_ready_only_when_it_holds_every_average():
    member, own = Member(1), SpanId(1)
    parts = (WeightDeclared(own, 0, 2.0), PartDelivered(own, 0, 0))
    assert member.handle(SnapshotTaken(3.0), *parts) == [AveragePart(own, 0)]
    said = SpanAveraged(own, (2.0, 3.0), 0.5, 0.25)
    assert member.handle(PartAveraged(own, 0, 0.5, 0.25)) == [
        ReturnAverage(own, 0),
        ReturnReport(said),
        TellLeader(said),
    ]
    assert member.handle(AverageReceived(SpanId(0), 0)) == [TellLeader(AveragesReceived(1))]
    assert member.phase is Phase.EXCHANGING  # what they are made of is still to come
    assert member.handle(SpanReceived(report(0))) == [TellLeader(Ready(3.0))]
    assert member.phase is Phase.READY


def test_an_auxiliary_member_averages_after_its_trigger_and_commits_with_the_leader():
    member, own = Member(1, (0, 1), (True, False)), SpanId(1)
    assert member.handle(WeightDeclared(own, 0, 1.0), PartDelivered(own, 0, 0)) == []
    assert member.handle(SnapshotTaken(7.0)) == [AveragePart(own, 0)]
    said = SpanAveraged(own, (1.0, 0.0), None, None)
    assert member.handle(PartAveraged(own, 0)) == [
        ReturnAverage(own, 0),
        ReturnReport(said),
        TellLeader(said),
    ]
    assert member.phase is Phase.EXCHANGING
    assert member.handle(OutcomeReceived(Outcome(None))) == [Finish()]


def test_nobody_waits_for_a_member_with_weight_0():
    member, own = Member(0, (1, 0)), SpanId(0)
    assert member.handle(SnapshotTaken(1.0)) == []
    assert member.handle(WeightDeclared(own, 1, 0.0)) == [AveragePart(own, 0)]
    with pytest.raises(ProtocolViolation, match="declared no weight"):
        member.handle(PartDelivered(own, 1, 0))


def test_a_member_with_weight_0_waits_for_averages_like_any_other():
    member = Member(1, (1, 0))
    assert member.handle(SnapshotTaken(0.0)) == []
    assert member.hold(0, weights=(1.0, 0.0)) == [TellLeader(Ready(0.0))]


@pytest.mark.parametrize("weight", [-1.0, float("nan"), float("inf")])
def test_a_weight_that_is_none_is_a_violation(weight: float):
    with pytest.raises(ProtocolViolation, match="declared the weight"):
        Member(0).handle(WeightDeclared(SpanId(0), 1, weight))


@pytest.mark.parametrize(
    "event",
    [
        PartDelivered(SpanId(0), 1, 0),
        PartDelivered(SpanId(0), 0, 0),
        AverageReceived(SpanId(1), 1),
        AverageReceived(SpanId(0), 0),
        SpanReceived(report(1)),
        SpanReceived(report(0)),
        WeightDeclared(SpanId(0), 0, 1.0),
    ],
    ids=str,
)
def test_what_no_honest_peer_sends_is_a_violation_and_changes_nothing(event: Event):
    member, own = Member(0), SpanId(0)
    with pytest.raises(ProtocolViolation):
        member.handle(event)
    assert member.phase is Phase.EXCHANGING
    assert member.handle(WeightDeclared(own, 1, 1.0), PartDelivered(own, 1, 0)) == []
    with pytest.raises(ProtocolViolation, match="twice"):
        member.handle(WeightDeclared(own, 1, 1.0))


def test_what_comes_of_a_span_that_is_not_assigned_is_ignored():
    """The order that voids it, and what others sent before they heard of that, cross."""
    member, void = Member(0), SpanId(0, Epoch(0, 7))
    events = [
        WeightDeclared(void, 1, 1.0),
        PartDelivered(void, 1, 0),
        AverageReceived(void, 0),
        OwnerLost(void, "reset"),
        ExcludedByOwner(void, "slow"),
        MemberReported(1, SpanAveraged(void, (1.0, 1.0), None, None)),
        MemberReported(1, SenderExcluded(void, 0, "slow")),
        MemberReported(1, OwnerFailed(void, "slow", Loss.BROKEN)),
        MemberReported(1, Ready(1.0, Epoch(0, 7))),
    ]
    for event in events:
        assert member.handle(event) == []
    assert member.phase is Phase.EXCHANGING


# timeouts


def test_a_sender_that_stalls_is_left_out_of_what_it_has_not_delivered():
    member, own = Member(1, (0, 2, 0)), SpanId(1)
    assert member.handle(SnapshotTaken(1.0), WeightDeclared(own, 0, 1.0), WeightDeclared(own, 2, 1.0)) == []
    member.at(4.0).handle(PartDelivered(own, 0, 0), PartDelivered(own, 0, 1))
    assert member.at(5.0).handle(PartDelivered(own, 2, 0)) == [AveragePart(own, 0)]
    assert member.core.deadline == 15.0
    assert member.at(14.9).handle(TimePassed()) == []
    reason = "it sent no further part, or took no average, within sender_timeout=10 s"
    assert member.at(15.0).handle(TimePassed()) == [
        DropSender(own, 2, reason),
        AveragePart(own, 1),
        TellLeader(SenderExcluded(own, 2, reason, Loss.TIMED_OUT)),
    ]
    member.handle(PartAveraged(own, 0))
    effects = member.handle(PartAveraged(own, 1))
    (said,) = (effect.report for effect in effects if isinstance(effect, ReturnReport))
    assert said.partial == ((2, 1),)  # its first part stays in the average


def test_a_sender_that_never_comes_is_awaited_from_the_owners_own_snapshot_on():
    member, own = Member(1, (0, 2, 0)), SpanId(1)
    member.handle(WeightDeclared(own, 0, 1.0), PartDelivered(own, 0, 0))
    assert member.core.deadline == NEVER  # the own user may take any time
    member.at(50.0).handle(SnapshotTaken(1.0))
    assert member.core.deadline == 60.0
    effects = member.at(60.0).handle(TimePassed())
    assert DropSender(own, 2, "it sent no part within sender_timeout=10 s") in effects


def test_the_clock_of_a_sender_stands_still_while_it_is_held():
    member, own = Member(1, (0, 5)), SpanId(1)
    member.handle(
        SnapshotTaken(1.0), WeightDeclared(own, 0, 1.0), PartDelivered(own, 0, 0), SenderHeld(own, 0)
    )
    assert member.core.deadline == NEVER
    member.at(100.0).handle(SenderAwaited(own, 0))
    assert member.core.deadline == 110.0


def test_a_sender_that_was_held_before_the_snapshot_stays_so():
    member, own = Member(1, (0, 5)), SpanId(1)
    member.handle(
        WeightDeclared(own, 0, 1.0), PartDelivered(own, 0, 0), SenderHeld(own, 0), SnapshotTaken(1.0)
    )
    assert member.core.deadline == NEVER


def test_time_by_which_the_owner_itself_is_late_does_not_count():
    member = Member(1, (0, 1))
    member.handle(SnapshotTaken(1.0))
    assert member.at(500.0).handle(TimePassed(late=490.0)) == []
    assert member.core.deadline == 501.0
    assert member.at(501.0).handle(TimePassed()) != []


def test_the_clock_of_an_owner_runs_while_it_has_all_that_it_needs_of_this_member():
    member, span = Member(1, (2, 0)), SpanId(0)
    member.handle(SnapshotTaken(1.0))
    assert member.core.deadline == 20.0  # it may never open
    member.at(10.0).handle(ExchangeOpened(span))
    assert member.core.deadline == NEVER  # this member's own part is on its way
    member.at(50.0).handle(PartSent(span, 0))
    assert member.core.deadline == 70.0
    member.at(60.0).handle(PartSent(span, 1))
    assert member.core.deadline == 70.0
    member.at(65.0).handle(AverageReceived(span, 0))
    assert member.core.deadline == 85.0
    assert member.at(85.0).handle(TimePassed()) == [
        TellLeader(OwnerFailed(span, "it returned no average within reducer_timeout=20 s", Loss.TIMED_OUT))
    ]


def test_an_owner_has_to_say_what_its_averages_are_made_of_in_time():
    member = Member(1, (1, 0))
    member.handle(SnapshotTaken(1.0), ExchangeOpened(SpanId(0)), PartSent(SpanId(0), 0))
    member.at(5.0).handle(AverageReceived(SpanId(0), 0))
    assert member.core.deadline == 25.0


def test_the_clock_of_an_owner_runs_at_once_for_a_member_with_weight_0():
    member = Member(1, (2, 0))
    member.handle(SnapshotTaken(0.0))
    member.at(10.0).handle(ExchangeOpened(SpanId(0)))
    assert member.core.deadline == 30.0


def test_without_timeouts_there_is_no_deadline():
    member = Member(1, (1, 1), timeouts=RoundTimeouts())
    member.handle(SnapshotTaken(1.0), ExchangeOpened(SpanId(0)), PartSent(SpanId(0), 0))
    assert member.core.deadline == NEVER
    assert member.at(1e9).handle(TimePassed()) == []


def test_a_member_that_is_not_ready_when_everything_was_averaged_is_awaited_and_then_excluded():
    leader = Member(0, (1, 1, 0))
    leader.make_ready()
    leader.handle(*says_ready(1, 3))
    assert leader.core.deadline == LIMIT
    leader.at(15.0).handle(MemberReported(2, AveragesReceived(1)))  # it does take averages
    assert leader.core.deadline == 15.0 + LIMIT
    effects = leader.at(15.0 + LIMIT).handle(TimePassed())
    assert excluded(effects) == [2]
    assert proposed(effects).weights == (1.0, 1.0, 0.0)


@pytest.mark.parametrize("counts", [(1, 1), (2,), (21,)])
def test_progress_that_is_none_breaks_the_protocol(counts: tuple[int, ...]):
    leader = Member(0, (1, 1, 0))
    *before, last = [MemberReported(2, AveragesReceived(count)) for count in counts]
    leader.handle(*before)
    if counts == (2,):
        assert leader.handle(last) == []
    else:
        with pytest.raises(ProtocolViolation, match="out of turn or too many"):
            leader.handle(last)


def test_a_member_tells_the_leader_now_and_then_that_averages_come():
    member = Member(2, (3, 3, 0))
    member.handle(SnapshotTaken(1.0))
    assert member.handle(AverageReceived(SpanId(0), 0)) == [TellLeader(AveragesReceived(1))]
    assert member.at(0.9).handle(AverageReceived(SpanId(0), 1)) == []
    assert member.at(1.0).handle(AverageReceived(SpanId(1), 0)) == [TellLeader(AveragesReceived(3))]


# exclusion


def test_the_leader_tells_everybody_of_a_member_that_an_owner_excludes():
    leader = Member(0, (1, 1, 0))
    leader.handle(SnapshotTaken(1.0))
    told = MemberReported(1, SenderExcluded(SpanId(1), 2, "NaN", Loss.INVALID))
    assert leader.at(3.0).handle(told) == [
        AnnounceExclusion(Excluded(2, "exchange", 3.0, "excluded by member 1: NaN")),
        DropSender(SpanId(0), 2, "excluded by member 1: NaN"),
    ]
    assert leader.handle(told) == []


def test_an_excluded_owner_serves_until_the_group_is_decided():
    member, own = Member(2, (1, 1, 1)), SpanId(2)
    member.handle(SnapshotTaken(1.0))
    assert member.handle(ExclusionReceived(Excluded(2, "exchange", 1.0, "slow"))) == [StopContributing()]
    assert member.phase is Phase.EXCLUDED
    member.handle(WeightDeclared(own, 0, 1.0), PartDelivered(own, 0, 0), WeightDeclared(own, 1, 1.0))
    assert member.handle(PartDelivered(own, 1, 0)) == [AveragePart(own, 0)]
    said = report(2, 3)
    assert member.handle(PartAveraged(own, 0)) == [
        ReturnAverage(own, 0),
        ReturnReport(said),
        TellLeader(said),
    ]
    outcome = Outcome(None, (Excluded(2, "exchange", 1.0, "slow"),))
    assert member.handle(OutcomeReceived(outcome)) == [Finish("excluded from the round: slow")]
    assert (member.phase, member.core.outcome) == (Phase.FAILED, outcome)


def test_a_member_without_a_snapshot_averages_what_the_others_sent():
    member, own = Member(1, (0, 1, 0)), SpanId(1)
    member.handle(WeightDeclared(own, 0, 1.0), PartDelivered(own, 0, 0), WeightDeclared(own, 2, 0.0))
    assert member.handle(SnapshotFailed("NaN")) == [
        StopContributing(),
        AveragePart(own, 0),
        TellLeader(StandsAside("snapshot", "NaN")),
    ]


def test_an_excluded_leader_commits_for_the_others_and_fails_itself():
    leader = Member(0, (0, 1, 0))
    leader.handle(SnapshotTaken(1.0))
    assert leader.handle(ExcludedByOwner(SpanId(1), "slow"))[0] == StopContributing()
    leader.handle(*says_ready(1, 3))
    effects = leader.handle(MemberReported(2, Ready(1.0)))
    assert proposed(effects).weights == (0.0, 1.0, 1.0)
    leader.handle(MemberAnswered(1, 0, Accepted()))
    assert leader.phase is Phase.FAILED
    assert leader.core.outcome == proposed(effects)


def test_a_member_that_owns_nothing_may_be_lost():
    leader, own = Member(0, (1, 0, 0)), SpanId(0)
    leader.handle(SnapshotTaken(1.0), WeightDeclared(own, 1, 1.0), PartDelivered(own, 1, 0))
    effects = leader.handle(MemberLost(2, "killed"))
    assert excluded(effects) == [2]
    assert AveragePart(own, 0) in effects


def test_a_ready_member_is_not_excluded_any_more():
    leader = Member(0, (1, 1, 0))
    leader.handle(MemberReported(2, Ready(1.0)))
    assert leader.handle(MemberReported(1, SenderExcluded(SpanId(1), 2, "slow", Loss.TIMED_OUT))) == []


def test_the_notice_of_an_exclusion_can_cross_the_report_of_readiness():
    member = Member(1)
    member.make_ready()
    notice = Excluded(1, "join", 0.0, "late")
    assert member.handle(ExclusionReceived(notice)) == [StopContributing()]
    assert member.handle(OutcomeReceived(Outcome(None, (notice,)))) == [
        Finish("excluded from the round: late")
    ]


def test_a_member_that_told_different_weights_is_named():
    leader = Member(0, (1, 1, 0))
    leader.handle(MemberReported(2, Ready(2.0)))
    effects = leader.handle(MemberReported(1, report(1, 3, (1.0, 1.0, 3.0))))
    assert proposed(effects).reason == (
        "member 2 contributed with different weights: 2 by the word of member 2, 3 by that of member 1"
    )


# repair


def test_the_span_of_an_owner_that_is_lost_goes_to_the_others():
    leader = Member(0, (1, 3, 0))
    leader.handle(SnapshotTaken(1.0))
    effects = leader.handle(MemberLost(1, "killed"))
    assert excluded(effects) == [1]
    order = Repair(Epoch(0, 1), (SpanId(1),), (0, 2))
    assert repair(effects) == order
    spans = (Span(SpanId(0, order.epoch), 0, 1, 1), Span(SpanId(1, order.epoch), 2, 2, 2))
    assert [effect for effect in effects if isinstance(effect, (VoidSpans, OpenSpans))] == [
        VoidSpans((SpanId(1),)),
        OpenSpans(spans),
    ]
    assert not is_proposing(effects)


def test_a_ready_member_exchanges_again_after_a_repair():
    member = Member(2, (1, 1, 0))
    member.make_ready()
    order = Repair(Epoch(0, 1), (SpanId(1),), (0,))
    effects = member.handle(RepairReceived(order))
    assert member.phase is Phase.EXCHANGING
    new = SpanId(0, order.epoch)
    assert effects == [VoidSpans((SpanId(1),)), OpenSpans((Span(new, 0, 1, 1),))]
    assert member.handle(RepairReceived(order)) == []  # told twice
    member.handle(AverageReceived(new, 0))
    said = SpanAveraged(new, (1.0, None, 1.0), None, None)
    assert member.handle(SpanReceived(said)) == [TellLeader(Ready(1.0, order.epoch))]


def test_readiness_of_another_epoch_counts_for_nothing():
    leader = Member(0, (1, 1, 0))
    leader.make_ready()
    epoch = repair(leader.handle(MemberLost(1, "killed"))).epoch
    assert leader.handle(MemberReported(2, Ready(1.0))) == []
    new = SpanId(0, epoch)  # of member 2
    leader.handle(AverageReceived(new, 0), SpanReceived(SpanAveraged(new, (1.0, None, 1.0), None, None)))
    assert leader.phase is Phase.READY
    effects = leader.handle(MemberReported(2, Ready(1.0, epoch)))
    assert proposed(effects).epoch == epoch
    assert proposed(effects).weights == (1.0, 0.0, 1.0)


def test_a_slow_owner_loses_its_span_and_still_contributes():
    leader = Member(0, (0, 1, 0, 0))
    leader.handle(SnapshotTaken(1.0))
    slow = OwnerFailed(SpanId(1), "too slow", Loss.TIMED_OUT)
    leader.handle(MemberReported(2, slow), MemberReported(3, slow))
    effects = leader.at(GRACE).handle(TimePassed())
    assert excluded(effects) == []
    assert repair(effects).owners == (0, 2, 3)


def test_two_members_that_cannot_talk_are_kept_apart():
    leader = Member(0, (1, 1, 1, 1))
    leader.handle(SnapshotTaken(1.0))
    assert leader.handle(MemberReported(1, OwnerFailed(SpanId(2), "reset", Loss.BROKEN))) == []
    effects = leader.at(GRACE).handle(TimePassed())
    assert excluded(effects) == []
    assert repair(effects).void == (SpanId(1), SpanId(2))
    assert repair(effects).owners == (0, 3)


def test_a_member_that_accuses_several_is_excluded():
    leader = Member(0, (1, 1, 1, 1))
    leader.handle(SnapshotTaken(1.0))
    for owner in (1, 2):
        leader.handle(MemberReported(3, OwnerFailed(SpanId(owner), "reset", Loss.BROKEN)))
    effects = leader.at(GRACE).handle(TimePassed())
    assert excluded(effects) == [3]
    assert not any(isinstance(effect, AnnounceRepair) for effect in effects)  # it serves its own span on


def test_an_owner_that_everybody_is_ready_without_may_be_lost():
    leader = Member(0, (0, 1, 0))
    leader.make_ready()
    leader.handle(MemberReported(2, Ready(1.0)))
    effects = leader.handle(MemberLost(1, "killed"))
    assert excluded(effects) == [1]
    assert proposed(effects).reason is None
    assert proposed(effects).partial == ((1, 0, 1),)  # all that it contributed stays in


def test_too_few_members_that_are_left_fail_the_round():
    leader = Member(0, (1, 1, 0), min_size=3)
    effects = leader.handle(MemberLost(2, "killed"))
    assert proposed(effects).reason == "fewer than min_group_size=3 members are left: member 2: killed"


def test_a_span_that_nobody_can_take_over_fails_the_round():
    leader = Member(0, (0, 1, 0), can_serve=(False, True, False))
    effects = leader.handle(MemberLost(1, "killed"))
    assert proposed(effects).reason == "nobody can take over the parts of member 1 (killed)"


def test_when_nobody_is_left_the_round_fails():
    leader = Member(0, (1, 0))
    leader.handle(MemberLost(1, "killed"))
    assert "no member is left" in (proposed(leader.handle(SnapshotFailed("NaN"))).reason or "")


def test_a_member_tells_the_leader_how_it_lost_an_owner():
    member = Member(1, (1, 1, 1))
    effects = member.handle(OwnerLost(SpanId(2), "no address", Loss.UNDIALABLE))
    assert effects == [TellLeader(OwnerFailed(SpanId(2), "no address", Loss.UNDIALABLE))]


def test_a_lost_sender_of_a_span_that_is_averaged_changes_nothing():
    member = Member(1)
    member.make_ready()
    assert member.handle(SenderLost(SpanId(1), 0, "reset")) == []
    assert member.handle(OwnerLost(SpanId(0), "reset")) == []


# the decision; elections are in test_election.py


def test_the_leader_proposes_when_the_last_member_is_ready():
    leader = Member(0, (1, 1, 0))
    leader.make_ready()
    assert (
        leader.handle(MemberReported(1, Ready(1.0))) == []
    )  # its span's report is there, another member is not
    effects = leader.handle(MemberReported(2, Ready(1.0)))
    outcome = Outcome(None, (), (1.0,) * 3, None, None)
    assert effects == [AskForAcceptance((1, 2), 0, outcome)]
    assert leader.handle(MemberAnswered(2, 0, Accepted())) == [AnnounceOutcome(outcome), Finish()]
    assert leader.phase is Phase.COMMITTED


def test_a_leader_that_lacks_a_quorum_never_commits():
    leader = Member(0, (1, 1, 1, 1, 1))
    leader.make_ready()
    effects: list[Effect] = []
    for member in range(1, 5):
        effects = leader.handle(*says_ready(member, 5))
    assert is_proposing(effects)
    leader.handle(MemberAnswered(1, 0, Accepted()), MemberAnswered(1, 0, Accepted()))  # one vote, told twice
    assert leader.handle(MemberAnswered(2, 0, None)) != []  # it asks again
    assert leader.phase is Phase.READY
    effects = leader.at(leader.core.deadline).handle(TimePassed())
    assert leader.phase is Phase.IN_DOUBT
    assert Finish("too few members answered to decide; others may have decided") in effects


def test_exclusions_do_not_shrink_the_quorum():
    leader = Member(0, (1, 0, 0, 0, 0))
    leader.handle(SnapshotTaken(1.0))
    leader.serve()
    for member in (2, 3, 4):
        leader.handle(MemberLost(member, "killed"))
    assert is_proposing(leader.handle(MemberReported(1, Ready(1.0))))
    effects = leader.handle(MemberAnswered(1, 0, Accepted()))  # two of five
    assert not any(isinstance(effect, AnnounceOutcome | Finish) for effect in effects)
    assert leader.phase is Phase.READY


def test_the_founder_decides_for_a_pair():
    leader = Member(0)
    leader.make_ready()
    effects = leader.handle(*says_ready(1, 2))
    assert effects == [AnnounceOutcome(Outcome(None, (), (1.0, 1.0))), Finish()]


def test_the_sums_of_all_spans_travel_with_the_outcome():
    leader = Member(0, (0, 1, 1))
    leader.handle(SnapshotTaken(1.0))
    for owner in (1, 2):
        said = SpanAveraged(SpanId(owner), (1.0,) * 3, 3.0 * owner, 5.0)
        leader.handle(AverageReceived(SpanId(owner), 0), SpanReceived(said))
        effects = leader.handle(MemberReported(owner, Ready(1.0)))
    assert proposed(effects) == Outcome(None, (), (1.0,) * 3, 9.0, 10.0)


def test_a_member_that_holds_other_averages_than_were_decided_fails():
    member = Member(1)
    member.make_ready()
    effects = member.handle(OutcomeReceived(Outcome(None, epoch=Epoch(3, 1))))
    assert effects == [Finish("the others committed averages that this member does not hold")]


@pytest.mark.parametrize("said", [GaveUp("changed my mind"), StandsAside("exchange", "slow")])
def test_giving_up_after_reporting_ready_is_a_violation(said: GaveUp | StandsAside):
    leader = Member(0)
    leader.handle(MemberReported(1, Ready(1.0)))
    with pytest.raises(ProtocolViolation, match="after it had reported ready"):
        leader.handle(MemberReported(1, said))


def test_readiness_that_is_told_twice_is_a_violation():
    leader = Member(0)
    leader.handle(MemberReported(1, Ready(1.0)))
    with pytest.raises(ProtocolViolation, match="reported ready, twice"):
        leader.handle(MemberReported(1, Ready(1.0)))


def test_a_member_lost_after_it_was_ready_is_averaged_all_the_same():
    leader = Member(0, (1, 1, 0))
    leader.handle(*says_ready(1, 3))
    leader.handle(MemberReported(2, Ready(1.0)))
    assert excluded(leader.handle(MemberLost(2, "connection reset"))) == []
    assert proposed(leader.make_ready()).weights == (1.0, 1.0, 1.0)


def test_a_ready_member_does_not_withdraw():
    member = Member(1)
    member.make_ready()
    assert member.handle(Withdrawn("cancelled")) == []
    assert member.phase is Phase.READY


def test_a_member_that_withdraws_earlier_tells_the_leader():
    assert Member(1).handle(Withdrawn("cancelled")) == [TellLeader(GaveUp("cancelled")), Finish("cancelled")]


def test_a_leader_that_withdraws_leaves_the_others_to_another_one():
    leader = Member(0, (1, 1, 1))
    assert leader.handle(Withdrawn("cancelled")) == [StopLeading(), Finish("cancelled")]


def test_a_leader_of_a_pair_that_withdraws_fails_the_round():
    effects = Member(0).handle(Withdrawn("cancelled"))
    assert proposed(effects).reason == "the leader gave up: cancelled"


def test_a_leader_that_has_proposed_to_commit_does_not_withdraw():
    leader = Member(0, (1, 1, 0))
    leader.make_ready()
    leader.handle(MemberReported(1, Ready(1.0)), MemberReported(2, Ready(1.0)))
    assert leader.core.is_bound
    assert leader.handle(Withdrawn("cancelled")) == []
    assert leader.phase is Phase.READY


def test_a_group_of_helpers_alone_has_nothing_to_average():
    with pytest.raises(AllreduceException, match="no member of the group contributes"):
        Member(0, (1, 1), (False, False))
