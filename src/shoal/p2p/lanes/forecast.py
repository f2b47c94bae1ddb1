"""How a lane is likely to fare, from what the kernel says of its connection. Pure.

What a connection carried a moment ago says little of what it will carry next: its window doubles, or it has just lost
a packet and waits for a time-out. The kernel knows both. With its figures a lane that is slow, one that stalls for a
while and one whose packets all vanish can be told apart.
"""

from __future__ import annotations

import math
from typing import NamedTuple

SEGMENT = 1448
"""Bytes that a connection begins with again after a time-out."""
SILENT = 2.0
"""A connection stalls if it hears nothing for so many round trips while something is under way."""
DEAD_TIMEOUTS = 3
"""A connection may be dead after so many time-outs in a row: the packets that it sent again were lost, too,"""
DEAD_SECONDS = 2.0
"""if it has heard nothing for so long,"""
MOVING_SECONDS = 1.0
"""and others to the same peer have heard something within this time."""


class Flow(NamedTuple):
    """A connection, as its kernel sees it."""

    rtt: float
    """Seconds, smoothed."""
    window: int
    """Bytes that it may have on the way."""
    threshold: int
    """Bytes up to which its window doubles with each round trip."""
    timeout: float
    """Seconds after which it sends again if it hears nothing; longer after each time-out."""
    timeouts: int
    """How many there were in a row."""


def is_stalled(flow: Flow, silence: float) -> bool:
    """Whether a connection waits for a time-out, for all that is known."""
    return silence > SILENT * flow.rtt


def seconds_to_land(nbytes: int, flow: Flow, silence: float) -> float:
    """How long it is likely to take until the peer's machine has so many more bytes.

    :param silence: seconds for which nothing was heard though something is under way
    """
    window, wait = max(flow.window, SEGMENT), 0.0
    if is_stalled(flow, silence):
        window, wait = SEGMENT, max(0.0, flow.timeout - silence) + flow.rtt
    round_trips = 0.0
    if window < flow.threshold:
        doublings = math.log2(1 + nbytes / window)
        most = math.log2(flow.threshold / window)
        if doublings <= most:
            return wait + flow.rtt * max(0.5, doublings)
        round_trips, nbytes = most, nbytes - (flow.threshold - window)
        window = flow.threshold
    return wait + flow.rtt * max(0.5, round_trips + nbytes / window)


def is_dead(flow: Flow, silence: float, others: float) -> bool:
    """Whether a lane is to be replaced: its packets vanish, and those of other lanes of the pair do not.

    :param silence: as above
    :param others: seconds since another lane last heard something
    """
    return (
        flow.timeouts >= DEAD_TIMEOUTS
        and silence >= max(DEAD_SECONDS, 4 * flow.rtt)
        and others < MOVING_SECONDS
    )
