"""Dialing a peer back where it may be, for :class:`~shoal.p2p.reach.helper.DialBackHelper`."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence

from shoal.errors import DeadlineExceeded, PeerUnreachable
from shoal.p2p.connections import Connections
from shoal.p2p.identity import PeerID
from shoal.p2p.multiaddr import Multiaddr
from shoal.p2p.reach.dialback import dial_back_time
from shoal.p2p.reach.vantage import Interface
from shoal.p2p.rpc import Lane

LOOPBACK_IPS = ("127.0.0.1", "::1")


class Prober:
    """Opens connections that carry nothing. ``interfaces`` are those of this machine."""

    def __init__(self, connections: Connections, *, interfaces: Callable[[], Sequence[Interface]]) -> None:
        self._connections = connections
        self._interfaces = interfaces

    def ips_of(self, peer: PeerID) -> list[str]:
        """The addresses that ``peer`` has, as far as this host sees."""
        ips: dict[str, None] = {}
        known = self._connections.to(peer)
        for connection in [] if known is None else known.all():
            if connection.remote_ip is not None:
                ips[connection.remote_ip] = None
                if connection.origin is None:  # it is on this machine
                    ips |= dict.fromkeys([*LOOPBACK_IPS, *(one.ip for one in self._interfaces())])
        return list(ips)

    async def probe(self, peer: PeerID, address: Multiaddr) -> str | None:
        """None if ``peer`` answers at ``address``, or why it does not."""
        known = self._connections.to(peer)
        control = None if known is None else known.control()
        patience = dial_back_time((0.0 if control is None else control.rtt) or 0.0)
        deadline = asyncio.get_running_loop().time() + patience
        try:
            outcome = await self._connections.dial_address(address, peer, Lane.PROBE, deadline)
        except DeadlineExceeded:
            return f"no answer in {patience:.1f} s"
        if isinstance(outcome, PeerUnreachable):
            (failure,) = outcome.dials
            return failure.reason
        outcome.close("the address can be dialed")
        return None
