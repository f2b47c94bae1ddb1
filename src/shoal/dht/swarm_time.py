"""What time it is, by the clocks of several peers: how far a node moves its own. Pure.

* A newcomer goes by the others, and its own clock does not count: a DHT that runs is not moved by those who join.
* Later each node counts its own clock among the others', and takes the median. So a minority cannot move anybody,
  however wrong its clocks are, and two peers meet in the middle.
* Where nobody has joined anything yet (two first peers that were given each other's addresses), all count alike.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median

from shoal.p2p.identity import PeerID

TOLERANCE = 0.05
"""Seconds by which clocks may differ without being moved: far below any time that peers agree on."""


@dataclass(frozen=True)
class ClockSample:
    """One peer's clock, measured by a call.

    :param ahead: seconds by which it is ahead of the own clock; negative: behind
    :param error: by how much that may be wrong: half of the call's round trip
    :param is_settled: the peer goes by the time of a DHT, and not only by its own clock
    """

    peer: PeerID
    ahead: float
    error: float
    is_settled: bool


@dataclass(frozen=True)
class ClockChange:
    """By how many seconds the own clock is to be moved: ``seconds``. ``others`` clocks were counted."""

    seconds: float
    others: int
    counted_own: bool


def choose_change(samples: Sequence[ClockSample], *, is_settled: bool) -> ClockChange:
    """How to move the own clock, by those of others. 0 seconds where the difference is not worth it.

    :param is_settled: the own clock goes by a DHT's time, or has begun one
    """
    settled = [sample for sample in samples if sample.is_settled]
    voters = settled if settled or is_settled else list(samples)
    if not voters:
        return ClockChange(0.0, 0, is_settled)
    counts_own = is_settled or not settled
    change = median([sample.ahead for sample in voters] + ([0.0] if counts_own else []))
    uncertain = TOLERANCE + median(sample.error for sample in voters)
    return ClockChange(change if abs(change) > uncertain else 0.0, len(voters), counts_own)
