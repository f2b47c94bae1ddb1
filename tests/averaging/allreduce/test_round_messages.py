"""What members say to each other in a round: only what is well-formed passes, and its texts are harmless."""

from __future__ import annotations

import math

import msgspec
import pytest

from shoal.averaging.allreduce.commit import read_answer
from shoal.averaging.allreduce.messages import (
    Excluded,
    GaveUp,
    Loss,
    Outcome,
    OutcomeAnswer,
    OwnerFailed,
    Ready,
    Report,
    SenderExcluded,
    SpanAveraged,
    StandsAside,
    add_up,
    check_outcome,
    check_report,
    exclusion_text,
)
from shoal.errors import ProtocolViolation

SIZE = 3
MAX_MESSAGE = 1 << 20


@pytest.mark.parametrize(
    "report",
    [
        Ready(-1.0),
        Ready(math.nan),
        SpanAveraged((1.0, 1.0), 0.0, 0.0),
        SpanAveraged((1.0, math.inf, None), 0.0, 0.0),
        SpanAveraged((1.0, 1.0, None), -1.0, 0.0),
        SpanAveraged((1.0, 1.0, None), 0.0, math.nan),
        StandsAside("dancing", "why not"),
        SenderExcluded(3, "who?"),
        SenderExcluded(-1, "who?"),
        OwnerFailed(7, "who?", Loss.TIMED_OUT),
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
    ],
    ids=str,
)
def test_an_outcome_that_is_not_well_formed_is_a_violation(outcome: Outcome):
    with pytest.raises(ProtocolViolation, match="a message of the round is wrong"):
        check_outcome(outcome, SIZE)
    with pytest.raises(ProtocolViolation, match="a message of the round is wrong"):
        read_answer(OutcomeAnswer("COMMITTED", outcome), SIZE)


@pytest.mark.parametrize(
    "report",
    [
        GaveUp("a\nb\x1b[2J"),
        StandsAside("exchange", "a\nb"),
        SenderExcluded(0, "\n"),
        OwnerFailed(0, "\n", Loss.BROKEN),
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


def test_a_phase_that_this_version_does_not_know_is_no_answer():
    assert read_answer(OutcomeAnswer("TRANSCENDED"), SIZE) == (None, None)
    with pytest.raises(ProtocolViolation):
        read_answer(b"payload", SIZE)


def test_a_sum_of_which_a_part_is_unknown_or_out_of_range_is_unknown():
    assert add_up([1.0, 2.0]) == 3.0
    assert add_up([1.0, None]) is None
    assert add_up([1e308, 1e308]) is None
