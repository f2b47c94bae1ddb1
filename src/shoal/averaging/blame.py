"""Whose fault it is that members of a group cannot talk with each other. Pure.

A stream has two ends, and either may be at fault: so what is known are pairs. A member of several pairs is at fault
itself, whatever its word against that of the others. Matchmaking and rounds go by this rule.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

Pair = frozenset[int]
"""Two members of a group, by their indices."""


def worst_of(pairs: Iterable[Pair]) -> int | None:
    """The member of the most pairs, of equal ones the last; None: nobody is in several."""
    counts = Counter(member for pair in pairs for member in pair)
    worst = max(counts, key=lambda member: (counts[member], member), default=None)
    return None if worst is None or counts[worst] < 2 else worst
