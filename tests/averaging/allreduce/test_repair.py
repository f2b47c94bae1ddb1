"""Which spans a leader has others take over, and what it does where nobody can."""

from __future__ import annotations

from shoal.averaging.allreduce.assignment import Assignment, Epoch, SpanId
from shoal.averaging.allreduce.coordination import Coordinator
from shoal.averaging.allreduce.effects import AnnounceExclusion, AnnounceRepair
from shoal.averaging.allreduce.events import MemberReported, Roles
from shoal.averaging.allreduce.messages import Loss, OwnerFailed, SpanAveraged
from shoal.averaging.allreduce.pairs import GRACE, Culprit
from shoal.averaging.allreduce.repair import MAX_REPAIRS, Irreparable, Spans
from shoal.averaging.allreduce.roll import Roll
from shoal.sansio.core import TimePassed


def group(size: int = 4, **options: object) -> tuple[Roll, Spans]:
    roles = Roles(0, (1,) * size, (True,) * size, **options)  # type: ignore[arg-type]
    return Roll(roles), Spans(Assignment.first(roles.parts_owned), 0)


def part(roll: Roll, *pairs: tuple[int, int]) -> None:
    for one, other in pairs:
        roll.pairs.complain(one, other, "reset", 0.0)
    roll.pairs.judge(GRACE, roll.out, roll.roles)


def averaged(member: int) -> SpanAveraged:
    return SpanAveraged(SpanId(member), (1.0,) * 4, None, None)


def test_the_spans_of_owners_that_are_gone_go_to_all_that_are_left():
    roll, spans = group()
    roll.gone |= {2}
    assert spans.broken(roll) == {SpanId(2)}
    order = spans.plan({SpanId(2)}, roll)
    assert (order.epoch, order.void, order.owners) == (Epoch(0, 1), (SpanId(2),), (0, 1, 3))


def test_a_span_that_everybody_holds_is_not_broken():
    roll, spans = group()
    for member in range(4):
        spans.note(averaged(member))
        roll.ready[member] = 1.0
    roll.gone |= {2}
    assert spans.broken(roll) == set()
    del roll.ready[3]
    assert spans.broken(roll) == {SpanId(2)}


def test_an_order_forgets_what_was_averaged_of_void_spans_alone():
    roll, spans = group()
    for member in range(4):
        spans.note(averaged(member))
    spans.carry_out(spans.plan({SpanId(1)}, roll))
    assert spans.reports.keys() == {SpanId(0), SpanId(2), SpanId(3)}
    spans.note(averaged(1))
    assert SpanId(1) not in spans.reports


def test_a_leader_of_a_later_term_counts_its_orders_from_one():
    roll, spans = group()
    spans.carry_out(spans.plan({SpanId(1)}, roll))
    spans.carry_out(spans.plan({SpanId(2)}, roll))
    assert spans.assignment.epoch == Epoch(0, 2)
    later = Spans(spans.assignment, 6)
    assert later.plan({SpanId(3)}, roll).epoch == Epoch(6, 1)


def test_members_that_are_slow_or_cannot_talk_with_another_one_own_nothing():
    roll, spans = group(5)
    roll.slow[4] = "slow"
    part(roll, (1, 2))
    assert spans.plan({SpanId(4)}, roll).owners == (0, 3)


def test_where_no_owner_can_talk_with_all_the_last_member_goes():
    roll, spans = group()
    part(roll, (0, 1), (2, 3))
    verdict = spans.plan({SpanId(0)}, roll)
    assert isinstance(verdict, Culprit)
    assert verdict.member == 3


def test_what_nobody_can_take_over_fails_by_name():
    roll, spans = group(can_serve=(False, True, False, False), names=("a", "b", "c", "d"))
    roll.exclude(1, "exchange", 1.0, "reset")
    assert spans.plan({SpanId(1)}, roll) == Irreparable("nobody can take over the parts of b (reset)")


def test_repairs_are_bounded():
    roll, spans = group()
    for _ in range(MAX_REPAIRS * 4):
        spans.carry_out(spans.plan({spans.assignment.spans[0].id}, roll))
    verdict = spans.plan({spans.assignment.spans[0].id}, roll)
    assert isinstance(verdict, Irreparable)
    assert "too many repairs" in verdict.reason


def test_a_slow_owner_loses_its_span_also_where_another_member_has_to_go_first():
    """The pairs leave no owner, so that one member goes. The span of the slow owner must not be forgotten by that."""
    leader = Coordinator(Roles(0, (1,) * 5, (True,) * 5), Assignment.first((1,) * 5))
    for member, owner, loss in (
        (0, 4, Loss.TIMED_OUT),
        (1, 4, Loss.TIMED_OUT),
        (0, 1, Loss.BROKEN),
        (2, 3, Loss.BROKEN),
    ):
        leader.handle(MemberReported(member, OwnerFailed(SpanId(owner), "reset", loss)), 0.0)
    excluded, repair = leader.handle(TimePassed(0.0), GRACE)
    assert isinstance(excluded, AnnounceExclusion)
    assert excluded.excluded.member == 3
    assert isinstance(repair, AnnounceRepair)
    assert repair.order.void == (SpanId(0), SpanId(1), SpanId(4))
    assert repair.order.owners == (2,)
