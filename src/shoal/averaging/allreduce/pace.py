"""Which sender a round had to wait for, from the times that an owner has waited for each. Pure."""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from dataclasses import dataclass

NOTICEABLE = 2.0
"""Seconds: shorter waits are worth no line."""
PART_OF_ROUND = 0.25
"""So much of the all-reduce has to be waiting for one sender, or it is not what made the round long."""
TIMES_THE_OTHERS = 4.0


@dataclass(frozen=True)
class Wait:
    """What an owner got of one sender.

    :param seconds: that it spent waiting for the sender's parts, when it could have taken them
    """

    nbytes: int = 0
    seconds: float = 0.0

    def plus(self, nbytes: int, seconds: float) -> Wait:
        return Wait(self.nbytes + nbytes, self.seconds + seconds)

    @property
    def rate(self) -> float:
        """Bytes a second."""
        return self.nbytes / self.seconds


@dataclass(frozen=True)
class HeldUp:
    """A round that one sender has made long."""

    sender: int
    wait: Wait


def find_slowest(waits: Mapping[int, Wait], duration: float) -> HeldUp | None:
    """The sender that held a round up; None if none did, or if there is no other one to compare it with.

    Fast senders are held back by flow control until the slowest has delivered, so that their parts are there when the
    owner wants them: it waits for the slowest one alone.

    :param duration: of the all-reduce, in seconds
    """
    if len(waits) < 2:
        return None
    slowest = max(waits, key=lambda sender: (waits[sender].seconds, sender))
    wait = waits[slowest]
    others = statistics.median(other.seconds for sender, other in waits.items() if sender != slowest)
    is_long = wait.seconds >= max(NOTICEABLE, PART_OF_ROUND * duration)
    return HeldUp(slowest, wait) if is_long and wait.seconds >= TIMES_THE_OTHERS * others else None
