"""The calls of one connection, in both directions: what this side asks of the peer, and what the peer asks of it.

A call costs one task, at the side that serves it; the caller waits on a future in its own task.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any, Protocol

from shoal.errors import DeadlineExceeded, InvalidStateError, ProtocolViolation, RemoteError, ShoalError
from shoal.p2p.identity import PeerID
from shoal.p2p.protocol import wire
from shoal.p2p.protocol.codes import ResetCode
from shoal.p2p.protocol.stream_state import StreamState
from shoal.p2p.protocol.streams import Multiplexer
from shoal.p2p.rpc import Method, Payload, Stream, StreamConnection

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Served:
    """A method with what answers it: exactly one of the two handlers."""

    method: Method[Any, Any]
    unary: Callable[[PeerID, Any], Awaitable[Any]] | None = None
    stream: Callable[[Stream], Awaitable[None]] | None = None


class CallConnection(StreamConnection, Protocol):
    """What calls need of their connection."""

    def note_use(self) -> None:
        """A stream was opened: from now on somebody waits for this peer."""


class Calls:
    """Opens streams on one connection, and serves those that the peer opens."""

    def __init__(
        self,
        connection: CallConnection,
        streams: Multiplexer,
        find_served: Callable[[str], Served | None],
        max_timeout: float,
    ) -> None:
        self._connection = connection
        self._streams = streams
        self._find_served = find_served
        self._max_timeout = max_timeout
        self._loop = asyncio.get_running_loop()
        self.handlers: dict[asyncio.Task[None], None] = {}  # ordered, as a set is not

    # What this side asks.

    async def call(self, method: Method[Any, Any], body: bytes, deadline: float, timeout: float) -> Any:
        """A unary call; ``deadline`` in the loop's time, ``timeout`` as the caller gave it, for its errors."""
        answered: asyncio.Future[None] = self._loop.create_future()
        state = self._streams.open(method.name, max(deadline - self._loop.time(), 0.0), body, final=True)

        def on_change() -> None:
            if state.is_closed and not answered.done():
                answered.set_result(None)

        state.on_change = on_change
        self._connection.note_use()
        timer = self._loop.call_at(deadline, self._expire, state, method, timeout)
        try:
            await answered
        except asyncio.CancelledError:
            state.reset(
                ResetCode.CANCELLED, "the caller lost interest", InvalidStateError("the call was cancelled")
            )
            raise
        finally:
            timer.cancel()
        if state.failure is not None:
            raise state.failure
        return self._take_response(state, method)

    def open_stream(self, method: Method[Any, Any], deadline: float | None) -> tuple[Stream, StreamState]:
        """Open a stream; the caller keeps the deadline."""
        remaining = None if deadline is None else max(deadline - self._loop.time(), 0.0)
        state = self._streams.open(method.name, remaining, None, final=False)
        self._connection.note_use()
        return Stream(state, self._connection, method, is_opener=True), state

    def _take_response(self, state: StreamState, method: Method[Any, Any]) -> Any:
        try:
            item = state.take()
            if item is None or isinstance(item, Payload) or state.received:
                raise ProtocolViolation(f"a call of {method.name} was not answered with one message")
            return wire.decode(item, method.response, f"response of {method.name}")
        except ProtocolViolation as error:
            self._connection.violate(error)
            raise

    def _expire(self, state: StreamState, method: Method[Any, Any], timeout: float) -> None:
        message = f"{method.name} at {self._connection.peer} took longer than {timeout:g} s"
        state.reset(ResetCode.DEADLINE, message, DeadlineExceeded(message))

    # What the peer asks.

    def receive_open(self, stream_id: int, body: bytes) -> None:
        """The peer opens a stream: start its handler."""
        accepted = self._streams.receive_open(stream_id, body)
        if accepted is None:
            return
        state, opened = accepted
        served = self._find_served(opened.method)
        if served is None:
            failure = RemoteError(ResetCode.UNKNOWN_METHOD, f"{opened.method!r} is not served here")
            state.reset(failure.code, failure.message, failure)
            self._streams.release(state)
            return
        try:
            running = self._begin(served, state, opened)
        except BaseException:
            self._streams.release(state)
            raise
        timeout = None if opened.timeout is None else min(opened.timeout, self._max_timeout)
        task = self._loop.create_task(self._serve(running, served, state, timeout))
        self.handlers[task] = None
        self._observe(state, task)
        task.add_done_callback(lambda done: self._handler_done(state, done))

    def _begin(
        self, served: Served, state: StreamState, opened: wire.Open
    ) -> Callable[[], Awaitable[object]]:
        """The request is decoded here, before there is a task: a bad one ends the connection."""
        method = served.method
        if served.stream is not None:
            stream = Stream(state, self._connection, method, is_opener=False)
            handler = served.stream

            async def run_stream() -> None:
                await handler(stream)
                await stream.delivered()

            return run_stream
        item = state.take_request()
        if not opened.final or item is None or isinstance(item, Payload):
            raise ProtocolViolation(f"a call of {method.name} that is not one message")
        request = wire.decode(item, method.request, f"request of {method.name}")
        assert served.unary is not None
        unary = served.unary

        return lambda: unary(self._connection.peer, request)

    def _observe(self, state: StreamState, task: asyncio.Task[None]) -> None:
        """Cancel the handler when its stream fails, besides what the stream itself does then."""
        wake = state.on_change

        def on_change() -> None:
            if state.failure is not None:
                task.cancel()
            wake()

        state.on_change = on_change

    async def _serve(
        self,
        run: Callable[[], Awaitable[object]],
        served: Served,
        state: StreamState,
        timeout: float | None,
    ) -> None:
        method = served.method
        timer = None
        if timeout is not None:
            timer = self._loop.call_later(timeout, self._expire, state, method, timeout)
        try:
            answer = await run()
            state.finish(b"" if served.unary is None else await self._encode(answer))
            state.reset(
                ResetCode.FINISHED, "the handler has returned", InvalidStateError("the handler has returned")
            )
        except asyncio.CancelledError:
            self._reset(
                state, RemoteError(ResetCode.CANCELLED, f"the handler of {method.name} was cancelled")
            )
            raise
        except RemoteError as error:
            self._reset(state, error)
        except ShoalError as error:
            self._reset(state, RemoteError(ResetCode.FAILED, str(error)))
        except Exception:
            # The outer edge of the application's code: its mistake is logged here, and the peer is told that
            # it is one, not what it says.
            logger.exception("the handler of %s failed", method.name)
            self._reset(state, RemoteError(ResetCode.INTERNAL, f"the handler of {method.name} failed"))
        finally:
            if timer is not None:
                timer.cancel()

    async def _encode(self, answer: object) -> bytes:
        """The answer's bytes, made only when the socket takes them: a peer that asks often, but does not read, must
        not make us hold a long answer for each of its calls.
        """
        if not self._connection.writer.is_writable:
            await self._connection.writer.writable()
        body = wire.encode(answer)
        wire.check_message_size(body, self._connection.max_message)
        return body

    def _reset(self, state: StreamState, failure: RemoteError) -> None:
        state.reset(failure.code, failure.message, failure)

    def _handler_done(self, state: StreamState, task: asyncio.Task[None]) -> None:
        self.handlers.pop(task, None)
        self._streams.release(state)
        if not task.cancelled() and task.exception() is not None:
            # Everything but the interpreter's own exits is caught in _serve.
            logger.error("a handler's task failed", exc_info=task.exception())

    def cancel_handlers(self) -> None:
        """The connection has ended."""
        for task in list(self.handlers):
            task.cancel()
