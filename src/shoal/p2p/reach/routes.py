"""How another peer is reached: its routes, from its addresses. Pure.

A route is of one kind, and each kind is taken in another way. Direct ones are dialed today. Addresses of the other
kinds are kept and passed on, since other peers may be able to use them.
"""

from __future__ import annotations

import enum
from collections.abc import Iterable
from dataclasses import dataclass

from shoal.p2p.multiaddr import Multiaddr


class RouteKind(enum.Enum):
    """In which way a peer is reached. The best kind comes first."""

    DIRECT = "direct"
    """Its address is dialed over TCP."""
    PUNCHED = "punched"
    """Both sides dial at the same moment, so that their address translators let the packets pass."""
    RELAYED = "relayed"
    """A third peer, to which both are connected, passes the bytes on."""
    FOREIGN = "foreign"
    """By a transport that only other programs speak."""


@dataclass(frozen=True)
class Route:
    """One way to a peer: its kind, and the address that leads there."""

    kind: RouteKind
    address: Multiaddr

    @classmethod
    def of(cls, address: Multiaddr) -> Route:
        """The route that an address describes. No address says of itself that it has to be punched."""
        if not address.unspoken:
            return cls(RouteKind.DIRECT, address)
        return cls(RouteKind.RELAYED if address.has("p2p-circuit") else RouteKind.FOREIGN, address)

    @property
    def obstacle(self) -> str:
        """Why this host cannot take the route; empty if it can."""
        return "" if self.kind is RouteKind.DIRECT else self.address.unspoken


def routes(addresses: Iterable[Multiaddr]) -> list[Route]:
    """The routes of a peer; those that can be taken first, otherwise in the order of its addresses."""
    return sorted((Route.of(address) for address in addresses), key=lambda route: bool(route.obstacle))
