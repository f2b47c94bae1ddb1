"""Which member averages which parts, before and after repairs."""

from __future__ import annotations

import random

import pytest

from shoal.averaging.allreduce import assignment as module
from shoal.averaging.allreduce.assignment import FIRST_EPOCH, Assignment, Epoch, Repair, Span, SpanId
from shoal.errors import ProtocolViolation

ONE, TWO = Epoch(0, 1), Epoch(0, 2)


def test_each_owner_begins_with_one_span():
    assignment = Assignment.first((2, 0, 3))
    assert assignment.spans == (Span(SpanId(0), 0, 0, 2), Span(SpanId(2), 2, 2, 3))
    assert assignment.epoch == FIRST_EPOCH


def test_a_lost_span_is_cut_among_all_that_are_left():
    order = Repair(ONE, (SpanId(1),), (0, 2, 3))
    repaired = Assignment.first((1, 7, 1, 0)).after(order)
    dealt = [span for span in repaired.spans if span.id.epoch == ONE]
    assert [(span.owner, span.first, span.count) for span in dealt] == [(0, 1, 2), (2, 3, 2), (3, 5, 3)]
    assert repaired.epoch == ONE


def test_runs_do_not_reach_over_the_end_of_a_void_span():
    order = Repair(ONE, (SpanId(0), SpanId(2)), (1,))
    repaired = Assignment.first((2, 1, 2)).after(order)
    assert [(span.first, span.count) for span in repaired.owned_by(1)] == [(2, 1), (0, 2), (3, 2)]


def test_after_any_repairs_every_part_has_one_owner():
    for seed in range(200):
        rng = random.Random(seed)
        owned = (1, *(rng.choice((0, 1, 5, 9)) for _ in range(rng.randint(2, 6))))
        assignment = Assignment.first(owned)
        for number in range(1, 6):
            lost = rng.sample(assignment.spans, rng.randint(1, len(assignment.spans)))
            owners = tuple(rng.sample(range(len(owned)), rng.randint(1, len(owned))))
            order = Repair(Epoch(0, number), tuple(span.id for span in lost), owners, assignment.epoch)
            assignment = assignment.after(order)
            parts = [part for span in assignment.spans for part in span.parts]
            assert sorted(parts) == list(range(sum(owned))), seed
            assert len(assignment.by_id) == len(assignment.spans), seed
        assert Assignment.replay(owned, assignment.orders) == assignment


def test_orders_of_a_leader_that_was_replaced_are_forgotten():
    first = Assignment.first((1, 1, 1))
    old = first.after(Repair(ONE, (SpanId(1),), (0,)))
    new = Repair(Epoch(2, 1), (SpanId(0),), (2,))
    assert old.after(new) == first.after(new)


@pytest.mark.parametrize(
    "order",
    [
        Repair(FIRST_EPOCH, (SpanId(0),), (1,)),
        Repair(ONE, (), (1,)),
        Repair(ONE, (SpanId(0), SpanId(0)), (1,)),
        Repair(ONE, (SpanId(2),), (1,)),
        Repair(ONE, (SpanId(0),), ()),
        Repair(ONE, (SpanId(0),), (2,)),
        Repair(ONE, (SpanId(0),), (-1,)),
        Repair(TWO, (SpanId(0),), (1,), after=ONE),
    ],
    ids=str,
)
def test_an_order_that_does_not_fit_is_a_violation(order: Repair):
    with pytest.raises(ProtocolViolation):
        Assignment.first((1, 1)).after(order)


def test_a_span_that_is_void_cannot_be_voided_again():
    repaired = Assignment.first((1, 1)).after(Repair(ONE, (SpanId(0),), (1,)))
    with pytest.raises(ProtocolViolation, match="voids spans that do not count"):
        repaired.after(Repair(TWO, (SpanId(0),), (1,), after=ONE))


def test_orders_are_bounded(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(module, "MAX_ORDERS", 1)
    repaired = Assignment.first((1, 1)).after(Repair(ONE, (SpanId(0),), (1,)))
    with pytest.raises(ProtocolViolation):
        repaired.after(Repair(TWO, (SpanId(1),), (0,), after=ONE))
