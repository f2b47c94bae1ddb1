"""How fast a lane may send at most, so that it does not overrun the uplink that it shares. Pure.

A congestion window that doubles with each round trip ends at twice what the link takes. The queue overflows, and the
window falls to a part of what fits. Each round of averaging begins like that, since a window is small again after a
pause. Once it is known what the uplink takes, the kernel is told to send no faster than a little more than that.
"""

from __future__ import annotations

from shoal.p2p.lanes.count import BBR, FEW

GAIN = 1.25
"""Times its share that a path may send. What it really sends is measured, and its next limit follows from that: so a
limit that is too low rises within seconds."""


def fastest(uplink: float, paths: int, rate: float, lanes: int, congestion_control: str) -> float | None:
    """Bytes a second that each lane of a path may send; None: as many as it likes.

    :param uplink: bytes a second that the uplink is known to take; 0: it is not known
    :param paths: to other peers that send now, this one included
    :param rate: bytes a second that this path carried in the last measured while
    :param lanes: that carry data. More than :data:`FEW` are there since packets get lost at random: then most lanes are
      slow, and the others have to send what those cannot
    :param congestion_control: BBR paces itself
    """
    if uplink <= 0 or lanes > FEW or congestion_control in BBR:
        return None
    share = max(uplink / max(1, paths), min(rate, uplink))
    return GAIN * share / max(1, lanes)
