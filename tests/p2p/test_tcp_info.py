"""What the kernel says of a real connection."""

from __future__ import annotations

import socket
import sys
from typing import Any

import pytest

from shoal.p2p import tcp_info

MAX_PACING_RATE = 47


class Transport:
    """Of a socket."""

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock

    def get_extra_info(self, name: str) -> Any:
        return self._sock if name == "socket" else None


def test_its_figures_are_where_they_are_looked_for():
    with (
        socket.create_server(("127.0.0.1", 0)) as server,
        socket.create_connection(server.getsockname()) as one,
        server.accept()[0] as other,
    ):
        one.sendall(bytes(10_000))
        assert other.recv(10_000, socket.MSG_WAITALL) == bytes(10_000)
        other.sendall(b"x")
        assert one.recv(1) == b"x"
        info = tcp_info.read(Transport(one))
    if sys.platform != "linux":
        assert info is None
        return
    assert info is not None
    assert 0 < info.min_rtt <= info.rtt < 1
    assert info.delivered >= 10_000
    assert info.segments_sent >= 1
    assert info.retransmitted == 0
    assert 10 * 536 <= info.window < 1 << 26
    assert info.threshold > 0
    assert 0.1 < info.timeout < 10
    assert info.timeouts == 0
    assert 0 <= info.silence < 10


@pytest.mark.skipif(sys.platform != "linux", reason="other systems do not pace")
def test_a_connection_is_told_to_send_without_bursts():
    with (
        socket.create_server(("127.0.0.1", 0)) as server,
        socket.create_connection(server.getsockname()) as one,
    ):
        before = one.getsockopt(socket.SOL_SOCKET, MAX_PACING_RATE, 8)
        tcp_info.enable_pacing(Transport(one))
        after = one.getsockopt(socket.SOL_SOCKET, MAX_PACING_RATE, 8)
    assert before == b"\xff" * 8  # without a limit the kernel does not pace
    assert 2**30 < int.from_bytes(after, sys.byteorder) < 2**32
