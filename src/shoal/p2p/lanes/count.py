"""How many lanes a path to a peer needs, from what was measured on it. Pure.

One connection fills a path that loses nothing. Where packets are lost at random, the usual congestion control of one
connection (Reno, Cubic) takes each loss for a full queue, and gets no more than about ``mss / (rtt * sqrt(loss))``:
several share the path's loss among them. BBR does not mind such a loss: one lane fills the path, and four carry a tenth
less. Where the queue is really full, the round-trip time shows it, and more connections would only push others off the
line: then there are fewer. A queue that overflows loses packets, which are counted when it is empty again. So for a
while after a full queue a loss brings no more lanes than have carried most.
"""

from __future__ import annotations

from dataclasses import dataclass

SHORT_RTT = 0.004
"""Seconds; a path with a smaller round-trip time gets one lane."""
FEW = 4
"""Lanes of a long path at the start: their windows grow side by side."""
QUEUEING = 1.35
"""The queue is full if the round-trip time is so many times its minimum, and :data:`QUEUEING_SECONDS` more."""
QUEUEING_SECONDS = 0.008
GAIN = 1.08
"""More lanes have to raise the rate at least by this factor, or they are taken away again."""
TRIED = "more lanes carried no more"
REGAIN = 1.25
"""Lanes that were taken away come back if they carried more by this factor. Those that are left have small windows,
which grow for many seconds where nothing is lost."""
BBR = frozenset({"bbr", "bbr2", "bbr3"})


@dataclass(frozen=True)
class Path:
    """What was measured of a path since the number of lanes was last chosen."""

    min_rtt: float
    """Seconds; the least of the last minutes."""
    rtt: float
    """Seconds; smoothed by the kernel, the median of the lanes."""
    highest_rtt: float
    """The highest of these since the choice before the last one."""
    sent: int
    """Segments."""
    retransmitted: int
    """Segments."""
    rate: float
    """Bytes a second that the peer's machine took: the highest rate of late of so many lanes."""
    is_full: bool
    """Whether there was always more to send."""
    congestion_control: str


@dataclass(frozen=True)
class Choice:
    """How many lanes, and why."""

    count: int
    reason: str
    is_tried: bool = False
    """Whether there were more, and they carried no more."""


def first_choice(rtt: float | None, limit: int) -> Choice:
    """For a path on which nothing was sent yet. ``rtt`` in seconds; None where the system does not tell how its
    connections fare.
    """
    if rtt is None:
        return Choice(1, "the system does not measure its connections")
    if rtt < SHORT_RTT:
        return Choice(1, "the path is short")
    return Choice(min(FEW, limit), f"the round trip takes {1e3 * rtt:.0f} ms")


def choose(
    count: int,
    path: Path,
    limit: int,
    before: tuple[int, float] | None = None,
    enough: int | None = None,
    best: tuple[int, float] | None = None,
) -> Choice:
    """How many lanes there should be next.

    :param count: how many carried the data of ``path``
    :param limit: the most that there may be
    :param before: the number before the last time that there came to be more, and the rate at that time
    :param enough: so many carried as much as more did, when that was last tried
    :param best: the number that has carried most of late, and how much
    """
    if path.min_rtt < SHORT_RTT:
        return Choice(1, "the path is short")
    loss = path.retransmitted / path.sent if path.sent else 0.0
    full = QUEUEING * path.min_rtt + QUEUEING_SECONDS
    if path.rtt > full:
        fewer = max(1, 3 * count // 4)
        return Choice(
            min(fewer, limit), f"the queue is full: {1e3 * path.rtt:.0f} ms of {1e3 * path.min_rtt:.0f} ms"
        )
    if path.congestion_control in BBR:
        return Choice(1, f"{path.congestion_control} fills the path with one lane")
    if count > limit:
        return Choice(limit, f"there may be no more than {limit}")
    if not path.is_full:
        return Choice(count, "less was sent than the path takes")
    if before is not None and count > before[0] and path.rate < GAIN * before[1]:
        return Choice(before[0], TRIED, is_tried=True)
    if best is not None and count < best[0] and path.rate < best[1] / REGAIN:
        return Choice(min(best[0], limit), f"{best[0]} lanes carried more, and the queue is empty again")
    if path.retransmitted == 0:
        return Choice(count, "nothing was lost")
    if enough is not None and count >= enough:
        return Choice(count, TRIED)
    carried_most = count if best is None else best[0]
    return _more(
        count,
        min(2 * count, limit, enough or limit),
        loss,
        limit,
        carried_most if path.highest_rtt > full else None,
    )


def _more(count: int, most: int, loss: float, limit: int, after_full_queue: int | None) -> Choice:
    """After losses, how many more.

    :param most: what there may be by all but the last condition
    :param after_full_queue: so many at most, since the queue was full a moment ago; None: it was not
    """
    if after_full_queue is not None and min(most, after_full_queue) <= count:
        return Choice(count, "the queue was full a moment ago: it lost packets")
    if most <= count:
        return Choice(
            count, f"{_percent(loss)} of the packets were lost, but there may be no more than {limit}"
        )
    more = most if after_full_queue is None else min(most, after_full_queue)
    return Choice(more, f"{_percent(loss)} of the packets were lost without a queue")


def _percent(part: float) -> str:
    return f"{100 * part:.2g} %"
