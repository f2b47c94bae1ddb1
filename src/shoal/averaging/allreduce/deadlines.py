"""Deadlines for senders that follow what was seen in recent rounds. Pure.

Two kinds of times are learnt. How much later than the middle of its group a member's first part comes: that is a matter
of its user. And the longest time between two parts of a sender: that is a matter of links, in proportion to what has to
pass them. So it is kept per byte: of a part, times the members that send at once.

A deadline is ``median + TIMES_SPREAD x MAD`` (median absolute deviation) of the last :data:`ROUNDS` rounds. Half of
the observations may be arbitrarily wrong without moving it far (Hampel 1974, "The influence curve and its role in
robust estimation"). A member that was given up counts with twice the time that it was given (:mod:`.lateness`). So what
a deadline cuts off is not missing from what it follows, and where many are late, it grows in each round.
"""

from __future__ import annotations

import math
import statistics
from collections import deque
from collections.abc import Iterable
from dataclasses import replace
from itertools import chain

from shoal.averaging.allreduce.events import AdaptedDeadlines, RoundTimeouts
from shoal.averaging.allreduce.lateness import FLOOR, Waits

ROUNDS = 6
"""So many rounds are remembered: fewer are noise, and after a change half of them have to be new ones."""
ENOUGH = 4
"""Observations: a deadline does not follow fewer."""
TIMES_SPREAD = 6.0
"""For log-normal times with sigma 0.5 the deadline is at 3 times the median, and 1 in 70 is later."""
LEAST_SPREAD = 0.2
"""The MAD counts as this part of the median at least: few observations may be alike by chance."""


class Deadlines:
    """Learns from the rounds of one averager, and gives the timeouts of the next one.

    :param ceilings: no deadline is later than that for senders; before enough was seen, it is all there is
    """

    def __init__(self, ceilings: RoundTimeouts) -> None:
        self._ceilings = ceilings
        self._offsets: deque[list[float]] = deque(maxlen=ROUNDS)
        self._parts: deque[list[float]] = deque(maxlen=ROUNDS)
        """In seconds a byte."""

    def learn(self, waits: Waits, nbytes: int) -> None:
        """A round has ended.

        :param nbytes: of a part, times the members that send at once; see :func:`load`
        """
        self._offsets.append(waits.offsets)
        self._parts.append([seconds / max(1, nbytes) for seconds in waits.parts])

    def timeouts(self, nbytes: int) -> RoundTimeouts:
        """For a round whose parts are of this size, as in :meth:`learn`."""
        offset, part = _limit(chain(*self._offsets)), max(1, nbytes) * _limit(chain(*self._parts))
        return replace(self._ceilings, adapted=AdaptedDeadlines(self._within(offset), self._within(part)))

    def _within(self, seconds: float) -> float:
        """Not below the floor, and not above the ceiling, which a user may have given lower."""
        ceiling = self._ceilings.sender
        return min(max(FLOOR, seconds), math.inf if ceiling is None else ceiling)


def _limit(observed: Iterable[float]) -> float:
    """The latest time that is usual; infinite if too little was seen."""
    times = list(observed)
    if len(times) < ENOUGH:
        return math.inf
    middle = statistics.median(times)
    spread = statistics.median(abs(time - middle) for time in times)
    return middle + TIMES_SPREAD * max(spread, LEAST_SPREAD * abs(middle))


def load(largest_part: int, members: int) -> int:
    """What has to pass an owner's link for one more part of each member: the parts of all others."""
    return largest_part * max(1, members - 1)
