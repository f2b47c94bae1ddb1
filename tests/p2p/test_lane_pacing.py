"""How fast a lane may send, from what is known of the uplink."""

from __future__ import annotations

import socket
import sys

import pytest

from shoal.p2p import tcp_info
from shoal.p2p.lanes.count import FEW
from shoal.p2p.lanes.pacing import GAIN, fastest


@pytest.mark.parametrize(
    ("uplink", "paths", "rate", "lanes", "control", "expected"),
    [
        (0.0, 1, 5e6, 1, "cubic", None),  # nothing is known
        (10e6, 1, 0.0, 1, "cubic", GAIN * 10e6),  # the first round over this path
        (10e6, 1, 8e6, 4, "cubic", GAIN * 10e6 / 4),  # lanes share the path
        (10e6, 5, 1e6, 1, "cubic", GAIN * 2e6),  # and paths the uplink
        (10e6, 5, 7e6, 1, "reno", GAIN * 7e6),  # but what is carried, while others carry little, goes on
        (10e6, 5, 30e6, 1, "cubic", GAIN * 10e6),  # a burst into the queue is no rate of the uplink
        (10e6, 0, 0.0, 0, "cubic", GAIN * 10e6),
        (10e6, 1, 8e6, FEW + 1, "cubic", None),  # random losses: each lane carries what it can
        (10e6, 1, 8e6, 1, "bbr", None),
    ],
)
def test_the_uplink_is_shared(uplink, paths, rate, lanes, control, expected):
    assert fastest(uplink, paths, rate, lanes, control) == (expected and pytest.approx(expected))


def test_what_several_paths_may_send_together_grows_with_what_they_carry():
    """A limit that is too low leads to a higher one, as long as the link takes more."""
    known = 1e6
    for _ in range(12):
        carried = 4 * fastest(known, 4, known / 4, 1, "cubic")
        known = max(known, carried)
    assert known > 10e6


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux paces connections")
def test_the_kernel_is_told_of_the_pace_and_of_its_end():
    class Transport:
        def get_extra_info(self, name):
            return made

    with socket.socket() as made:
        for rate, expected in ((1.5e6, 1_500_000), (0.2, 1), (None, 2**64 - 1)):
            tcp_info.limit_pace(Transport(), rate)
            found = made.getsockopt(socket.SOL_SOCKET, 47, 8)
            assert int.from_bytes(found, sys.byteorder) == expected
    tcp_info.limit_pace(None, 1.0)
