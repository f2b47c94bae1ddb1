"""Pairs of members that cannot talk with each other, as the leader hears of them. Pure.

A stream that ends, or carries nothing, has two ends, and either may be at fault: so a complaint names a pair. Once a
pair has been known for :data:`GRACE` seconds and both of its members live, the leader keeps the two apart. A member
that cannot talk with several others is at fault itself, and so is an owner that is too slow for several.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field

from shoal.averaging.allreduce.events import Roles
from shoal.averaging.blame import Pair, worst_of
from shoal.sansio.core import NEVER

GRACE = 1.0
"""Seconds in which the leader notices that one of a pair is lost, after the other one has."""


@dataclass
class _Complaint:
    reason: str
    since: float
    slow: int | None
    """The member that is said to be too slow; None: they cannot talk at all."""


@dataclass(frozen=True)
class Culprit:
    """A member at fault, and why. ``is_slow``: it is there, and can contribute, but should own nothing."""

    member: int
    reason: str
    is_slow: bool


@dataclass
class Pairs:
    """What members said of each other."""

    _waiting: dict[Pair, _Complaint] = field(default_factory=dict)
    """Pairs that are not judged yet."""
    _broken: dict[Pair, _Complaint] = field(default_factory=dict)
    """Pairs that are to be kept apart."""

    @property
    def deadline(self) -> float:
        """When the next pair is to be judged."""
        return min((pair.since for pair in self._waiting.values()), default=NEVER) + GRACE

    def complain(self, member: int, other: int, reason: str, now: float, *, is_slow: bool = False) -> None:
        """``member`` says that it cannot talk with ``other``, or that ``other`` is too slow."""
        pair = frozenset((member, other))
        if pair not in self._broken:
            self._waiting.setdefault(pair, _Complaint(reason, now, other if is_slow else None))

    def shift(self, seconds: float) -> None:
        """Time that does not count."""
        for pair in self._waiting.values():
            pair.since += seconds

    def judge(self, now: float, out: Collection[int], roles: Roles) -> list[Culprit]:
        """Take the pairs of which it has been known for long enough as broken, unless one of them is lost.

        :param out: members that the round goes on without
        :returns: members that are at fault
        """
        if self.deadline > now:
            return []
        self._broken |= self._waiting  # what is known of a later one belongs to the picture
        self._waiting.clear()
        faults: list[Culprit] = []
        gone = set(out)
        while True:
            worst = worst_of(self._living(gone))
            if worst is None:
                return faults
            found = self._describe(worst, gone, roles)
            faults.append(found)
            if found.is_slow:
                for pair in [pair for pair in self._living(gone) if worst in pair]:
                    del self._broken[pair]
            else:
                gone.add(worst)

    def _describe(self, member: int, gone: Collection[int], roles: Roles) -> Culprit:
        pairs = [self._broken[pair] for pair in self._living(gone) if member in pair]
        if all(pair.slow == member for pair in pairs):
            return Culprit(member, pairs[0].reason, is_slow=True)
        others = ", ".join(roles.name(one) for one in sorted(self._partners(member, gone)))
        return Culprit(member, f"it cannot talk with several members: {others}", is_slow=False)

    def has(self, member: int, out: Collection[int]) -> bool:
        """Whether there is a living member that ``member`` cannot talk with."""
        return bool(self._partners(member, out))

    def separates(self, owner: int, members: Collection[int], out: Collection[int]) -> bool:
        """Whether ``owner`` cannot talk with one of these members."""
        return any(partner in members for partner in self._partners(owner, out)) or (
            owner in members and self.has(owner, out)
        )

    def _living(self, out: Collection[int]) -> list[Pair]:
        return [pair for pair in self._broken if not any(member in out for member in pair)]

    def _partners(self, member: int, out: Collection[int]) -> set[int]:
        return {one for pair in self._living(out) if member in pair for one in pair if one != member}
