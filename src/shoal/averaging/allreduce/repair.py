"""The spans as a leader assigns them: what was averaged, what is broken, and the order that mends it. Pure.

- A span is *broken* if some member still needs its averages, and its owner is gone, or cannot talk with a member that
  is not ready. A span that everybody holds is not, whatever becomes of its owner.
- Its parts go to all members that may own spans (:attr:`.Roll.able`) and can talk with everybody that is left. If there
  is none, though some may own spans, the last member that cannot talk with another one is at fault.
- There are at most :data:`MAX_REPAIRS` for each member of the group.

What an order makes of the assignment is in :mod:`.assignment`, when a leader gives one in :mod:`.coordination`.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

from shoal.averaging.allreduce.assignment import Assignment, Epoch, Repair, Span, SpanId
from shoal.averaging.allreduce.events import Roles
from shoal.averaging.allreduce.messages import SpanAveraged
from shoal.averaging.allreduce.pairs import Culprit
from shoal.averaging.allreduce.roll import Roll

MAX_REPAIRS = 3
"""Repairs for each member of the group: more are somebody's mistake, or malice."""


@dataclass(frozen=True)
class Irreparable:
    """Nobody can average what is broken."""

    reason: str


class Spans:
    """What one leader knows of the spans. ``term``: the one in which it leads, and orders repairs."""

    def __init__(self, assignment: Assignment, term: int) -> None:
        self.assignment = assignment
        self.reports: dict[SpanId, SpanAveraged] = {}
        """What the owners said of spans that they have averaged."""
        self._term = term

    @property
    def unreported(self) -> list[Span]:
        """Spans of which no owner has said that they are averaged."""
        return [span for span in self.assignment.spans if span.id not in self.reports]

    def note(self, report: SpanAveraged) -> None:
        """A span was averaged. One that is void does not count."""
        if report.span in self.assignment.by_id:
            self.reports[report.span] = report

    def has_averaged(self, member: int) -> bool:
        """Whether a member owns spans, and has reported all of them."""
        own = self.assignment.owned_by(member)
        return bool(own) and all(span.id in self.reports for span in own)

    def owed_by(self, member: int) -> list[SpanId]:
        """Spans that a member has not reported yet."""
        return [span.id for span in self.unreported if span.owner == member]

    def broken(self, roll: Roll) -> set[SpanId]:
        """Spans that somebody still needs, and that will not come as they are assigned."""
        unready = roll.unready
        if not unready and not self.unreported:
            return set()
        return {
            span.id
            for span in self.assignment.spans
            if span.owner in roll.gone or roll.pairs.separates(span.owner, unready, roll.out)
        }

    def plan(self, broken: Collection[SpanId], roll: Roll) -> Repair | Culprit | Irreparable:
        """The order that mends these spans; or the member that has to go before; or why there is none."""
        members, out = range(roll.roles.size), roll.out
        owners = [member for member in roll.able if not roll.pairs.has(member, out)]
        if not owners and roll.able:
            last = max(member for member in members if roll.pairs.has(member, out))
            return Culprit(last, "it cannot talk with another member, nor can the rest", is_slow=False)
        lost = ", ".join(sorted({roll.describe(self.assignment.by_id[span].owner) for span in broken}))
        if not owners:
            return Irreparable(f"nobody can take over the parts of {lost}")
        if len(self.assignment.orders) >= MAX_REPAIRS * roll.roles.size:
            return Irreparable(f"too many repairs; the last one was of the parts of {lost}")
        last_epoch = self.assignment.epoch
        number = last_epoch.number + 1 if last_epoch.term == self._term else 1
        void = sorted(broken, key=lambda span: self.assignment.by_id[span].first)
        return Repair(Epoch(self._term, number), tuple(void), tuple(owners), last_epoch)

    def carry_out(self, order: Repair) -> None:
        """Assign the spans as the order says, and forget what was averaged of those that it voids."""
        self.assignment = self.assignment.after(order)
        for span in order.void:
            self.reports.pop(span, None)


def most_averages(roles: Roles) -> int:
    """As many as a member can take in a round: of all parts, after each repair that there may be, anew.

    It may have followed a leader that ordered others than the present one knows.
    """
    return sum(roles.parts_owned) * (MAX_REPAIRS * roles.size + 1)
