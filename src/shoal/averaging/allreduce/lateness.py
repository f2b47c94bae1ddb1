"""Which senders of one span are late, by deadlines that adapt, and how long each member was waited for. Pure.

A sender is late only where others are not, so that a deadline which has become too short excludes few:

- Its first part is late when it comes so much later than the *middle* of the group, the time at which half of the
  contributors had delivered theirs. Before half of them have, nobody is late. The owner counts as one that delivers at
  its own snapshot.
- A later part is late when the owner has waited for it that long, and :data:`TIMES_THE_OTHERS` times as long as for any
  part of half of the others. Over a slow link of the owner's own, all of them take long, and none is late.
- And at least ``min_size`` contributors are in time: with fewer, the owner waits for the best of those that are late.

So the owner alone excludes nobody: it tells the leader, which keeps ``min_size`` contributors across all owners.
"""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import dataclass, field

from shoal.averaging.allreduce.events import AdaptedDeadlines
from shoal.sansio.core import NEVER

FLOOR = 2.0
"""Seconds: less says nothing of a peer. Lost packets, a busy process and a collection of garbage take that long."""
TIMES_THE_OTHERS = 2.5
"""Times as long as half of the others, in the same round, whatever earlier rounds were like."""
GIVEN_UP = 2.0
"""A wait that ended with the member's exclusion counts this many times: it would have been longer."""


@dataclass
class Waits:
    """What a member saw in one round, in seconds.

    :param offsets: of each contributor, by how much its first part came later (or earlier, below 0) than the middle of
      the group
    :param parts: for each sender, the longest time between two of its parts
    """

    offsets: list[float] = field(default_factory=list)
    parts: list[float] = field(default_factory=list)

    def add(self, other: Waits) -> None:
        self.offsets += other.offsets
        self.parts += other.parts


class Lateness:
    """Of the senders of one span.

    :param size: how many contributors there are, the owner itself included if it is one
    :param min_size: so many of them at least are in time when another one is called late
    :param is_first: whether the span was assigned when the group was formed. One that was assigned later begins with
      the order: its first parts are like any others, and the leader's delay is in them, so that nothing is learnt
    """

    def __init__(
        self, deadlines: AdaptedDeadlines, size: int, min_size: int, *, is_first: bool = True
    ) -> None:
        self.deadlines = deadlines
        self._half = (size + 1) // 2
        self._half_of_others = max(1, size // 2)
        self._min_size = min_size
        self._is_first = is_first
        self._arrived: dict[int, float] = {}
        """When the first part of each contributor came; the owner's own snapshot is its own."""
        self._longest: dict[int, float] = {}
        """Of each sender, the longest time between two of its parts."""
        self._missed: list[float] = []
        """Offsets of members that were given up before their first part."""
        self._since: dict[int, float] = {}
        """Since when a sender's next part is awaited."""
        self._latest: dict[int, float] = {}
        """When a sender's previous part came, awaited or not, or since when it may go on. Not while it is held."""
        self._overdue: set[int] = set()
        self._told: set[int] = set()
        """Senders that were called late: once, until they deliver again."""

    def settle(self, owner: int | None, now: float) -> None:
        """From now on senders are awaited. ``owner``: the own number, if it contributes."""
        if owner is not None:
            self._arrived[owner] = now

    def start(self, sender: int, now: float) -> None:
        """The sender's next part is awaited."""
        self._since[sender] = now
        if not self._is_first:
            self._latest.setdefault(sender, now)

    def stop(self, sender: int) -> None:
        """Nothing is awaited of the sender for now."""
        self._since.pop(sender, None)
        self._overdue.discard(sender)
        self._told.discard(sender)

    def arrive(self, sender: int, now: float) -> None:
        """A part of the sender has come."""
        if sender in self._latest:
            self._note(sender, now - self._latest[sender])
        self._latest[sender] = now
        self._arrived.setdefault(sender, now)
        self.stop(sender)

    def hold(self, sender: int) -> None:
        """Nothing is taken from the sender for now."""
        self._latest.pop(sender, None)
        self.stop(sender)

    def resume(self, sender: int, now: float) -> None:
        """The sender may go on."""
        if self._is_under_way(sender):
            self._latest[sender] = now

    def give_up(self, sender: int, now: float) -> None:
        """The round goes on without the sender: what would have come later counts all the same."""
        since = self._since.get(sender)
        if since is None:
            return
        if self._is_under_way(sender):
            self._note(sender, GIVEN_UP * (now - since))
        elif self._middle < now:
            self._missed.append(GIVEN_UP * (now - self._middle))
        self.stop(sender)

    def shift(self, seconds: float) -> None:
        """Time that does not count."""
        for times in (self._since, self._arrived, self._latest):
            for key in times:
                times[key] += seconds

    @property
    def due(self) -> float:
        """When the next sender may become late; NEVER if none can before something else happens."""
        limits = self._limits
        return min((limits[sender] for sender in limits if sender not in self._overdue), default=NEVER)

    def late(self, counted: int, now: float) -> list[int]:
        """Senders that have become late.

        :param counted: contributors on which the owner still counts, itself included
        """
        self._overdue = {sender for sender, limit in self._limits.items() if limit <= now}
        if counted - len(self._overdue) < self._min_size:
            return []
        news = sorted(self._overdue - self._told)
        self._told.update(news)
        return news

    def describe(self, sender: int) -> str:
        """Why a sender is called late."""
        limit = self._limits[sender]
        if self._is_under_way(sender):
            return f"it sent no further part within {limit - self._since[sender]:.3g} s (adaptive_timeouts)"
        offset = limit - self._middle
        return f"its first part is {offset:.3g} s later than those of half of the group (adaptive_timeouts)"

    @property
    def waits(self) -> Waits:
        """What was seen so far, of members that others can be compared with."""
        if not self._is_first:
            return Waits()
        middle, parts = self._middle, list(self._longest.values())
        if not math.isfinite(middle):
            return Waits(parts=parts)
        return Waits([*(at - middle for at in self._arrived.values()), *self._missed], parts)

    def _is_under_way(self, sender: int) -> bool:
        return sender in self._arrived or not self._is_first

    def _note(self, sender: int, seconds: float) -> None:
        self._longest[sender] = max(seconds, self._longest.get(sender, 0.0))

    @property
    def _middle(self) -> float:
        """When half of the contributors had delivered their first part."""
        return smallest(self._arrived.values(), self._half)

    @property
    def _limits(self) -> dict[int, float]:
        """When each sender that is awaited is late."""
        middle = self._middle
        head_start = middle - min(self._arrived.values(), default=middle) if math.isfinite(middle) else 0.0
        first = middle + max(self.deadlines.offset, TIMES_THE_OTHERS * head_start)
        pace = smallest(self._longest.values(), self._half_of_others)
        later = max(self.deadlines.part, TIMES_THE_OTHERS * pace)
        return {
            sender: since + later if self._is_under_way(sender) else max(first, since + FLOOR)
            for sender, since in self._since.items()
        }


def smallest(times: Collection[float], count: int) -> float:
    """The ``count``-th smallest; NEVER if there are not so many."""
    return sorted(times)[count - 1] if len(times) >= count else NEVER
