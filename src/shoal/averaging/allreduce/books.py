"""What a member keeps book of in a round: parts that it collects as an owner, averages that it gets from others. Pure.

Each book has clocks: for whom something is awaited, since when; see :mod:`.part_clocks`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from shoal.averaging.allreduce.assignment import Span, SpanId
from shoal.averaging.allreduce.events import Roles
from shoal.averaging.allreduce.lateness import Lateness
from shoal.averaging.allreduce.messages import SpanAveraged, is_weight
from shoal.averaging.allreduce.part_clocks import PartClocks
from shoal.errors import ProtocolViolation


class Collection:
    """Which parts of one span an owner has from whom; ``count`` is their number.

    A part is complete when everybody who is waited for has delivered it: members that contribute with a weight above 0
    and were not dropped. Nothing is complete before the owner's own contribution is settled. A sender's clock runs
    while the owner waits for its next part: not before that, and not while the sender is held.

    :param timeout: seconds for which a sender's next part is waited for; None: for ever
    :param dropped: members from which nothing is taken, and why
    :param lateness: by which deadlines that adapt a sender is late
    :param each_part: seconds that a part may take on the average, beside ``timeout`` once
    """

    def __init__(
        self,
        roles: Roles,
        count: int,
        timeout: float | None,
        lateness: Lateness,
        dropped: Mapping[int, str] | None = None,
        *,
        each_part: float | None = None,
    ) -> None:
        self.count = count
        in_all = None if timeout is None or each_part is None else timeout + count * each_part
        self.clocks: PartClocks[int] = PartClocks(timeout, in_all)
        self.weights: list[float | None] = [None if does else 0.0 for does in roles.contributes]
        """As each member declared its own; None: not yet."""
        self.dropped: dict[int, str] = dict(dropped or {})
        self.lateness = lateness
        self._roles = roles
        self._settled = False
        self._delivered = [0] * roles.size
        self._held: set[int] = set()
        self._released = 0
        self._averaged = 0

    @property
    def is_averaged(self) -> bool:
        """Whether the whole span has been averaged."""
        return self._averaged == self.count

    def delivered_by(self, sender: int) -> int:
        """Parts that a member has delivered."""
        return self._delivered[sender]

    @property
    def partial(self) -> tuple[tuple[int, int], ...]:
        """Once the span is averaged: the members of which only the first so many parts are in the average."""
        return tuple(
            (sender, parts)
            for sender, parts in enumerate(self._delivered)
            if parts < self.count and self._roles.contributes[sender] and self.weights[sender] != 0
        )

    @property
    def deadline(self) -> float:
        """When a sender's time is up, or it becomes late."""
        return min(self.clocks.deadline, self.lateness.due)

    def late(self, now: float) -> list[int]:
        """Senders that have become late, by deadlines that adapt."""
        contributors = [one for one, does in enumerate(self._roles.contributes) if does]
        return self.lateness.late(sum(map(self._waits_for, contributors)), now)

    def settle(self, weight: float | None, now: float) -> None:
        """The own contribution lies in the arena (``weight`` None: there will be none): the others are awaited."""
        me = self._roles.me
        self.lateness.settle(me if weight else None, now)
        if weight is not None:
            self.weights[me], self._delivered[me] = weight, self.count
        elif self.weights[me] is None:
            self.dropped[me] = "it contributes nothing"
        self._settled = True
        for sender in self._roles.others:
            self._watch(sender, now)

    def declare(self, sender: int, weight: float) -> None:
        """:raises ProtocolViolation: not a weight, declared before, or none is expected of this member"""
        name = self._roles.name(sender)
        if not self._roles.contributes[sender] or sender == self._roles.me:
            raise ProtocolViolation(f"{name} declared a weight, but contributes nothing here")
        if self.weights[sender] is not None:
            raise ProtocolViolation(f"{name} declared its weight twice")
        if not is_weight(weight):
            raise ProtocolViolation(f"{name} declared the weight {weight}")
        self.weights[sender] = weight
        if weight == 0:
            self._stop(sender)

    def deliver(self, sender: int, index: int, now: float) -> None:
        """:raises ProtocolViolation: not the sender's next part, or it declared no weight for it"""
        name = self._roles.name(sender)
        if not self.weights[sender] or sender == self._roles.me:
            raise ProtocolViolation(f"{name} sent a part, but declared no weight for it")
        if index != self._delivered[sender] or index >= self.count:
            raise ProtocolViolation(
                f"{name} sent part {index} of {self.count}, expected {self._delivered[sender]}"
            )
        self._delivered[sender] += 1
        self.lateness.arrive(sender, now)
        self._watch(sender, now)

    def hold(self, sender: int) -> None:
        """Nothing is taken from the sender for now, which is ahead: its clock stands still."""
        self._held.add(sender)
        self._stop(sender)
        self.lateness.hold(sender)

    def resume(self, sender: int, now: float) -> None:
        self._held.discard(sender)
        self.lateness.resume(sender, now)
        self._watch(sender, now)

    def drop(self, sender: int, reason: str, now: float) -> None:
        """Wait no more for what a sender has not delivered."""
        self.dropped[sender] = reason
        self.lateness.give_up(sender, now)
        self._stop(sender)

    def shift(self, seconds: float) -> None:
        """Time that does not count."""
        self.clocks.shift(seconds)
        self.lateness.shift(seconds)

    def keep(self, sender: int, parts: int) -> None:
        """Of what a sender delivered, no more than its first parts are in the average."""
        self._delivered[sender] = min(self._delivered[sender], parts)

    def release(self) -> range:
        """The parts that became complete since the last call."""
        complete = 0
        if self._settled:
            counts = (n for sender, n in enumerate(self._delivered) if self._waits_for(sender))
            complete = min(counts, default=self.count)
        first, self._released = self._released, max(self._released, complete)
        return range(first, self._released)

    def average(self, index: int) -> None:
        """A part that was released has been averaged."""
        if index != self._averaged or index >= self._released:
            raise AssertionError(
                f"part {index} averaged out of turn, after {self._averaged} of {self._released}"
            )
        self._averaged += 1

    def _waits_for(self, sender: int) -> bool:
        return sender not in self.dropped and self.weights[sender] != 0

    def _watch(self, sender: int, now: float) -> None:
        """Start the sender's clock, unless nothing more is awaited of it, or it is held back."""
        awaited = self._settled and self._waits_for(sender) and self._delivered[sender] < self.count
        if awaited and sender not in self._held:
            self.clocks.start(sender, now)
            self.lateness.start(sender, now)
        else:
            self._stop(sender)

    def _stop(self, sender: int) -> None:
        self.clocks.stop(sender)
        self.lateness.stop(sender)


@dataclass
class _Owed:
    """The averages of one span, on their way to this member."""

    span: Span
    sent: int = 0
    received: int = 0
    report: SpanAveraged | None = None


class Returns:
    """Which averages a member has of which span of others.

    A span's clock runs from the member's snapshot on, and later while its owner has all that its next average needs of
    this member, since the average before.
    """

    def __init__(self, roles: Roles, timeout: float | None) -> None:
        self.clocks: PartClocks[SpanId] = PartClocks(timeout)
        self.received = 0
        """Averages of all owners that have come."""
        self._roles = roles
        self._owed: dict[SpanId, _Owed] = {}
        self._missing = 0
        """Spans whose owners have not said their last word."""
        self._begun = False
        self._sends = True

    @property
    def is_complete(self) -> bool:
        return not self._missing

    @property
    def reports(self) -> list[SpanAveraged]:
        """What the owners said of spans whose averages have all come."""
        return [owed.report for owed in self._owed.values() if owed.report is not None]

    def misses(self, span: SpanId) -> bool:
        """Whether averages of this span, or its owner's last word on it, are still to come."""
        owed = self._owed.get(span)
        return owed is not None and owed.report is None

    def expect(self, spans: Iterable[Span], now: float) -> None:
        """Averages of these spans are owed to this member."""
        for span in spans:
            self._owed[span.id] = _Owed(span)
            self._missing += 1
            if self._begun:
                self.clocks.start(span.id, now)

    def forget(self, spans: Iterable[SpanId]) -> None:
        """These spans are void."""
        for span in spans:
            if self.misses(span):
                self._missing -= 1
            self._owed.pop(span, None)
            self.clocks.stop(span)

    def begin(self, weight: float, now: float) -> None:
        """The own snapshot was taken; with weight 0 nothing is sent."""
        self._sends, self._begun = weight != 0, True
        for span in self._owed:
            if self.misses(span):
                self.clocks.start(span, now)

    def open(self, span: SpanId, now: float) -> None:
        """The owner takes parts of the span from now on."""
        self._watch(span, now)

    def send(self, span: SpanId, index: int, now: float) -> None:
        owed = self._owed.get(span)
        if owed is not None:
            owed.sent = index + 1
            if not self.clocks.runs(span):
                self._watch(span, now)

    def receive(self, span: SpanId, index: int, now: float) -> None:
        """:raises ProtocolViolation: not the span's next average"""
        owed = self._owed.get(span)
        if owed is None or index != owed.received or index >= owed.span.count:
            raise ProtocolViolation(
                f"the owner of {span} returned part {index}, expected {owed.received if owed else 'none'}"
            )
        owed.received += 1
        self.received += 1
        self._watch(span, now)

    def complete(self, report: SpanAveraged, now: float) -> None:
        """:raises ProtocolViolation: averages of the span are still to come, or it was completed before"""
        owed = self._owed.get(report.span)
        if owed is None or owed.report is not None or owed.received != owed.span.count:
            raise ProtocolViolation(f"the owner of {report.span} closed it out of turn")
        owed.report = report
        self._missing -= 1
        self._watch(report.span, now)

    def _watch(self, span: SpanId, now: float) -> None:
        owed = self._owed.get(span)
        if owed is None:
            return
        is_due = not self._sends or owed.sent > owed.received or owed.received == owed.span.count
        if is_due and owed.report is None:
            self.clocks.start(span, now)
        else:
            self.clocks.stop(span)
