"""What makes the messages of a round well-formed, for a group of a given size. Pure.

The types were checked when the messages were decoded. What is left are ranges, and texts of others, which become
printable here.
"""

from __future__ import annotations

import math

import msgspec

from shoal.averaging.allreduce.assignment import Epoch, Repair, SpanId
from shoal.averaging.allreduce.events import Phase
from shoal.averaging.allreduce.messages import (
    EXCLUSION_PHASES,
    Answer,
    AveragesReceived,
    Excluded,
    GaveUp,
    Knows,
    Outcome,
    OwnerFailed,
    Promised,
    Ready,
    Refused,
    Report,
    SenderExcluded,
    SpanAveraged,
    StandsAside,
    Undecided,
    is_weight,
    reason_text,
)
from shoal.errors import ProtocolViolation

MAX_NUMBER = 1 << 40
"""Terms, counts of repairs and parts of honest members stay far below."""


def check_report(report: Report, size: int) -> Report:
    """A member's report in a group of ``size``, with its text made printable.

    :raises ProtocolViolation: it is not well-formed
    """
    match report:
        case Ready(weight, epoch):
            _check(is_weight(weight), f"weight {weight}")
            _check_epoch(epoch)
        case AveragesReceived(count):
            _check(count > 0, f"{count} averages")
        case SpanAveraged():
            check_span_averaged(report, size)
        case StandsAside(phase, reason):
            _check(phase in EXCLUSION_PHASES, "an unknown phase")
            return StandsAside(phase, reason_text(reason))
        case GaveUp(reason):
            return GaveUp(reason_text(reason))
        case SenderExcluded(span, sender, reason, loss):
            check_span_id(span)
            _check(0 <= sender < size, f"member {sender} of {size}")
            return SenderExcluded(span, sender, reason_text(reason), loss)
        case OwnerFailed(span, reason, loss):
            check_span_id(span)
            return OwnerFailed(span, reason_text(reason), loss)
    return report


def check_span_id(span: SpanId) -> None:
    """As :func:`check_report`."""
    _check(0 <= span.span < MAX_NUMBER, f"span {span.span}")
    _check_epoch(span.epoch)


def check_span_averaged(report: SpanAveraged, size: int) -> None:
    """As :func:`check_report`."""
    weights = report.weights
    check_span_id(report.span)
    _check(len(weights) == size, f"{len(weights)} weights in a group of {size}")
    _check(all(one is None or is_weight(one) for one in weights), "a weight is negative or too large")
    _check_sums(report.square_distance, report.square_average)
    members = [member for member, _ in report.partial]
    _check(len(set(members)) == len(members), "a member is named twice")
    _check(all(0 <= member < size for member in members), "an unknown member delivered parts")
    _check(all(0 <= parts < MAX_NUMBER for _, parts in report.partial), "a member delivered too many parts")


def check_repair(order: Repair, size: int) -> None:
    """An order of the leader; as :func:`check_report`. Whether it fits the assignment is checked elsewhere."""
    _check_epoch(order.epoch)
    for span in order.void:
        check_span_id(span)
    _check(0 < len(order.owners) <= size, f"{len(order.owners)} owners in a group of {size}")
    _check(all(0 <= owner < size for owner in order.owners), "an unknown member is to own parts")


def check_answer(answer: Answer, size: int) -> Answer:
    """What another member answered; as :func:`check_report`."""
    match answer:
        case Knows(outcome):
            return Knows(check_outcome(outcome, size))
        case Refused(promised):
            _check(0 <= promised < MAX_NUMBER, f"the term {promised}")
        case Undecided(phase):
            _check(phase in Phase.__members__, "an unknown phase")
        case Promised(phase, weight, failure, orders, spans, accepted, floor):
            _check(phase in Phase.__members__, "an unknown phase")
            _check(weight is None or is_weight(weight), f"weight {weight}")
            _check(0 <= floor < MAX_NUMBER, f"the term {floor}")
            for order in orders:
                check_repair(order, size)
            for span in spans:
                check_span_averaged(span, size)
            if accepted is not None:
                _check(0 <= accepted[0] < MAX_NUMBER, f"the term {accepted[0]}")
                accepted = (accepted[0], check_outcome(accepted[1], size))
            return msgspec.structs.replace(
                answer, failure=None if failure is None else reason_text(failure), accepted=accepted
            )
    return answer


def check_excluded(excluded: Excluded, size: int) -> Excluded:
    """A notice of the leader; as :func:`check_report`."""
    _check(0 <= excluded.member < size, f"member {excluded.member} of {size}")
    _check(excluded.phase in EXCLUSION_PHASES, "an unknown phase")
    _check(math.isfinite(excluded.seconds) and excluded.seconds >= 0, f"{excluded.seconds} seconds")
    return msgspec.structs.replace(excluded, reason=reason_text(excluded.reason))


def check_outcome(outcome: Outcome, size: int) -> Outcome:
    """A decision of the leader; as :func:`check_report`."""
    excluded = tuple(check_excluded(one, size) for one in outcome.excluded)
    _check(len({one.member for one in excluded}) == len(excluded), "a member is excluded twice")
    _check(len(outcome.weights) in (0, size), f"{len(outcome.weights)} weights in a group of {size}")
    _check(all(map(is_weight, outcome.weights)), "a weight is negative or too large")
    _check_sums(outcome.square_distance, outcome.square_average)
    _check(all(0 <= one < size for one in outcome.undialable), "an unknown member could not be dialed")
    _check(len(outcome.undialable) <= size, "more members could not be dialed than there are")
    _check_epoch(outcome.epoch)
    _check(all(0 <= member < size for member, _, _ in outcome.partial), "an unknown member delivered parts")
    _check(
        all(0 <= first < stop < MAX_NUMBER for _, first, stop in outcome.partial), "a run of parts is empty"
    )
    reason = None if outcome.reason is None else reason_text(outcome.reason)
    return msgspec.structs.replace(outcome, reason=reason, excluded=excluded)


def _check_sums(*sums: float | None) -> None:
    for value in sums:
        _check(value is None or (math.isfinite(value) and value >= 0), f"a sum of squares is {value}")


def _check_epoch(epoch: Epoch) -> None:
    _check(0 <= epoch.term < MAX_NUMBER and 0 <= epoch.number < MAX_NUMBER, f"the epoch {epoch}")


def _check(holds: bool, problem: str) -> None:
    if not holds:
        raise ProtocolViolation(f"a message of the round is wrong: {problem}")
