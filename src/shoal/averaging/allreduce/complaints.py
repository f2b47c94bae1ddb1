"""What members say against each other, and what a leader makes of it. Pure.

- An owner that got something wrong from a sender, or nothing for too long, has it excluded.
- So has one that calls a sender late, by deadlines that adapt, if more than ``min_size`` contributors are left. What
  the sender owns would be late, too, and goes to others.
- A stream that broke accuses a pair, of which neither is at fault by itself (:mod:`.pairs`). So does an owner that
  returns nothing, and is judged to be slow then.
"""

from __future__ import annotations

from dataclasses import dataclass

from shoal.averaging.allreduce.assignment import SpanId
from shoal.averaging.allreduce.effects import AnnounceExclusion
from shoal.averaging.allreduce.messages import Loss, OwnerFailed, SenderExcluded
from shoal.averaging.allreduce.repair import Spans
from shoal.averaging.allreduce.roll import Roll
from shoal.errors import ProtocolViolation


@dataclass(frozen=True)
class Ruling:
    """What follows from complaints: exclusions to be announced, and spans that others have to take over."""

    exclusions: list[AnnounceExclusion]
    void: list[SpanId]


NOTHING = Ruling([], [])


class Complaints:
    """The complaints that one leader hears. ``term``: the one in which it leads."""

    def __init__(self, roll: Roll, spans: Spans, term: int) -> None:
        self._roll = roll
        self._spans = spans
        self._term = term
        self._undialable: set[int] = set()

    @property
    def deadline(self) -> float:
        """When a pair is to be judged."""
        return self._roll.pairs.deadline

    @property
    def undialable(self) -> tuple[int, ...]:
        """Owners that members could not dial."""
        return tuple(sorted(self._undialable))

    def hear_owner(self, owner: int, report: SenderExcluded, seconds: float, now: float) -> Ruling:
        """An owner goes on without a sender, or would like to. ``seconds``: since the exchange began.

        :raises ProtocolViolation: it owns no such span, or gets nothing from that member
        """
        roll, sender = self._roll, report.sender
        span = self._spans.assignment.by_id.get(report.span)
        if span is None:
            return NOTHING
        if span.owner != owner or not roll.roles.contributes[sender] or owner == sender:
            raise ProtocolViolation(f"{roll.roles.name(owner)} excluded a member from which it gets nothing")
        if sender in roll.ready or sender in roll.excluded:
            return NOTHING  # a ready one has everything, so nothing is missing from it either
        reason = f"excluded by {roll.roles.name(owner)}: {report.reason}"
        if report.loss is Loss.LATE:
            return self._on_late(sender, reason, seconds)
        if report.loss in (Loss.BROKEN, Loss.UNDIALABLE):
            roll.pairs.complain(owner, sender, reason, now)
            return NOTHING
        return Ruling(roll.exclude(sender, "exchange", seconds, reason), [])

    def hear_member(self, member: int, report: OwnerFailed, now: float) -> None:
        """A member gets no averages from an owner.

        :raises ProtocolViolation: nobody owes it any
        """
        roll, roles = self._roll, self._roll.roles
        span = self._spans.assignment.by_id.get(report.span)
        if span is None:
            return
        if span.owner == member or (member in roll.ready and not self._term):
            raise ProtocolViolation(
                f"{roles.name(member)} misses averages that it has or that nobody owes it"
            )
        if member in roll.excluded or member in roll.ready:
            # Ready in a later term: it complained to the former leader, and its promise overtook the complaint.
            return
        if report.loss is Loss.UNDIALABLE:
            self._undialable.add(span.owner)
        story = f"it got no averages from {roles.name(span.owner)}: {report.reason}"
        roll.pairs.complain(member, span.owner, story, now, is_slow=report.loss is Loss.TIMED_OUT)

    def judge(self, seconds: float, now: float) -> Ruling:
        """Judge the pairs of which it has been known for long enough that they cannot talk."""
        roll = self._roll
        slow = set(roll.slow)
        exclusions: list[AnnounceExclusion] = []
        for fault in roll.pairs.judge(now, roll.out, roll.roles):
            if fault.is_slow:
                roll.slow[fault.member] = fault.reason
            else:
                exclusions += roll.exclude(fault.member, "exchange", seconds, fault.reason)
        spans = self._spans.assignment.spans
        return Ruling(exclusions, [span.id for span in spans if span.owner in roll.slow.keys() - slow])

    def shift(self, seconds: float) -> None:
        """Time that does not count."""
        self._roll.pairs.shift(seconds)

    def _on_late(self, sender: int, reason: str, seconds: float) -> Ruling:
        roll = self._roll
        if len(roll.committers) <= roll.roles.min_size:
            return NOTHING
        exclusions = roll.exclude(sender, "exchange", seconds, reason)
        if not any(member != sender for member in roll.able):
            return Ruling(exclusions, [])
        roll.slow.setdefault(sender, reason)
        return Ruling(exclusions, self._spans.owed_by(sender))
