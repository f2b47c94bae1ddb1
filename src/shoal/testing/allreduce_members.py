"""What one member of a simulated group is made of: its core, and the state of its shell."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TypeAlias

from shoal.averaging.allreduce.assignment import Span, SpanId
from shoal.averaging.allreduce.core import AllReduce
from shoal.averaging.allreduce.events import Event, Roles, RoundTimeouts
from shoal.sansio.core import NEVER
from shoal.testing.links import Node, SimulatedStream

Value: TypeAlias = frozenset[tuple[int, float]]
"""What stands for an average: the members in it, with their weights."""


class Violation(AssertionError):
    """An invariant does not hold."""


@dataclass(eq=False)
class Serving:
    """An own span at its owner."""

    span: Span
    streams: dict[int, SimulatedStream] = field(default_factory=dict)
    arrived: dict[int, dict[int, float]] = field(default_factory=dict)
    """For each part: the weight of each member that delivered it."""
    cut: dict[int, int] = field(default_factory=dict)
    """Members of which only the first parts count."""


class Member(Node):
    """One core, and the state of its shell."""

    def __init__(self, roles: Roles, timeouts: RoundTimeouts, weight: float) -> None:
        super().__init__()
        self.core = AllReduce(roles, timeouts)
        self.weight = weight
        self.serving: dict[SpanId, Serving] = {}
        self.taking: dict[SpanId, SimulatedStream] = {}
        self.averages: dict[int, Value] = {}
        """Of each part that this member holds."""
        self.words: list[Event] = []
        """What this leader has announced in its term, for members that join later."""
        self.followers: dict[int, SimulatedStream] = {}
        self.following: SimulatedStream | None = None
        self.refused_since: dict[int, float] = {}
        self.has_snapshot = False
        self.timer = NEVER
        self.has_forgotten = False
        """It does not remember a round that has ended."""
        self.bad_part: int | None = None
        """From which part on what it sends is not finite."""
