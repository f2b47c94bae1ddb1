"""A network in memory: hosts, listeners and byte streams with latency, bandwidth and faults, all from one seed.

It implements :class:`shoal.p2p.network.Network` in terms of asyncio transports, so that everything above sockets runs
on it unchanged. Time is the loop's; run it on :class:`shoal.testing.clock.VirtualClockLoop` to make it virtual.
Deterministic: no set is iterated over, nothing depends on object ids, and all choices come from the ``rng`` given.

Hosts may live at a site behind a NAT (:meth:`~SimulatedNetwork.site`): others see its router's address, and get in at
forwarded ports only.

Faults: :meth:`~SimulatedNetwork.drop_connections` (both sides see them end), :meth:`~SimulatedNetwork.partition` and
:meth:`~SimulatedNetwork.silence` (bytes vanish, connections stay, dialing times out),
:meth:`~SimulatedNetwork.move` (a host has another address), and
:meth:`~SimulatedNetwork.kill` (a host is gone: its connections end, as the operating system of a killed process
ends them; with ``silently`` nobody is told, as when a machine loses power).
"""

from __future__ import annotations

import asyncio
import random
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

from shoal.errors import InvalidValueError
from shoal.p2p.multiaddr import Multiaddr
from shoal.p2p.reach.vantage import Interface
from shoal.testing.transport import Path, Pipe, SimulatedTransport

ProtocolFactory = Callable[[], asyncio.BufferedProtocol]

CONNECT_TIMEOUT = 120.0
"""When an operating system gives up connecting to a host that does not answer."""

__all__ = ["HostNetwork", "SimulatedNetwork", "SimulatedTransport"]


class SimulatedNetwork:
    """All hosts of one simulation.

    ``latency``: one-way delay in seconds; each pair of hosts draws its own from this range. ``bandwidth``: bytes per
    second of each direction of each pair of hosts; None: no limit.
    """

    def __init__(
        self,
        rng: random.Random,
        *,
        latency: tuple[float, float] = (0.005, 0.05),
        bandwidth: float | None = None,
    ) -> None:
        if not 0 <= latency[0] <= latency[1]:
            raise InvalidValueError(f"latency must be a range of seconds of at least 0, got {latency!r}")
        self._rng = rng
        self._latency = latency
        self._bandwidth = bandwidth
        self._hosts: dict[str, HostNetwork] = {}
        self._by_ip: dict[str, HostNetwork] = {}
        self._sites: dict[str, _Site] = {}
        self._paths: dict[tuple[str, str], Path] = {}
        self._uplinks: defaultdict[str, Pipe] = defaultdict(Pipe)
        self._downlinks: defaultdict[str, Pipe] = defaultdict(Pipe)
        self.connections: dict[SimulatedTransport, None] = {}
        self._partition: dict[str, int] = {}

    def host(self, name: str) -> HostNetwork:
        """The network as the host ``name`` sees it; made when first asked for."""
        if name not in self._hosts:
            number = len(self._hosts) + 1
            host = HostNetwork(self, name, f"10.{number >> 16 & 255}.{number >> 8 & 255}.{number & 255}")
            self._hosts[name] = host
            self._by_ip[host.ip] = host
        return self._hosts[name]

    def site(
        self,
        *names: str,
        forwards: Mapping[int, tuple[str, int]] | None = None,
        refuses: bool = False,
    ) -> str:
        """A site behind a NAT, with these hosts, that must not be there yet; returns its router's outer address.

        ``forwards``: from ports of the router to ports of its hosts. At others nobody answers, or dialing is refused.
        """
        outer = f"203.0.113.{len(self._sites) + 1}"
        site = self._sites[outer] = _Site(outer, dict(forwards or {}), refuses)
        for number, name in enumerate(names, 1):
            if name in self._hosts:
                raise InvalidValueError(f"names: the host {name!r} is there already")
            ip = f"192.168.{len(self._sites)}.{number}"
            host = self._hosts[name] = self._by_ip[ip] = HostNetwork(self, name, ip)
            host.site, host.interface_list = site, [Interface("eth0", ip, 24)]
        return outer

    # ---- conditions ----

    def set_bandwidth(self, a: str, b: str, bytes_per_second: float | None) -> None:
        """Bandwidth between two hosts, of each direction."""
        self.path(a, b).bandwidth = self.path(b, a).bandwidth = bytes_per_second

    def set_link(self, name: str, bytes_per_second: float | None) -> None:
        """Bandwidth of a host's own link, of each direction: all its connections to other hosts share it."""
        self._uplinks[name].bandwidth = self._downlinks[name].bandwidth = bytes_per_second

    # ---- faults ----

    def drop_connections(self, a: str, b: str) -> int:
        """End all connections between two hosts, for both sides; returns how many there were."""
        dropped = [one for one in self.connections if (one.local.name, one.remote.name) == (a, b)]
        for transport in dropped:
            transport.lose(ConnectionResetError("the simulated network dropped the connection"))
            if transport.other is not None:
                transport.other.lose(ConnectionResetError("the simulated network dropped the connection"))
        return len(dropped)

    def partition(self, *groups: Iterable[str]) -> None:
        """Let hosts reach only those of their own group, until :meth:`heal`; others form one more group."""
        self._partition = {name: number for number, group in enumerate(groups, 1) for name in sorted(group)}

    def heal(self) -> None:
        """End the partition and all silence. Bytes that vanished stay lost: their connections end."""
        self._partition = {}
        for path in self._paths.values():
            path.is_silent = False
        for transport in list(self.connections):
            if transport.lost_bytes:
                transport.lose(ConnectionResetError("retransmission came too late"))
                if transport.other is not None:
                    transport.other.lose(ConnectionResetError("retransmission came too late"))

    def silence(self, a: str, b: str, *, one_way: bool = False) -> None:
        """What two hosts send each other vanishes, until :meth:`heal`; their connections stay.

        ``one_way``: only what ``a`` sends vanishes.
        """
        self.path(a, b).is_silent = True
        if not one_way:
            self.path(b, a).is_silent = True

    def kill(self, name: str, *, silently: bool = False) -> None:
        """The host is gone: it hears and says nothing more, and its listeners are closed.

        The other sides see their connections reset, or nothing at all with ``silently``. :meth:`revive` lets a new
        process start there.
        """
        host = self.host(name)
        host.is_up = False
        host.is_silent = silently
        host.listeners.clear()
        for transport in [one for one in self.connections if one.local is host]:
            other = transport.other
            transport.vanish()
            if other is not None and not silently:
                other.lose_later(ConnectionResetError("the other host was killed"))

    def revive(self, name: str) -> None:
        """A killed host can be used again."""
        host = self.host(name)
        host.is_up, host.is_silent = True, False

    def move(self, name: str, ip: str) -> None:
        """A host has another address from now on, as a laptop in another network. Its connections carry nothing more;
        what it listens on, on all interfaces, answers at the new address.
        """
        host = self.host(name)
        del self._by_ip[host.ip]
        host.ip, host.interface_list = ip, [Interface("eth0", ip, 32)]
        self._by_ip[ip] = host
        for transport in self.connections:
            if name in (transport.local.name, transport.remote.name):
                transport.is_stranded = True

    # ---- what hosts and transports ask ----

    def path(self, a: str, b: str) -> Path:
        """The direction from host ``a`` to host ``b``; its latency is drawn when it is first asked for."""
        path = self._paths.get((a, b))
        if path is None:
            # Both directions draw together, so that asking for one decides the other too.
            latency = self._rng.uniform(*self._latency) if a != b else 0.0001
            path = self._paths[a, b] = self._make_path(a, b, latency)
            self._paths.setdefault((b, a), self._make_path(b, a, latency))
        return path

    def _make_path(self, a: str, b: str, latency: float) -> Path:
        if a == b:
            return Path(latency, None, Pipe(), Pipe())
        return Path(latency, self._bandwidth, self._uplinks[a], self._downlinks[b])

    def _find(self, dialer: HostNetwork, address: Multiaddr) -> _Way | None:
        """Where a connection from ``dialer`` to ``address`` ends; None if nothing answers there."""
        if address.host in ("127.0.0.1", dialer.ip):
            return _Way(dialer, address.port, dialer.ip, dialer.ip)
        outer = dialer.ip if dialer.site is None else dialer.site.outer_ip
        site = self._sites.get(address.host)
        if site is not None:
            forwarded = site.forwards.get(address.port)
            if forwarded is not None:
                return _Way(self._hosts[forwarded[0]], forwarded[1], address.host, outer)
            if site.refuses:
                raise ConnectionRefusedError(111, f"nobody listens at {address}")
            return None
        target = self._by_ip.get(address.host)
        if target is None or (target.site is not None and target.site is not dialer.site):
            return None
        return _Way(target, address.port, target.ip, outer if target.site is None else dialer.ip)

    def reaches(self, a: HostNetwork, b: HostNetwork) -> bool:
        """Whether what ``a`` sends arrives at ``b``."""
        apart = self._partition.get(a.name, 0) != self._partition.get(b.name, 0)
        return not (apart or self.path(a.name, b.name).is_silent or a.is_silent or b.is_silent)


@dataclass
class _Site:
    """Hosts behind one router that translates addresses."""

    outer_ip: str
    forwards: dict[int, tuple[str, int]]
    refuses: bool


@dataclass(frozen=True)
class _Way:
    """Where a dialed connection ends, and which addresses its two ends see."""

    target: HostNetwork
    port: int
    seen_by_dialer: str
    seen_by_target: str


class HostNetwork:
    """One host's :class:`~shoal.p2p.network.Network`; made by :meth:`SimulatedNetwork.host`."""

    def __init__(self, network: SimulatedNetwork, name: str, ip: str) -> None:
        self.network = network
        self.name = name
        self.ip = ip
        self.is_up = True
        self.is_silent = False
        self.listeners: dict[int, SimulatedListener] = {}
        self.site: _Site | None = None
        self.interface_list = [Interface("eth0", ip, 32)]
        """What :meth:`interfaces` tells; may be changed."""
        self._next_port = 20000

    def address(self, port: int = 0) -> Multiaddr:
        """This host's address; port 0 to listen at any."""
        return Multiaddr("ip4", self.ip, port)

    async def listen(self, factory: ProtocolFactory, address: Multiaddr) -> SimulatedListener:
        """See :meth:`shoal.p2p.network.Network.listen`."""
        self._check_up()
        if address.host not in (self.ip, "0.0.0.0", "::", "127.0.0.1"):  # noqa: S104
            raise OSError(99, f"{address.host} is not an address of {self.name}")
        port = address.port or self._free_port()
        if port in self.listeners:
            raise OSError(98, f"port {port} of {self.name} is in use")
        listener = SimulatedListener(self, factory, address.with_port(port).without_peer_id())
        self.listeners[port] = listener
        return listener

    async def connect(self, factory: ProtocolFactory, address: Multiaddr) -> asyncio.Transport:
        """See :meth:`shoal.p2p.network.Network.connect`. Takes one round trip."""
        self._check_up()
        loop = asyncio.get_running_loop()
        network = self.network
        way = network._find(self, address)
        if way is None or not network.reaches(self, way.target):
            await asyncio.sleep(CONNECT_TIMEOUT)
            raise TimeoutError(110, f"{address} does not answer")
        target = way.target
        path = network.path(self.name, target.name)
        await asyncio.sleep(path.latency)
        listener = target.listeners.get(way.port)
        if listener is None or not target.is_up:
            await asyncio.sleep(path.latency)
            raise ConnectionRefusedError(111, f"nobody listens at {address}")
        near = SimulatedTransport(loop, network, self, target, (self.ip, self._free_port()), address)
        far = SimulatedTransport(loop, network, target, self, (target.ip, way.port), address)
        near.other, far.other = far, near
        near.peername = (way.seen_by_dialer, address.port)
        far.peername = (way.seen_by_target, near.sockname[1])
        far.begin(listener.factory())
        try:
            await asyncio.sleep(path.latency)
        except asyncio.CancelledError:
            far.lose(ConnectionResetError("the dialer has gone"))
            raise
        if near.is_lost:
            raise ConnectionResetError(104, f"the connection to {address} broke while it was made")
        near.begin(factory())
        return near

    def interfaces(self) -> list[Interface]:
        """See :meth:`shoal.p2p.network.Network.interfaces`."""
        return list(self.interface_list)

    def _check_up(self) -> None:
        if not self.is_up:
            raise OSError(100, f"{self.name} was killed")

    def _free_port(self) -> int:
        self._next_port += 1
        return self._next_port


class SimulatedListener:
    """A :class:`~shoal.p2p.network.Listener` of a simulated host."""

    def __init__(self, host: HostNetwork, factory: ProtocolFactory, address: Multiaddr) -> None:
        self.factory = factory
        self._host = host
        self._address = address

    @property
    def address(self) -> Multiaddr:
        """Where it listens."""
        return self._address

    def close(self) -> None:
        """Accept no more."""
        if self._host.listeners.get(self._address.port) is self:
            del self._host.listeners[self._address.port]

    async def wait_closed(self) -> None:
        """Return at once."""
