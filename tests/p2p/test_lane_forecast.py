"""What is expected of a lane: a table of what its kernel says, and what follows."""

from __future__ import annotations

import pytest

from shoal.p2p.lanes.forecast import SEGMENT, Flow, is_dead, seconds_to_land

WIDE = 1 << 30


def flow(
    window: int, *, threshold: int = 0, timeout: float = 0.3, timeouts: int = 0, rtt: float = 0.1
) -> Flow:
    return Flow(rtt, window * SEGMENT, threshold * SEGMENT, timeout, timeouts)


@pytest.mark.parametrize(
    ("segments", "measured", "silence", "expected"),
    [
        (0, flow(10), 0.0, 0.05),  # what was confirmed is known half a round trip later
        (10, flow(10), 0.0, 0.1),
        (100, flow(10), 0.0, 1.0),
        (100, flow(100), 0.0, 0.1),
        (70, flow(10, threshold=WIDE), 0.0, 0.3),  # 10, 20 and 40: it doubles
        (70, flow(10, threshold=20), 0.0, 0.1 + 0.3),  # 10, then 20 at a time
        (10, flow(10, threshold=5), 0.0, 0.1),
        (
            1,
            flow(40, timeout=0.35),
            0.25,
            0.1 + 0.1 + 0.1,
        ),  # it waits for its time-out, and begins with one segment
        (7, flow(40, threshold=20, timeout=0.35), 0.25, 0.1 + 0.1 + 0.3),
        (1, flow(1, timeout=1.2, timeouts=2), 0.4, 0.8 + 0.1 + 0.1),
        (10, flow(10), 0.19, 0.1),  # not silent yet
    ],
)
def test_how_long_it_takes(segments: int, measured: Flow, silence: float, expected: float):
    assert seconds_to_land(segments * SEGMENT, measured, silence) == pytest.approx(expected, abs=0.02)


@pytest.mark.parametrize(
    ("measured", "silence", "others", "expected"),
    [
        (flow(1, timeouts=3), 2.5, 0.1, True),
        (flow(1, timeouts=6), 20.0, 0.9, True),
        (flow(1, timeouts=2), 2.5, 0.1, False),  # unlucky: it may still get through
        (flow(1, timeouts=3), 1.5, 0.1, False),
        (flow(1, timeouts=3), 2.5, 2.0, False),  # others hear nothing: it is the path, or the peer
        (flow(1, timeouts=3, rtt=0.8), 2.5, 0.1, False),  # a very long path
        (flow(40), 30.0, 0.1, False),  # nothing was sent in vain: its peer is slow to read
    ],
)
def test_which_lane_is_dead(measured: Flow, silence: float, others: float, expected: bool):
    assert is_dead(measured, silence, others) is expected
