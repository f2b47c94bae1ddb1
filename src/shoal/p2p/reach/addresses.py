"""Where peers may be dialed: a bounded book. Pure.

What a peer says of itself, and what has worked, is kept apart from what others say of it: so that nobody can make this
host forget, or try last, where a peer really is.
"""

from __future__ import annotations

from collections.abc import Iterable

from shoal.p2p.identity import PeerID
from shoal.p2p.multiaddr import Multiaddr


class AddressBook:
    """Addresses of peers, the newest first; forgets the peers that were not heard of for longest.

    Both limits hold for each of the two kinds of knowledge.
    """

    def __init__(self, *, max_peers: int, max_addresses: int) -> None:
        self._known = _Shelf(max_peers, max_addresses)
        self._heard = _Shelf(max_peers, max_addresses)

    def add(self, peer: PeerID, addresses: Iterable[Multiaddr]) -> None:
        """Remember what the peer itself, or the user, has said.

        Addresses that cannot be dialed by anybody (port 0, all interfaces) are left out. Those of transports that
        Shoal does not have are kept: others may be told them.
        """
        self._known.add(peer, addresses)

    def add_hearsay(self, peer: PeerID, addresses: Iterable[Multiaddr]) -> None:
        """As :meth:`add`, for what others have said of the peer: tried after all else."""
        self._heard.add(peer, addresses)

    def prefer(self, peer: PeerID, address: Multiaddr) -> None:
        """``address`` has just worked: try it first the next time."""
        self._known.add(peer, [address])

    def forget(self, peer: PeerID) -> None:
        """``peer`` is at none of these addresses any more."""
        self._known.forget(peer)
        self._heard.forget(peer)

    def get(self, peer: PeerID) -> list[Multiaddr]:
        """What is known of ``peer``, best first."""
        return list(dict.fromkeys(self._known.get(peer) + self._heard.get(peer)))

    def __len__(self) -> int:
        return len(self._known.peers | self._heard.peers)


class _Shelf:
    """One kind of knowledge."""

    def __init__(self, max_peers: int, max_addresses: int) -> None:
        self._max_peers = max_peers
        self._max_addresses = max_addresses
        self._book: dict[PeerID, list[Multiaddr]] = {}

    @property
    def peers(self) -> set[PeerID]:
        return set(self._book)

    def add(self, peer: PeerID, addresses: Iterable[Multiaddr]) -> None:
        fresh = [
            address.without_peer_id()
            for address in addresses
            if (address.port or address.unspoken) and not address.is_unspecified
        ]
        if not fresh:
            return
        known = self._book.pop(peer, [])
        self._book[peer] = list(dict.fromkeys(fresh + known))[: self._max_addresses]
        while len(self._book) > self._max_peers:
            del self._book[next(iter(self._book))]

    def forget(self, peer: PeerID) -> None:
        self._book.pop(peer, None)

    def get(self, peer: PeerID) -> list[Multiaddr]:
        return self._book.get(peer, [])
