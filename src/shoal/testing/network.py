"""A network in memory: hosts, listeners and byte streams with latency, bandwidth and faults, all from one seed.

It implements :class:`shoal.p2p.network.Network` in terms of asyncio transports, so that everything above sockets runs
on it unchanged. Time is the loop's; run it on :class:`shoal.testing.clock.VirtualClockLoop` to make it virtual.
Deterministic: no set is iterated over, nothing depends on object ids, and all choices come from the ``rng`` given.

Hosts may live at a site behind a NAT (:meth:`~SimulatedNetwork.site`): others see its router's address, and get in at
forwarded ports only.

Faults: :meth:`~SimulatedNetwork.drop_connections` (both sides see them end), :meth:`~SimulatedNetwork.partition` and
:meth:`~SimulatedNetwork.silence` (bytes vanish, connections stay, dialing times out), and
:meth:`~SimulatedNetwork.kill` (a host is gone: its connections end, as the operating system of a killed process
ends them; with ``silently`` nobody is told, as when a machine loses power).
"""

from __future__ import annotations

import asyncio
import functools
import random
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from shoal.errors import InvalidValueError
from shoal.p2p.multiaddr import Multiaddr
from shoal.p2p.reach.vantage import Interface

ProtocolFactory = Callable[[], asyncio.BufferedProtocol]

SEGMENT_BYTES = 64 * 1024
SEGMENT_SECONDS = 0.05
LEAST_SEGMENT_BYTES = 512
"""Longer writes travel in pieces of at most this size."""
RECEIVE_WINDOW = 256 * 1024
"""Bytes that may be on the way in one direction of a connection; more stay in the sender's buffer."""
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
        self._paths: dict[tuple[str, str], _Path] = {}
        self._connections: dict[SimulatedTransport, None] = {}
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
        self._path(a, b).bandwidth = self._path(b, a).bandwidth = bytes_per_second

    # ---- faults ----

    def drop_connections(self, a: str, b: str) -> int:
        """End all connections between two hosts, for both sides; returns how many there were."""
        dropped = [one for one in self._connections if (one.local.name, one.remote.name) == (a, b)]
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
        for transport in list(self._connections):
            if transport.lost_bytes:
                transport.lose(ConnectionResetError("retransmission came too late"))
                if transport.other is not None:
                    transport.other.lose(ConnectionResetError("retransmission came too late"))

    def silence(self, a: str, b: str) -> None:
        """What two hosts send each other vanishes, until :meth:`heal`; their connections stay."""
        self._path(a, b).is_silent = self._path(b, a).is_silent = True

    def kill(self, name: str, *, silently: bool = False) -> None:
        """The host is gone: it hears and says nothing more, and its listeners are closed.

        The other sides see their connections reset, or nothing at all with ``silently``. :meth:`revive` lets a new
        process start there.
        """
        host = self.host(name)
        host.is_up = False
        host.is_silent = silently
        host.listeners.clear()
        for transport in [one for one in self._connections if one.local is host]:
            other = transport.other
            transport.vanish()
            if other is not None and not silently:
                other.lose_later(ConnectionResetError("the other host was killed"))

    def revive(self, name: str) -> None:
        """A killed host can be used again."""
        host = self.host(name)
        host.is_up, host.is_silent = True, False

    # ---- inside ----

    def _path(self, a: str, b: str) -> _Path:
        path = self._paths.get((a, b))
        if path is None:
            # Both directions draw together, so that asking for one decides the other too.
            latency = self._rng.uniform(*self._latency) if a != b else 0.0001
            path = self._paths[a, b] = _Path(latency, self._bandwidth if a != b else None)
            self._paths.setdefault((b, a), _Path(latency, path.bandwidth))
        return path

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

    def _reaches(self, a: HostNetwork, b: HostNetwork) -> bool:
        apart = self._partition.get(a.name, 0) != self._partition.get(b.name, 0)
        return not (apart or self._path(a.name, b.name).is_silent or a.is_silent or b.is_silent)


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


class _Path:
    """One direction between two hosts; all their connections share its bandwidth."""

    def __init__(self, latency: float, bandwidth: float | None) -> None:
        self.latency = latency
        self.bandwidth = bandwidth
        self.is_silent = False
        self.busy_until = 0.0

    @property
    def segment_bytes(self) -> int:
        """How much arrives in one piece: no more than passes in an instant, so that progress shows on a slow path."""
        if self.bandwidth is None:
            return SEGMENT_BYTES
        return min(max(int(self.bandwidth * SEGMENT_SECONDS), LEAST_SEGMENT_BYTES), SEGMENT_BYTES)

    def schedule(self, now: float, size: int) -> float:
        """When the last of ``size`` bytes handed over now arrives."""
        if self.bandwidth is not None:
            self.busy_until = max(self.busy_until, now) + size / self.bandwidth
            return self.busy_until + self.latency
        return now + self.latency


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
        if way is None or not network._reaches(self, way.target):
            await asyncio.sleep(CONNECT_TIMEOUT)
            raise TimeoutError(110, f"{address} does not answer")
        target = way.target
        path = network._path(self.name, target.name)
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
        if near._is_lost:
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


class SimulatedTransport(asyncio.Transport):
    """One side of a byte stream. Bytes arrive in order, in segments, after the latency of the path.

    A sender has ``RECEIVE_WINDOW`` bytes on the way at most; the rest waits in its buffer, whose size moves the
    marks of flow control. A reader that paused lets the window fill.
    """

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        network: SimulatedNetwork,
        local: HostNetwork,
        remote: HostNetwork,
        sockname: tuple[str, int],
        address: Multiaddr,
    ) -> None:
        super().__init__({"sockname": sockname})
        self.local = local
        self.remote = remote
        self.sockname = sockname
        self.peername: tuple[str, int] | None = None
        self.address = address
        self.other: SimulatedTransport | None = None
        self.lost_bytes = False
        """Whether something that was to arrive here has vanished: what comes later cannot be delivered."""
        self._loop = loop
        self._network = network
        self._protocol: asyncio.BufferedProtocol | None = None
        self._buffer: deque[bytes] = deque()
        self._buffered = 0
        self._on_the_way = 0
        self._last_arrival = 0.0
        self._high, self._low = 64 * 1024, 16 * 1024
        self._is_paused = False
        self._is_closing = False
        self._is_lost = False
        self._reading = True
        self._unread: deque[bytes] = deque()
        self._eof_unread = False

    def begin(self, protocol: asyncio.BufferedProtocol) -> None:
        """The connection is made."""
        self._protocol = protocol
        self._network._connections[self] = None
        protocol.connection_made(self)
        self._deliver_unread()

    # ---- asyncio.Transport ----

    def get_extra_info(self, name: str, default: Any = None) -> Any:
        if name == "peername":
            return self.peername
        return self.sockname if name == "sockname" else default

    def is_closing(self) -> bool:
        return self._is_closing

    def is_reading(self) -> bool:
        return self._reading

    def pause_reading(self) -> None:
        self._reading = False

    def resume_reading(self) -> None:
        self._reading = True
        self._loop.call_soon(self._deliver_unread)

    def set_write_buffer_limits(self, high: int | None = None, low: int | None = None) -> None:
        self._high = 64 * 1024 if high is None else high
        self._low = self._high // 4 if low is None else low

    def get_write_buffer_size(self) -> int:
        return self._buffered + self._on_the_way

    def get_write_buffer_limits(self) -> tuple[int, int]:
        return self._low, self._high

    def write(self, data: bytes | bytearray | memoryview) -> None:
        self.writelines([data])

    def writelines(self, list_of_data: Iterable[bytes | bytearray | memoryview]) -> None:
        if self._is_closing:
            return
        whole = b"".join(list_of_data)
        step = self._network._path(self.local.name, self.remote.name).segment_bytes
        for begin in range(0, len(whole), step):
            piece = whole[begin : begin + step]
            self._buffer.append(piece)
            self._buffered += len(piece)
        self._send_buffered()
        if self._buffered > self._high and not self._is_paused and self._protocol is not None:
            self._is_paused = True
            self._protocol.pause_writing()

    def can_write_eof(self) -> bool:
        return False

    def close(self) -> None:
        if not self._is_closing:
            self._is_closing = True
            self._unread.clear()
            self._end_when_sent()

    def abort(self) -> None:
        other = self.other
        self.lose(None)
        if other is not None:
            other.lose_later(ConnectionResetError("reset by the peer"))

    # ---- sending ----

    def _send_buffered(self) -> None:
        while self._buffer and self._on_the_way < RECEIVE_WINDOW and not self._is_lost:
            piece = self._buffer.popleft()
            self._buffered -= len(piece)
            self._on_the_way += len(piece)
            if self._carry(len(piece), functools.partial(self._arrive, piece)):
                continue
            if self.other is not None:
                self.other.lost_bytes = True

    def _carry(self, size: int, arrive: Callable[[], None]) -> bool:
        """Let something arrive at the other side; False if it vanishes."""
        if not self._network._reaches(self.local, self.remote):
            return False
        path = self._network._path(self.local.name, self.remote.name)
        arrival = path.schedule(self._loop.time(), size)
        # In order, also when the latency has just become less.
        self._last_arrival = max(self._last_arrival, arrival)
        self._loop.call_at(self._last_arrival, arrive)
        return True

    def _arrive(self, piece: bytes) -> None:
        other = self.other
        if other is None or other._is_lost:
            return
        if other.lost_bytes or not self._network._reaches(self.local, self.remote):
            other.lost_bytes = True
            return
        other._unread.append(piece)
        other._deliver_unread()

    def _acknowledge(self, size: int) -> None:
        """The other side has read ``size`` bytes; the news takes a while too, and may be lost."""
        if self.other is not None and self._network._reaches(self.remote, self.local):
            path = self._network._path(self.remote.name, self.local.name)
            self._loop.call_later(path.latency, self._acknowledged, size)

    def _acknowledged(self, size: int) -> None:
        if self._is_lost:
            return
        self._on_the_way -= size
        self._send_buffered()
        if self._is_paused and self._buffered <= self._low and self._protocol is not None:
            self._is_paused = False
            self._protocol.resume_writing()
        if self._is_closing:
            self._end_when_sent()

    def _end_when_sent(self) -> None:
        """A closed transport hands over what it still has, then tells the other side that this is all."""
        if self._buffer or self._is_lost:
            return
        self._carry(0, self._arrive_eof)
        self._loop.call_soon(self.lose, None)

    def _arrive_eof(self) -> None:
        other = self.other
        if other is not None and not other._is_lost and not other.lost_bytes:
            other._eof_unread = True
            other._deliver_unread()

    # ---- receiving ----

    def _deliver_unread(self) -> None:
        protocol = self._protocol
        while protocol is not None and self._unread and self._reading and not self._is_closing:
            piece = self._unread.popleft()
            view = memoryview(piece)
            while view.nbytes and not self._is_closing:
                room = memoryview(protocol.get_buffer(-1))
                count = min(len(room), len(view))
                room[:count] = view[:count]
                protocol.buffer_updated(count)
                view = view[count:]
            if self.other is not None:
                self.other._acknowledge(len(piece))
        if self._eof_unread and not self._unread and protocol is not None and not self._is_closing:
            self._eof_unread = False
            if not protocol.eof_received():
                self.close()

    # ---- the end ----

    def lose(self, error: Exception | None) -> None:
        """The connection is over for this side."""
        if self._is_lost:
            return
        self._is_lost = self._is_closing = True
        self._network._connections.pop(self, None)
        self._buffer.clear()
        self._buffered = 0
        if self._protocol is not None:
            self._loop.call_soon(self._protocol.connection_lost, error)

    def lose_later(self, error: Exception) -> None:
        """The same, when the news has come over the network; never, if it vanishes."""
        if self._network._reaches(self.remote, self.local):
            path = self._network._path(self.remote.name, self.local.name)
            self._loop.call_later(path.latency, self.lose, error)

    def vanish(self) -> None:
        """This side's host is gone: it sends nothing more. Its protocol learns it, for the test's sake."""
        self.lose(ConnectionAbortedError("this host was killed"))
