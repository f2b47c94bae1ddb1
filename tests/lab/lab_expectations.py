"""What the tests of layouts have in common: what averages, and what peers say of themselves."""

from __future__ import annotations

import pytest
from lab_peers import Event, Peer, Swarm


def average_in_two_rounds(swarm: Swarm) -> None:
    """Wait until all have joined, and run two rounds: in the second at the latest all of them are one group."""
    size = len(swarm.peers)
    for peer in swarm.peers:
        if not peer.peer_id:
            peer.wait_until_joined()
    rounds = [swarm.average() for _ in range(2)]
    assert [one["members"] for one in rounds[1]] == [size] * size
    assert [one["values"] for one in rounds[1]] == [[pytest.approx((size - 1) / 2)]] * size


def expect_full(peer: Peer, *beginnings: str) -> Event:
    """Others reach it, at these addresses first, and it complains of nothing; its description."""
    said = peer.describe()
    assert not said["client"]
    first = said["addresses"][: len(beginnings)]
    assert all(any(address.startswith(one) for address in first) for one in beginnings), said["addresses"]
    assert peer.logged("WARNING") == []
    return said


def expect_client(peer: Peer) -> Event:
    """Nobody reaches it: it announces nothing, and has said so once, and what to do; its description."""
    said = peer.describe()
    assert said["client"]
    assert said["addresses"] == []
    warnings = peer.logged("WARNING")
    assert len(warnings) == 1, warnings
    for words in ("client", "announce_maddrs", "client_mode=True"):
        assert words in warnings[0]
    return said
