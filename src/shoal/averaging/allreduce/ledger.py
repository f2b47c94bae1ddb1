"""A member's part in the exchange: the parts that it collects for its own spans, the averages that others owe it, and
the repairs that change who owes what. Pure.

:mod:`.core` decides what this means for the round. What is to be reported to the leader is an effect here; the leader's
own core keeps it to itself.
"""

from __future__ import annotations

from shoal.averaging.allreduce.assignment import FIRST_EPOCH, Assignment, Repair, Span, SpanId
from shoal.averaging.allreduce.books import Collection, Returns
from shoal.averaging.allreduce.effects import (
    AveragePart,
    DropSender,
    Effect,
    OpenSpans,
    ReturnAverage,
    ReturnReport,
    TellLeader,
    VoidSpans,
)
from shoal.averaging.allreduce.events import (
    OwnerEvent,
    PartAveraged,
    PartDelivered,
    Roles,
    RoundTimeouts,
    SenderAwaited,
    SenderHeld,
    SenderLost,
    WeightDeclared,
)
from shoal.averaging.allreduce.lateness import Lateness, Waits
from shoal.averaging.allreduce.messages import Loss, OwnerFailed, SenderExcluded, SpanAveraged, reason_text

CATCH_UP = 1.0
"""Seconds that a process which was stopped, or busy, takes to read what has arrived meanwhile."""


class Ledger:
    """Which parts and averages the members owe each other, as this one sees it.

    ``weight`` is its own; None before the snapshot, or if there is none. ``excluded``: members that the round goes on
    without, and why.
    """

    def __init__(self, roles: Roles, timeouts: RoundTimeouts) -> None:
        self.roles = roles
        self.assignment = Assignment.first(roles.parts_owned)
        self.weight: float | None = None
        self.excluded: dict[int, str] = {}
        self._adapted = timeouts.adapted
        self.returns = Returns(roles, timeouts.reducer)
        self.collections: dict[SpanId, Collection] = {}
        self.reports: dict[SpanId, SpanAveraged] = {}
        """Of own spans that have been averaged."""
        self._sender_timeout = timeouts.sender
        self._each_part = timeouts.each_part
        self._is_settled = False
        self._failed: set[SpanId] = set()
        """Spans whose averages will not come."""
        self._complaints: list[OwnerFailed | SenderExcluded] = []
        self._takes_averages = roles.contributes[roles.me]
        self._open(self.assignment.spans, 0.0)

    def _open(self, spans: tuple[object, ...], now: float) -> None:
        me = self.roles.me
        for span in self.assignment.spans:
            if span not in spans:
                continue
            if span.owner == me:
                book = Collection(
                    self.roles,
                    span.count,
                    self._sender_timeout,
                    self._lateness(span),
                    self.excluded,
                    each_part=self._each_part,
                )
                self.collections[span.id] = book
                if self._is_settled:
                    book.settle(self.weight, now)
            elif self._takes_averages:
                self.returns.expect([span], now)

    def _lateness(self, span: Span) -> Lateness:
        size, least = sum(self.roles.contributes), self.roles.min_size
        return Lateness(self._adapted, size, least, is_first=span.id.epoch == FIRST_EPOCH)

    @property
    def waits(self) -> Waits:
        """How long others took, as far as deadlines may adapt to it."""
        waits = Waits()
        if self.roles.contributes[self.roles.me] and not self._takes_averages:
            return waits  # it stood aside: its own link may be why all of them took long
        for book in self.collections.values():
            waits.add(book.lateness.waits)
        return waits

    @property
    def is_complete(self) -> bool:
        """Whether all own spans are averaged, and all averages of others are here."""
        return self.is_served and self.returns.is_complete

    @property
    def is_served(self) -> bool:
        """Whether all own spans are averaged."""
        return all(book.is_averaged for book in self.collections.values())

    @property
    def deadline(self) -> float:
        clocks = [self.returns.clocks.deadline, *(book.deadline for book in self.collections.values())]
        return min(clocks)

    def knows_of(self) -> tuple[SpanAveraged, ...]:
        """What this member can say of spans that it holds."""
        return (*self.reports.values(), *self.returns.reports)

    def settle(self, weight: float | None, now: float) -> list[Effect]:
        """The snapshot was taken, or will not be (None): from now on the others are awaited."""
        self._is_settled = True
        self.weight = weight
        if weight is not None:
            self.returns.begin(weight, now)
        for book in self.collections.values():
            book.settle(weight, now)
        return self.release()

    def stop_taking(self) -> None:
        """This member will not commit: it waits for no averages any more."""
        self._takes_averages = False
        self.returns.forget([span.id for span in self.assignment.spans])

    def release(self) -> list[Effect]:
        """Have what became complete averaged."""
        return [
            AveragePart(span, index) for span, book in self.collections.items() for index in book.release()
        ]

    # as an owner

    def on_owner_event(self, event: OwnerEvent, now: float) -> list[Effect]:
        book = self.collections.get(event.span)
        if book is None:
            return []  # the span is void
        match event:
            case WeightDeclared(_, sender, weight):
                book.declare(sender, weight)
            case SenderHeld(_, sender):
                book.hold(sender)
            case SenderAwaited(_, sender):
                book.resume(sender, now)
            case PartDelivered(span, sender, index):
                book.deliver(sender, index, now)
                self._forgive(span, sender)
            case PartAveraged():
                return self._on_averaged(event, book)
            case SenderLost(span, sender, reason, loss, kept):
                return self._lose_sender(span, sender, reason, loss, now, kept)
        return [*self._report_late(event.span, book, now), *self.release()]

    def _report_late(self, span: SpanId, book: Collection, now: float) -> list[Effect]:
        """Tell the leader which senders are late: it decides, since it knows of how many that is said."""
        effects: list[Effect] = []
        for sender in book.late(now):
            reason = book.lateness.describe(sender)
            effects += self._complain(SenderExcluded(span, sender, reason, Loss.LATE))
        return effects

    def _forgive(self, span: SpanId, sender: int) -> None:
        """What was late has come."""
        self._complaints = [
            one
            for one in self._complaints
            if not (isinstance(one, SenderExcluded) and one.loss is Loss.LATE)
            or (one.span, one.sender) != (span, sender)
        ]

    def _on_averaged(self, event: PartAveraged, book: Collection) -> list[Effect]:
        book.average(event.index)
        effects: list[Effect] = [ReturnAverage(event.span, event.index)]
        if book.is_averaged:
            report = SpanAveraged(
                event.span, tuple(book.weights), event.square_distance, event.square_average, book.partial
            )
            self.reports[event.span] = report
            effects += [ReturnReport(report), TellLeader(report)]
        return effects

    def _lose_sender(
        self,
        span: SpanId,
        sender: int,
        reason: str,
        loss: Loss,
        now: float,
        kept: int | None = None,
        *,
        is_silent: bool = False,
    ) -> list[Effect]:
        if kept is not None:
            self.collections[span].keep(sender, kept)
        if not self._takes_from(span, sender):
            return []  # a member that still waits for averages notices by itself
        dropped = self._drop(span, sender, reason, now, is_silent=is_silent)
        return [*dropped, *self._complain(SenderExcluded(span, sender, reason_text(reason), loss))]

    def _complain(self, report: OwnerFailed | SenderExcluded) -> list[Effect]:
        self._complaints.append(report)
        return [TellLeader(report)]

    def complain_again(self) -> list[Effect]:
        """Tell a new leader what the one before it was told, as far as something is still missing."""
        return [TellLeader(report) for report in self._complaints if self._matters(report)]

    def _matters(self, report: OwnerFailed | SenderExcluded) -> bool:
        if isinstance(report, OwnerFailed):
            return self.returns.misses(report.span)  # the owner may have been slow, and not lost
        book = self.collections.get(report.span)
        return book is not None and not book.is_averaged

    def _takes_from(self, span: SpanId, sender: int) -> bool:
        """Whether a span still counts on a member's parts."""
        book = self.collections[span]
        is_other = sender != self.roles.me and self.roles.contributes[sender]
        return is_other and not book.is_averaged and sender not in book.dropped

    def _drop(
        self, span: SpanId, sender: int, reason: str, now: float, *, is_silent: bool = False
    ) -> list[Effect]:
        self.collections[span].drop(sender, reason, now)
        return [DropSender(span, sender, reason, is_silent), *self.release()]

    # as a member

    def lose_owner(self, span: SpanId, reason: str, loss: Loss) -> list[Effect]:
        """The averages of a span will not come from its owner."""
        if span in self._failed or not self.returns.misses(span):
            return []
        self._failed.add(span)
        self.returns.clocks.stop(span)
        return self._complain(OwnerFailed(span, reason_text(reason), loss))

    def exclude(self, member: int, reason: str, now: float) -> list[Effect]:
        """The leader's word: nobody waits any more for what a member has not delivered."""
        self.excluded[member] = reason
        effects: list[Effect] = []
        for span in self.collections:
            if self._takes_from(span, member):
                effects += self._drop(span, member, reason, now)
        return effects

    def repair(self, order: Repair, now: float) -> list[Effect]:
        """Take in the leader's order: what is void is dropped, what is new begins.

        :raises ProtocolViolation: the order does not fit what is known here
        """
        if order in self.assignment.orders:
            return []
        before = self.assignment
        self.assignment = before.after(order)
        void = tuple(span.id for span in before.spans if span.id not in self.assignment.by_id)
        opened = tuple(span for span in self.assignment.spans if span.id not in before.by_id)
        self.returns.forget(void)
        self._failed.difference_update(void)
        for span in void:
            self.collections.pop(span, None)
            self.reports.pop(span, None)
        self._open(opened, now)
        return [VoidSpans(void), OpenSpans(opened), *self.release()]

    def _story_of(self, book: Collection, sender: int) -> str:
        """Why a sender whose time is up is waited for no more."""
        if book.clocks.is_spent(sender):
            return f"its parts took more than {book.clocks.in_all:g} s in all"
        what = "no further part, or took no average," if book.delivered_by(sender) else "no part"
        return f"it sent {what} within sender_timeout={self._sender_timeout:g} s"

    def on_time(self, late: float, now: float) -> list[Effect]:
        """Others' time does not count while this process was stopped, or busy."""
        uncounted = late + CATCH_UP if late else 0.0
        effects: list[Effect] = []
        for span, book in list(self.collections.items()):
            book.shift(uncounted)
            for sender in book.clocks.expired(now):
                begun = book.delivered_by(sender)
                reason = self._story_of(book, sender)
                effects += self._lose_sender(span, sender, reason, Loss.TIMED_OUT, now, is_silent=not begun)
                book.clocks.stop(sender)
            effects += self._report_late(span, book, now)
        self.returns.clocks.shift(uncounted)
        for span_id in self.returns.clocks.expired(now):
            self.returns.clocks.stop(span_id)
            reason = f"it returned no average within reducer_timeout={self.returns.clocks.timeout:g} s"
            effects += self.lose_owner(span_id, reason, Loss.TIMED_OUT)
        return effects
