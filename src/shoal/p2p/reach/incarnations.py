"""Which process was last seen under each PeerID: a bounded book. Pure.

Each run of a host draws a number, its *incarnation*, and says it in HELLO. A peer that comes back with its identity
file is another process: what its last one did, or failed to do, says nothing of this one.
"""

from __future__ import annotations

from shoal.p2p.identity import PeerID
from shoal.p2p.protocol.claims import UNKNOWN


class Incarnations:
    """Forgets the peers that were not met for longest."""

    def __init__(self, max_peers: int) -> None:
        self._max_peers = max_peers
        self._numbers: dict[PeerID, int] = {}

    def note(self, peer: PeerID, number: int) -> None:
        """The process ``number`` has proved that it is ``peer``; one that does not tell its number changes nothing."""
        if number == UNKNOWN:
            return
        self._numbers.pop(peer, None)
        self._numbers[peer] = number
        while len(self._numbers) > self._max_peers:
            del self._numbers[next(iter(self._numbers))]

    def of(self, peer: PeerID) -> int | None:
        """The number of the process that was last seen as ``peer``; None if none was, or if that was long ago."""
        return self._numbers.get(peer)
