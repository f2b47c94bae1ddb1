"""The byte streams of the simulated network: segments that take their time on a path, or vanish.

:class:`SimulatedTransport` is one side of a connection, an asyncio transport. Who reaches whom is known by the network.
"""

from __future__ import annotations

import asyncio
import functools
from collections import deque
from collections.abc import Callable, Iterable
from typing import Any, Protocol

from shoal.p2p.multiaddr import Multiaddr

SEGMENT_BYTES = 64 * 1024
SEGMENT_SECONDS = 0.05
LEAST_SEGMENT_BYTES = 512
"""Longer writes travel in pieces of at most this size."""
RECEIVE_WINDOW = 256 * 1024
"""Bytes that may be on the way in one direction of a connection; more stay in the sender's buffer."""


class Pipe:
    """One direction of a link, whose bandwidth in bytes per second all that it carries share; None: no limit."""

    def __init__(self, bandwidth: float | None = None) -> None:
        self.bandwidth = bandwidth
        self.busy_until = 0.0

    def schedule(self, now: float, size: int) -> float:
        """When the last of ``size`` bytes handed over at ``now`` has passed."""
        if self.bandwidth is None:
            return now
        self.busy_until = max(self.busy_until, now) + size / self.bandwidth
        return self.busy_until


class Path:
    """One direction between two hosts; all their connections share its bandwidth.

    :param uplink: of the host that sends; all that it sends shares it
    :param downlink: of the host that receives
    """

    def __init__(self, latency: float, bandwidth: float | None, uplink: Pipe, downlink: Pipe) -> None:
        self.latency = latency
        self.is_silent = False
        self._own = Pipe(bandwidth)
        self._uplink, self._downlink = uplink, downlink

    @property
    def bandwidth(self) -> float | None:
        return self._own.bandwidth

    @bandwidth.setter
    def bandwidth(self, bytes_per_second: float | None) -> None:
        self._own.bandwidth = bytes_per_second

    @property
    def segment_bytes(self) -> int:
        """How much arrives in one piece: no more than passes in an instant, so that progress shows on a slow path."""
        links = (self._uplink, self._own, self._downlink)
        limits = [link.bandwidth for link in links if link.bandwidth is not None]
        if not limits:
            return SEGMENT_BYTES
        return min(max(int(min(limits) * SEGMENT_SECONDS), LEAST_SEGMENT_BYTES), SEGMENT_BYTES)

    def leave(self, now: float, size: int) -> float:
        """When the last of ``size`` bytes handed over now is at the receiver's link."""
        return self._own.schedule(self._uplink.schedule(now, size), size) + self.latency

    def arrive(self, now: float, size: int) -> float:
        """When the last of ``size`` bytes that are at the receiver's link now arrives."""
        return self._downlink.schedule(now, size)


class End(Protocol):
    """The host at one end of a connection."""

    name: str


class Wires(Protocol):
    """What a transport needs of the network."""

    connections: dict[SimulatedTransport, None]
    """Every transport whose connection stands."""

    def path(self, a: str, b: str) -> Path:
        """The direction from host ``a`` to host ``b``."""

    def reaches(self, a: Any, b: Any) -> bool:
        """Whether what host ``a`` sends arrives at host ``b``."""


class SimulatedTransport(asyncio.Transport):
    """One side of a byte stream. Bytes arrive in order, in segments, after the latency of the path.

    A sender has ``RECEIVE_WINDOW`` bytes on the way at most; the rest waits in its buffer, whose size moves the
    marks of flow control. A reader that paused lets the window fill.
    """

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        network: Wires,
        local: End,
        remote: End,
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
        self.is_lost = False
        self.has_vanished = False
        self.is_stranded = False
        """Whether one end has moved to another address: what is sent vanishes."""
        self._reading = True
        self._unread: deque[bytes] = deque()
        self._eof_unread = False

    def begin(self, protocol: asyncio.BufferedProtocol) -> None:
        """The connection is made."""
        self._protocol = protocol
        self._network.connections[self] = None
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
        step = self._network.path(self.local.name, self.remote.name).segment_bytes
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
        while self._buffer and self._on_the_way < RECEIVE_WINDOW and not self.is_lost:
            piece = self._buffer.popleft()
            self._buffered -= len(piece)
            self._on_the_way += len(piece)
            if self._carry(len(piece), functools.partial(self._arrive, piece)):
                continue
            if self.other is not None:
                self.other.lost_bytes = True

    def _carry(self, size: int, arrive: Callable[[], None]) -> bool:
        """Let something arrive at the other side; False if it vanishes."""
        if self.is_stranded or not self._network.reaches(self.local, self.remote):
            return False
        path = self._network.path(self.local.name, self.remote.name)
        # In order, also when the latency has just become less.
        self._last_arrival = max(self._last_arrival, path.leave(self._loop.time(), size))
        self._loop.call_at(self._last_arrival, self._receive, path, size, arrive)
        return True

    def _receive(self, path: Path, size: int, arrive: Callable[[], None]) -> None:
        """Pass the other side's own link."""
        now = self._loop.time()
        arrival = path.arrive(now, size)
        if arrival > now:
            self._loop.call_at(arrival, arrive)
        else:
            arrive()

    def _arrive(self, piece: bytes) -> None:
        other = self.other
        if other is None or other.is_lost:
            if other is not None and other.has_vanished:
                self.lose_later(ConnectionResetError("the other host knows nothing of this connection"))
            return
        if other.lost_bytes or self.is_stranded or not self._network.reaches(self.local, self.remote):
            other.lost_bytes = True
            return
        other._unread.append(piece)
        other._deliver_unread()

    def _acknowledge(self, size: int) -> None:
        """The other side has read ``size`` bytes; the news takes a while too, and may be lost."""
        if self.other is not None and self._network.reaches(self.remote, self.local):
            path = self._network.path(self.remote.name, self.local.name)
            self._loop.call_later(path.latency, self._acknowledged, size)

    def _acknowledged(self, size: int) -> None:
        if self.is_lost:
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
        if self._buffer or self.is_lost:
            return
        self._carry(0, self._arrive_eof)
        self._loop.call_soon(self.lose, None)

    def _arrive_eof(self) -> None:
        other = self.other
        if other is not None and not other.is_lost and not other.lost_bytes:
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
        if self.is_lost:
            return
        self.is_lost = self._is_closing = True
        self._network.connections.pop(self, None)
        self._buffer.clear()
        self._buffered = 0
        if self._protocol is not None:
            self._loop.call_soon(self._protocol.connection_lost, error)

    def lose_later(self, error: Exception) -> None:
        """The same, when the news has come over the network; never, if it vanishes."""
        if not self.is_stranded and self._network.reaches(self.remote, self.local):
            path = self._network.path(self.remote.name, self.local.name)
            self._loop.call_later(path.latency, self.lose, error)

    def vanish(self) -> None:
        """This side's host is gone: it sends nothing more. Its protocol learns it, for the test's sake.

        If the host is revived, it resets what the other side still takes for a connection.
        """
        self.has_vanished = True
        self.lose(ConnectionAbortedError("this host was killed"))
