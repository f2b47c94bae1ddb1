"""The contract of a core that decides. Pure."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, TypeVar

E = TypeVar("E", contravariant=True)
F = TypeVar("F", covariant=True)

NEVER = math.inf
"""The deadline of a core that waits for no time."""


@dataclass(frozen=True)
class TimePassed:
    """The deadline of a core has come."""

    late: float = 0.0
    """Seconds since then in which nobody could act: this process was stopped, or busy. A core that measures others'
    patience adds them, so that its own sleep is not taken for theirs."""


class Core(Protocol[E, F]):
    """Takes in what happened, and says what is to be done.

    It does no I/O and knows no clock and no randomness: the same events at the same times have the same effects. It
    holds no lock, because it has one caller.
    """

    def handle(self, event: E, now: float) -> Sequence[F]:
        """Take in one event; the one method that changes the core.

        :param event: what happened, in the past tense
        :param now: seconds of one steady clock; a core hears times of no other
        :returns: what is to be done, in order, in the imperative
        :raises ProtocolViolation: another peer caused what no honest peer would; the core is as it was before
        :raises IllegalTransition: a bug in Shoal
        """
        ...

    @property
    def deadline(self) -> float:
        """When :class:`TimePassed` is due, by the same clock; :data:`NEVER` if the core waits for no time."""
        ...
