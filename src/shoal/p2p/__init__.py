"""Peers that call each other: identities, addresses, encrypted connections, calls and streams."""

from __future__ import annotations

from typing import TYPE_CHECKING

from shoal.utils.lazy import lazy_names

if TYPE_CHECKING:
    from shoal.p2p.host import Host
    from shoal.p2p.identity import Identity, PeerID
    from shoal.p2p.multiaddr import Multiaddr

__all__ = ["PeerID", "Identity", "Multiaddr", "Host"]

__getattr__, __dir__ = lazy_names(
    __name__,
    {
        "PeerID": "shoal.p2p.identity",
        "Identity": "shoal.p2p.identity",
        "Multiaddr": "shoal.p2p.multiaddr",
        "Host": "shoal.p2p.host",
    },
)
