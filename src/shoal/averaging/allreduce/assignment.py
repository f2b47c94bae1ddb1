"""Which member averages which parts: spans, the epochs in which they are assigned, and what a repair changes. Pure.

A *span* is a run of parts, and its *owner* averages it. The first assignment gives each owner one span
(:mod:`shoal.averaging.partition`). When an owner fails, the leader declares its spans void and cuts their parts among
the members that are left, in a new *epoch*. A span is named by its number within an epoch, so that what belongs to a
void one can never be taken for its successor's.

Epochs are ordered by the term of the leader that ordered them, and by a number within that term. Every member computes
the same assignment from the same orders.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

from shoal.errors import ProtocolViolation
from shoal.utils.structs import Message

MAX_ORDERS = 4096
"""Repairs in one round that a member accepts: far more than a group has members to lose."""


class Epoch(NamedTuple):
    """When spans were assigned: the leader's term, and a number within it. Later ones are greater."""

    term: int
    number: int

    def __str__(self) -> str:
        return f"{self.term}.{self.number}"


FIRST_EPOCH = Epoch(0, 0)


class SpanId(NamedTuple):
    """The name of a span: its number among those that were assigned in one epoch."""

    span: int
    epoch: Epoch = FIRST_EPOCH

    def __str__(self) -> str:
        return f"span {self.span} of epoch {self.epoch}"


@dataclass(frozen=True, slots=True)
class Span:
    """``count`` parts from number ``first`` on, averaged by the member ``owner``."""

    id: SpanId
    owner: int
    first: int
    count: int

    @property
    def parts(self) -> range:
        """The numbers of its parts in the partition."""
        return range(self.first, self.first + self.count)


class Repair(Message, frozen=True):
    """The leader's order: these spans are void, and their parts go to these owners in a new epoch.

    ``after``: the epoch of the order before it, if there is one. A member that knows other orders after that one
    forgets them: they came from a leader of a lower term.
    """

    epoch: Epoch
    void: tuple[SpanId, ...]
    owners: tuple[int, ...]
    after: Epoch = FIRST_EPOCH


@dataclass(frozen=True)
class Assignment:
    """The spans that count, after all ``orders``. ``parts_owned``: of each member, before any order."""

    parts_owned: tuple[int, ...]
    spans: tuple[Span, ...]
    orders: tuple[Repair, ...] = ()

    @classmethod
    def first(cls, parts_owned: Sequence[int]) -> Assignment:
        """What follows from the partition alone: one span for each member that owns parts."""
        spans: list[Span] = []
        first = 0
        for owner, count in enumerate(parts_owned):
            if count:
                spans.append(Span(SpanId(owner), owner, first, count))
            first += count
        return cls(tuple(parts_owned), tuple(spans))

    @classmethod
    def replay(cls, parts_owned: Sequence[int], orders: Iterable[Repair]) -> Assignment:
        """The first assignment, after these orders.

        :raises ProtocolViolation: as :meth:`after`
        """
        assignment = cls.first(parts_owned)
        for order in orders:
            assignment = assignment.after(order)
        return assignment

    @cached_property
    def by_id(self) -> dict[SpanId, Span]:
        return {span.id: span for span in self.spans}

    @property
    def epoch(self) -> Epoch:
        """Of the last order; :data:`FIRST_EPOCH` before any."""
        return self.orders[-1].epoch if self.orders else FIRST_EPOCH

    def owned_by(self, member: int) -> tuple[Span, ...]:
        return tuple(span for span in self.spans if span.owner == member)

    def after(self, order: Repair) -> Assignment:
        """The assignment that the order makes of this one.

        The parts of all void spans are dealt in order, each owner getting a run of them; runs do not reach over the end
        of a void span.

        :raises ProtocolViolation: the order does not follow on one that is known, voids what does not count, or names
          members that do not exist
        """
        if order.after != self.epoch:
            return self._up_to(order.after).after(order)
        void = set(order.void)
        if order.epoch <= self.epoch or len(self.orders) >= MAX_ORDERS:
            raise ProtocolViolation(f"a repair in epoch {order.epoch} was ordered after epoch {self.epoch}")
        if not void or len(void) < len(order.void) or not void <= self.by_id.keys():
            raise ProtocolViolation(f"the repair in epoch {order.epoch} voids spans that do not count")
        if not order.owners or not all(0 <= owner < len(self.parts_owned) for owner in order.owners):
            raise ProtocolViolation(f"the repair in epoch {order.epoch} names no owners, or unknown ones")
        kept = tuple(span for span in self.spans if span.id not in void)
        dealt = _deal([self.by_id[span] for span in order.void], order)
        return Assignment(self.parts_owned, (*kept, *dealt), (*self.orders, order))

    def _up_to(self, epoch: Epoch) -> Assignment:
        """This assignment without the orders after ``epoch``."""
        epochs = [FIRST_EPOCH, *(order.epoch for order in self.orders)]
        if epoch not in epochs:
            raise ProtocolViolation(f"a repair was ordered after epoch {epoch}, which is not known here")
        return Assignment.replay(self.parts_owned, self.orders[: epochs.index(epoch)])


def _deal(void: Sequence[Span], order: Repair) -> list[Span]:
    total = sum(span.count for span in void)
    share = len(order.owners)
    borders = [total * turn // share for turn in range(share + 1)]
    dealt: list[Span] = []
    before = 0  # parts of the void spans that have been dealt
    for span in void:
        for owner, start, stop in zip(order.owners, borders, borders[1:], strict=False):
            first, end = max(start, before), min(stop, before + span.count)
            if first < end:
                name = SpanId(len(dealt), order.epoch)
                dealt.append(Span(name, owner, span.first + first - before, end - first))
        before += span.count
    return dealt
