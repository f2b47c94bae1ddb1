"""The life of a stream that this host opens: connecting, its deadline, and its end in order."""

from __future__ import annotations

import asyncio
from contextlib import AbstractAsyncContextManager
from types import TracebackType
from typing import Any

from shoal.errors import ConnectionLost
from shoal.p2p.connections import Connections
from shoal.p2p.identity import PeerID
from shoal.p2p.protocol.codes import ResetCode
from shoal.p2p.protocol.stream_state import StreamState
from shoal.p2p.rpc import Lane, Method, Stream


class OpenedStream(AbstractAsyncContextManager[Stream]):
    """The ``async with`` block of :meth:`shoal.p2p.host.Host.open_stream`."""

    def __init__(
        self,
        connections: Connections,
        peer: PeerID,
        method: Method[Any, Any],
        timeout: float | None,
        lane: Lane,
    ) -> None:
        self._connections = connections
        self._peer = peer
        self._method = method
        self._timeout = timeout
        self._lane = lane
        self._stream: Stream | None = None
        self._state: StreamState | None = None
        self._timer: asyncio.TimerHandle | None = None

    async def __aenter__(self) -> Stream:
        loop = asyncio.get_running_loop()
        now = loop.time()
        deadline = None if self._timeout is None else now + self._timeout
        get = self._connections.lane if self._lane is Lane.BULK else self._connections.control
        limit = now + 2 * self._connections.config.dial_timeout if deadline is None else deadline
        connection = await get(self._peer, limit)
        if not connection.is_open:
            raise ConnectionLost(f"connection to {self._peer}: {connection.close_reason}")
        self._stream, self._state = connection.calls.open_stream(self._method, deadline)
        if deadline is not None and self._timeout is not None:
            self._timer = loop.call_at(deadline, self._stream.expire, self._timeout)
        return self._stream

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._stream is not None
        assert self._state is not None
        try:
            if kind is None:
                self._state.finish()
                await self._stream.delivered()
        finally:
            if self._timer is not None:
                self._timer.cancel()
            self._stream.reset(ResetCode.CANCELLED, "the opener has left the stream")
