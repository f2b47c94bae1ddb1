"""What members say to each other in a round: only what is well-formed passes, and its texts are harmless."""

from __future__ import annotations

import math

import msgspec
import pytest

from shoal.averaging.allreduce.assignment import Epoch, Repair, SpanId
from shoal.averaging.allreduce.commit import read_answer, to_event
from shoal.averaging.allreduce.events import PromiseAsked
from shoal.averaging.allreduce.message_checks import check_outcome, check_repair, check_report
from shoal.averaging.allreduce.messages import (
    Answer,
    AveragesReceived,
    Excluded,
    GaveUp,
    Knows,
    Loss,
    NotKnown,
    Outcome,
    OwnerFailed,
    Prepare,
    Promised,
    Propose,
    Question,
    Ready,
    Refused,
    Report,
    SenderExcluded,
    SpanAveraged,
    StandsAside,
    add_up,
    exclusion_text,
)
from shoal.errors import ProtocolViolation

SIZE = 3
SPAN = SpanId(0)
MAX_MESSAGE = 1 << 20


@pytest.mark.parametrize(
    "report",
    [
        Ready(-1.0),
        Ready(math.nan),
        Ready(1.0, Epoch(-1, 0)),
        AveragesReceived(0),
        SpanAveraged(SPAN, (1.0, 1.0), 0.0, 0.0),
        SpanAveraged(SPAN, (1.0, math.inf, None), 0.0, 0.0),
        SpanAveraged(SPAN, (1.0, 1.0, None), -1.0, 0.0),
        SpanAveraged(SPAN, (1.0, 1.0, None), 0.0, math.nan),
        SpanAveraged(SPAN, (1.0, 1.0, None), 0.0, 0.0, ((3, 1),)),
        SpanAveraged(SPAN, (1.0, 1.0, None), 0.0, 0.0, ((1, -1),)),
        SpanAveraged(SPAN, (1.0, 1.0, None), 0.0, 0.0, ((1, 1), (1, 2))),
        SpanAveraged(SpanId(-1), (1.0, 1.0, None), 0.0, 0.0),
        StandsAside("dancing", "why not"),
        SenderExcluded(SPAN, 3, "who?"),
        SenderExcluded(SPAN, -1, "who?"),
        OwnerFailed(SpanId(0, Epoch(0, -1)), "who?", Loss.TIMED_OUT),
    ],
    ids=str,
)
def test_a_report_that_is_not_well_formed_is_a_violation(report: Report):
    with pytest.raises(ProtocolViolation, match="a message of the round is wrong"):
        check_report(report, SIZE)


@pytest.mark.parametrize(
    "outcome",
    [
        Outcome(None, (Excluded(3, "join", 0.0, ""),)),
        Outcome(None, (Excluded(1, "party", 0.0, ""),)),
        Outcome(None, (Excluded(1, "join", math.nan, ""),)),
        Outcome(None, (Excluded(1, "join", -1.0, ""),)),
        Outcome(None, (Excluded(1, "join", 0.0, ""),) * 2),
        Outcome(None, (), (1.0,)),
        Outcome(None, (), (1.0, math.inf, 0.0)),
        Outcome(None, (), (), math.inf, 0.0),
        Outcome("no", undialable=(3,)),
        Outcome(None, epoch=Epoch(-1, 0)),
        Outcome(None, partial=((3, 0, 1),)),
        Outcome(None, partial=((1, 2, 2),)),
    ],
    ids=str,
)
def test_an_outcome_that_is_not_well_formed_is_a_violation(outcome: Outcome):
    with pytest.raises(ProtocolViolation, match="a message of the round is wrong"):
        check_outcome(outcome, SIZE)
    with pytest.raises(ProtocolViolation, match="a message of the round is wrong"):
        read_answer(Knows(outcome), SIZE)
    with pytest.raises(ProtocolViolation, match="a message of the round is wrong"):
        read_answer(Promised("READY", accepted=(1, outcome)), SIZE)


@pytest.mark.parametrize(
    "answer",
    [
        Refused(-1),
        Refused(1 << 50),
        Promised("READY", weight=-1.0),
        Promised("READY", floor=-1),
        Promised("READY", accepted=(-1, Outcome(None))),
        Promised("READY", orders=(Repair(Epoch(1, 1), (SPAN,), ()),)),
        Promised("READY", spans=(SpanAveraged(SPAN, (1.0,), None, None),)),
    ],
    ids=str,
)
def test_an_answer_that_is_not_well_formed_is_a_violation(answer: Answer):
    with pytest.raises(ProtocolViolation, match="a message of the round is wrong"):
        read_answer(answer, SIZE)


@pytest.mark.parametrize(
    "order",
    [
        Repair(Epoch(0, -1), (SPAN,), (1,)),
        Repair(Epoch(0, 1), (SpanId(-1),), (1,)),
        Repair(Epoch(0, 1), (SPAN,), ()),
        Repair(Epoch(0, 1), (SPAN,), (3,)),
        Repair(Epoch(0, 1), (SPAN,), (-1,)),
        Repair(Epoch(0, 1), (SPAN,), (0, 1, 2, 0)),
    ],
    ids=str,
)
def test_a_repair_that_is_not_well_formed_is_a_violation(order: Repair):
    with pytest.raises(ProtocolViolation, match="a message of the round is wrong"):
        check_repair(order, SIZE)


@pytest.mark.parametrize("term", [-1, 1 << 50])
def test_a_term_that_is_none_is_a_violation(term: int):
    questions: list[Question] = [
        Prepare("p", b"g" * 16, term),
        Propose("p", b"g" * 16, term, Outcome(None)),
    ]
    for question in questions:
        with pytest.raises(ProtocolViolation, match="term"):
            to_event(question, 1)


@pytest.mark.parametrize("floor", [-1, 8])
def test_a_floor_above_its_term_is_a_violation(floor: int):
    with pytest.raises(ProtocolViolation, match="the floor"):
        to_event(Prepare("p", b"g" * 16, 7, floor), 1)
    assert to_event(Prepare("p", b"g" * 16, 7, 7), 1) == PromiseAsked(1, 7, floor=7)


@pytest.mark.parametrize(
    "report",
    [
        GaveUp("a\nb\x1b[2J"),
        StandsAside("exchange", "a\nb"),
        SenderExcluded(SPAN, 0, "\n"),
        OwnerFailed(SPAN, "\n", Loss.BROKEN),
    ],
)
def test_texts_of_others_become_printable(report: GaveUp | StandsAside | SenderExcluded | OwnerFailed):
    checked = check_report(report, SIZE)
    assert isinstance(checked, type(report))
    assert checked.reason.isprintable()


def test_texts_of_the_leader_become_printable():
    outcome = check_outcome(Outcome("a\nb", (Excluded(1, "join", 0.0, "c\nd"),)), SIZE)
    assert (outcome.reason, outcome.excluded[0].reason) == ("a\\nb", "c\\nd")


@pytest.mark.parametrize("size", [2, 100, 4096])
def test_an_outcome_that_excludes_everybody_for_long_reasons_fits_into_a_message(size: int):
    reason = exclusion_text("\U0001f41f" * 5000, size)
    outcome = Outcome(
        "x" * 1000, tuple(Excluded(member, "exchange", 1e9, reason) for member in range(size)), (1.5,) * size
    )
    assert len(msgspec.msgpack.encode(outcome)) < MAX_MESSAGE


def test_texts_of_an_answer_become_printable():
    answer = read_answer(Promised("FAILED", failure="a\nb", accepted=(1, Outcome("c\nd"))), SIZE)
    assert isinstance(answer, Promised)
    assert answer.failure == "a\\nb"
    assert answer.accepted is not None
    assert answer.accepted[1].reason == "c\\nd"


def test_a_payload_is_no_answer():
    assert read_answer(NotKnown(), SIZE) == NotKnown()
    with pytest.raises(ProtocolViolation, match="a payload"):
        read_answer(b"payload", SIZE)


def test_a_sum_of_which_a_part_is_unknown_or_out_of_range_is_unknown():
    assert add_up([1.0, 2.0]) == 3.0
    assert add_up([1.0, None]) is None
    assert add_up([1e308, 1e308]) is None
