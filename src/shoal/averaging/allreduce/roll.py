"""What a leader knows of each member of its group: who is ready, who is out, and who may own spans. Pure."""

from __future__ import annotations

from dataclasses import dataclass, field

from shoal.averaging.allreduce.effects import AnnounceExclusion
from shoal.averaging.allreduce.events import Roles
from shoal.averaging.allreduce.messages import Excluded, exclusion_text
from shoal.averaging.allreduce.pairs import Pairs


@dataclass
class Roll:
    """The members, as one leader sees them."""

    roles: Roles
    ready: dict[int, float] = field(default_factory=dict)
    """Weights of the members that are ready."""
    excluded: dict[int, Excluded] = field(default_factory=dict)
    """Members whose tensors the round goes on without, in the order in which that happened."""
    gone: set[int] = field(default_factory=set)
    """Members that serve nobody any more."""
    slow: dict[int, str] = field(default_factory=dict)
    """Owners that returned nothing for too long, and what was said of the first such span: they get no more."""
    pairs: Pairs = field(default_factory=Pairs)
    """Members that cannot talk with each other."""

    @property
    def out(self) -> set[int]:
        """Members from which nothing is expected any more, though an excluded one may still serve."""
        return self.excluded.keys() | self.gone

    @property
    def committers(self) -> list[int]:
        """Everybody who will apply the average if the round commits."""
        return [one for one in self._contributors if one not in self.excluded]

    @property
    def unready(self) -> list[int]:
        """Those of them that miss averages, or have not said that they have all."""
        return [one for one in self.committers if one not in self.ready]

    @property
    def able(self) -> list[int]:
        """Members that may own spans."""
        out = self.out | self.slow.keys()
        return [one for one in range(self.roles.size) if self.roles.serves(one) and one not in out]

    @property
    def exclusions(self) -> tuple[Excluded, ...]:
        return tuple(self.excluded.values())

    @property
    def heir(self) -> int | None:
        """The first member but this one that may lead and seems to live."""
        out = self.out | {self.roles.me}
        return next(
            (one for one in range(self.roles.size) if self.roles.serves(one) and one not in out), None
        )

    @property
    def shortage(self) -> str | None:
        """Why too few members are left for a round; None: they are enough."""
        left = self.committers
        if not left:
            first = self.exclusions[0]
            return f"no member is left: {self.roles.name(first.member)}: {first.reason}"
        helpers = [one for one in range(self.roles.size) if not self.roles.contributes[one]]
        if len(left) + len([one for one in helpers if one not in self.gone]) < self.roles.min_size:
            lost = "; ".join(f"{self.roles.name(one.member)}: {one.reason}" for one in self.exclusions)
            return f"fewer than min_group_size={self.roles.min_size} members are left: {lost}"
        return None

    @property
    def _contributors(self) -> list[int]:
        return [one for one in range(self.roles.size) if self.roles.contributes[one]]

    def exclude(self, member: int, phase: str, seconds: float, reason: str) -> list[AnnounceExclusion]:
        """Go on without a member's tensors; what is to be told the others, unless they know."""
        if member in self.excluded:
            return []
        notice = Excluded(member, phase, max(0.0, seconds), exclusion_text(reason, self.roles.size))
        self.excluded[member] = notice
        return [AnnounceExclusion(notice)]

    def begin_anew(self) -> list[AnnounceExclusion]:
        """Parts are averaged again. Nobody is ready any more, and members that are gone will not be."""
        self.ready.clear()
        return [
            notice
            for member in sorted(self.gone - self.excluded.keys())
            if self.roles.contributes[member]
            for notice in self.exclude(member, "exchange", 0.0, "lost before the parts were averaged again")
        ]

    def describe(self, member: int) -> str:
        """Its name, and what is held against it."""
        name, excluded = self.roles.name(member), self.excluded.get(member)
        if excluded is not None:
            return f"{name} ({excluded.reason})"
        return f"{name} ({self.slow[member]})" if member in self.slow else name
