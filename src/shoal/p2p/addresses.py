"""Where peers may be dialed: a bounded book. Pure."""

from __future__ import annotations

from collections.abc import Iterable

from shoal.p2p.identity import PeerID
from shoal.p2p.multiaddr import Multiaddr


class AddressBook:
    """Addresses of peers, the newest first; forgets the peers that were not heard of for longest."""

    def __init__(self, *, max_peers: int, max_addresses: int) -> None:
        self._max_peers = max_peers
        self._max_addresses = max_addresses
        self._book: dict[PeerID, list[Multiaddr]] = {}

    def add(self, peer: PeerID, addresses: Iterable[Multiaddr]) -> None:
        """Remember addresses; those that cannot be dialed by anybody (port 0, all interfaces) are left out."""
        fresh = [
            address.without_peer_id() for address in addresses if address.port and not address.is_unspecified
        ]
        if not fresh:
            return
        known = self._book.pop(peer, [])
        self._book[peer] = list(dict.fromkeys(fresh + known))[: self._max_addresses]
        while len(self._book) > self._max_peers:
            del self._book[next(iter(self._book))]

    def get(self, peer: PeerID) -> list[Multiaddr]:
        """What is known of ``peer``, best first."""
        return list(self._book.get(peer, ()))

    def prefer(self, peer: PeerID, address: Multiaddr) -> None:
        """``address`` has just worked: try it first the next time."""
        self.add(peer, [address])

    def __len__(self) -> int:
        return len(self._book)
