"""How peers reach each other: the seam between everything above and the sockets below.

:class:`Network` is what hosts need of a network, in terms of asyncio's ``BufferedProtocol`` and
``Transport``. :class:`TcpNetwork` is the real one; ``shoal.testing`` ships one in memory.
"""

from __future__ import annotations

import asyncio
import logging
import socket
from collections.abc import Callable
from typing import Protocol, runtime_checkable

from shoal.errors import InvalidValueError
from shoal.p2p.multiaddr import Multiaddr
from shoal.p2p.reach.interfaces import default_route_ips, list_interfaces
from shoal.p2p.reach.vantage import Interface, likely_first

logger = logging.getLogger(__name__)

ProtocolFactory = Callable[[], asyncio.BufferedProtocol]

# Swarms start at once: a bootstrap peer gets hundreds of connections within a moment.
_BACKLOG = 1024

_FAMILIES = {
    "ip4": socket.AF_INET,
    "ip6": socket.AF_INET6,
    "dns": socket.AF_UNSPEC,
    "dns4": socket.AF_INET,
    "dns6": socket.AF_INET6,
}


@runtime_checkable
class Listener(Protocol):
    """A place where connections are accepted."""

    @property
    def address(self) -> Multiaddr:
        """Where it listens, with the real port, without ``/p2p``."""

    def close(self) -> None:
        """Accept no more; connections that stand are not touched. Idempotent."""

    async def wait_closed(self) -> None:
        """Return once nothing is accepted any more; does not wait for connections that stand."""


@runtime_checkable
class Network(Protocol):
    """Listens and connects. The addresses' ``/p2p`` part is no business of the network."""

    async def listen(self, factory: ProtocolFactory, address: Multiaddr) -> Listener:
        """Accept connections at ``address`` (port 0: any free one), each with a protocol of its own.

        :class:`OSError` if it cannot be had.
        """

    async def connect(self, factory: ProtocolFactory, address: Multiaddr) -> asyncio.Transport:
        """Connect to ``address``; :class:`OSError` if nobody answers. Waits for ever unless cancelled."""

    def interfaces(self) -> list[Interface]:
        """The interfaces of this machine, the likeliest first; none if the system does not tell."""


class TcpListener:
    """A :class:`Listener` on one TCP socket."""

    def __init__(self, server: asyncio.AbstractServer, address: Multiaddr) -> None:
        self._server = server
        self._address = address

    @property
    def address(self) -> Multiaddr:
        """Where it listens, with the real port."""
        return self._address

    def close(self) -> None:
        """Close the listening socket."""
        self._server.close()

    async def wait_closed(self) -> None:
        """Return at once: :meth:`close` has closed the socket already.

        ``Server.wait_closed`` is not used: from Python 3.12 on it waits for the connections too.
        """


class TcpNetwork:
    """The :class:`Network` of TCP sockets, for any asyncio event loop (uvloop included).

    Names are resolved anew at each dial, ``dns4`` and ``dns6`` to their family only. When a name has
    several addresses, dialing tries them in order, and listening takes the first. The loops switch Nagle's
    algorithm off (TCP_NODELAY) and let a listener take a port whose last connections are still being forgotten
    (SO_REUSEADDR); two listeners on one port are an error.
    """

    async def listen(self, factory: ProtocolFactory, address: Multiaddr) -> TcpListener:
        """See :meth:`Network.listen`. ``/ip6/::`` takes IPv6 only: listen on ``/ip4/0.0.0.0`` too."""
        loop = asyncio.get_running_loop()
        family = _FAMILIES[address.protocol]
        # Resolved here, so that a name with several addresses gives one socket and so one port.
        found = await loop.getaddrinfo(
            address.host, address.port, family=family, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )
        host = str(found[0][4][0])
        server = await loop.create_server(
            factory, host, address.port, family=family, backlog=_BACKLOG, reuse_address=True
        )
        port = server.sockets[0].getsockname()[1]
        return TcpListener(server, address.without_peer_id().with_port(port))

    async def connect(self, factory: ProtocolFactory, address: Multiaddr) -> asyncio.Transport:
        """See :meth:`Network.connect`. :class:`InvalidValueError` for port 0, which nobody can listen on."""
        if address.port == 0:
            raise InvalidValueError(f"address: {address} has port 0, which cannot be dialed")
        loop = asyncio.get_running_loop()
        transport, _ = await loop.create_connection(
            factory, address.host, address.port, family=_FAMILIES[address.protocol]
        )
        return transport

    def interfaces(self) -> list[Interface]:
        """See :meth:`Network.interfaces`. Where the system does not list them, those of the default routes."""
        preferred = default_route_ips()
        try:
            return likely_first(list_interfaces(), preferred)
        except OSError as error:
            logger.debug("the system does not list its interfaces: %s", error)
            return [Interface("default", ip, 128 if ":" in ip else 32) for ip in preferred]
