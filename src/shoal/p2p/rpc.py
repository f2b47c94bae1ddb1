"""What calls and streams look like to those who use them: methods, lanes, payloads and :class:`Stream`.

A stream here is the asyncio side of one :class:`~shoal.p2p.protocol.stream_state.StreamState`, which holds all rules
of the protocol; this file only waits, encodes and decodes.
"""

from __future__ import annotations

import asyncio
import enum
import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from typing import Any, Generic, Protocol, TypeVar

from shoal.errors import DeadlineExceeded, InvalidStateError, InvalidValueError, ProtocolViolation, ShoalError
from shoal.p2p.identity import PeerID
from shoal.p2p.protocol import wire
from shoal.p2p.protocol.codes import ResetCode
from shoal.p2p.protocol.frames import payload_memory
from shoal.p2p.protocol.stream_state import Payload, StreamState

__all__ = ["Buffer", "EndOfStream", "Lane", "Method", "Payload", "Stream"]

logger = logging.getLogger(__name__)

RequestT = TypeVar("RequestT")
ResponseT = TypeVar("ResponseT")

Buffer = bytes | bytearray | memoryview
"""What can be sent as a payload: contiguous memory."""


DELIVERY_TIMEOUT = 60.0
"""A stream that is left waits so long for its peer to confirm one more of the payloads that were sent."""


class Lane(enum.IntEnum):
    """Which connection to a peer carries a stream. The numbers are those on the wire."""

    CONTROL = 0
    """The one that all small calls share."""
    BULK = 1
    """One for bulk data, so that it holds up nothing else; opened when first needed."""
    PROBE = 2
    """Opened only to learn whether an address can be dialed; carries no streams."""
    STRIPE = 3
    """One of several that share the payloads of the bulk streams; carries pieces of them, and no streams."""


@dataclass(frozen=True)
class Method(Generic[RequestT, ResponseT]):
    """A method's name, and the closed set of messages that it may carry in each direction.

    ``request`` and ``response`` are :class:`msgspec.Struct` types, or tagged unions of them. Both sides must know
    the method under the same name with compatible types: a body that does not decode ends the connection.
    """

    name: str
    request: type[RequestT]
    response: type[ResponseT]

    def __post_init__(self) -> None:
        if not 0 < len(self.name) <= wire.MAX_METHOD_NAME:
            raise InvalidValueError(f"name: {self.name!r} must have 1 to {wire.MAX_METHOD_NAME} characters")


class Ask(Protocol):
    """Calls a method of a peer, as :meth:`shoal.p2p.host.Host.call`."""

    def __call__(
        self, peer: PeerID, method: Method[RequestT, ResponseT], request: RequestT, *, timeout: float
    ) -> Awaitable[ResponseT]:
        """See the class."""


class EndOfStream(ShoalError, EOFError):
    """The other side has finished sending."""


class FrameWriter(Protocol):
    """What a stream needs to send: room, and a way for payloads."""

    @property
    def is_writable(self) -> bool:
        """Whether the socket takes more now."""

    @property
    def takes_payload(self) -> bool:
        """Whether it does, and no payload has begun or waits for its turn."""

    def add_write_waiter(self, waiter: asyncio.Future[None]) -> None:
        """Resolve ``waiter`` when :attr:`is_writable` or :attr:`takes_payload` may have become true."""

    def remove_write_waiter(self, waiter: asyncio.Future[None]) -> None:
        """Nobody waits for ``waiter`` any more."""

    async def writable(self) -> None:
        """Wait until the socket takes more."""

    async def send_payload(self, state: StreamState, tag: int, data: memoryview) -> None:
        """Send a payload whole; the credit for it has been taken. Only while :attr:`takes_payload`."""


class StripedPayload(Protocol):
    """A payload that goes out over several connections."""

    @property
    def is_taken(self) -> bool:
        """Whether all of it was sent once. The stream changes when that comes to be so."""


class StreamConnection(Protocol):
    """What a stream needs of the connection that carries it."""

    @property
    def writer(self) -> FrameWriter:
        """Where what the stream sends goes out."""

    @property
    def peer(self) -> PeerID:
        """Who is at the other end."""

    @property
    def max_message(self) -> int:
        """The longest message body that peers accept."""

    def violate(self, error: ProtocolViolation) -> None:
        """End the connection: the peer broke the protocol."""

    def stripe(self, state: StreamState, tag: int, data: memoryview) -> StripedPayload | None:
        """Begin to send a payload over several connections; None: it goes out on this one."""


class Stream:
    """One stream: messages and payloads in both directions, in order, each with its own flow control.

    Made by :meth:`Host.open_stream` and handed to the handlers of :meth:`Host.serve_stream`. One task at a time
    may receive; any may send. Every method that waits raises :class:`ConnectionLost`,
    :class:`DeadlineExceeded` or :class:`RemoteError` once the stream has failed; what had arrived before a
    failure of the other side is still delivered.
    """

    def __init__(
        self, state: StreamState, connection: StreamConnection, method: Method[Any, Any], *, is_opener: bool
    ) -> None:
        self.remote: PeerID = connection.peer
        self.method = method
        self._state = state
        self._connection = connection
        self._receives: type[Any] = method.response if is_opener else method.request
        self._waiters: list[asyncio.Future[None]] = []
        self._is_receiving = False
        state.on_change = self._wake

    @property
    def failure(self) -> ShoalError | None:
        """Why the stream has failed, if it has."""
        return self._state.failure

    async def send(self, message: object) -> None:
        """Send a message; waits for credit and for the socket. At most 1 MiB when encoded."""
        body = wire.encode(message)
        wire.check_message_size(body, self._connection.max_message)
        while not (self._state.can_send_message() and self._connection.writer.is_writable):
            self._check_sendable()
            await self._wait(for_writing=True)
        self._check_sendable()
        self._state.send_message(body)

    async def send_payload(self, tag: int, data: Buffer) -> None:
        """Send raw bytes under a tag. ``data`` must stay as it is until the stream is over: where several connections
        carry it, a part of it may have to be sent again.

        Waits until the receiver has given credit for the whole payload: anything over 128 KiB passes only after
        it has called :meth:`accept_payloads` with a window of at least that size. Frames of other streams on the
        same connection wait for a payload that is under way.
        """
        view = memoryview(data).cast("B")
        while not self._state.can_send_payload(len(view)):
            self._check_sendable()
            await self._wait()
        self._check_sendable()
        striped = self._connection.stripe(self._state, tag, view)
        if striped is None:
            await self._send_whole(tag, view)
        while striped is not None and not striped.is_taken and self._state.failure is None:
            await self._wait()
        if self._state.failure is not None:
            raise self._state.failure

    async def _send_whole(self, tag: int, view: memoryview) -> None:
        while not (self._state.can_send_payload(len(view)) and self._connection.writer.takes_payload):
            self._check_sendable()
            await self._wait(for_writing=True)
        self._check_sendable()
        self._state.charge(len(view))
        await self._connection.writer.send_payload(self._state, tag, view)

    async def finish(self) -> None:
        """Tell the other side that nothing more will be sent (half close). Idempotent."""
        if self._state.failure is not None and not self._state.local_finished:
            raise self._state.failure
        self._state.finish()

    @property
    def is_delivered(self) -> bool:
        """Whether the other side has all striped payloads."""
        return not self._state.unconfirmed

    async def delivered(self) -> None:
        """Wait until the other side has all striped payloads: what ends the stream would overtake them, and until then
        their memory must stay as it is.

        If it confirms none for :data:`DELIVERY_TIMEOUT` seconds the stream is reset. Nothing else that it sends counts:
        credit alone would let it hold that memory for ever.
        """
        try:
            while (missing := len(self._state.unconfirmed)) and self._state.failure is None:
                async with asyncio.timeout(DELIVERY_TIMEOUT):
                    while len(self._state.unconfirmed) >= missing and self._state.failure is None:
                        await self._wait()
        except TimeoutError:
            logger.debug("%s does not confirm what was sent", self.remote)
            self.reset(ResetCode.CANCELLED, "what was sent is not confirmed")

    def reset(self, code: str = ResetCode.CANCELLED, message: str = "") -> None:
        """End the stream in both directions at once; the other side gets ``RemoteError(code, message)``."""
        self._state.reset(code, message, InvalidStateError(f"the stream was reset from this side: {code}"))

    async def receive(self) -> Any:
        """The next message (decoded) or :class:`Payload`.

        :class:`EndOfStream` after the other side's last one; :class:`ProtocolViolation` for a body that does not
        decode, which ends the connection.
        """
        if self._is_receiving:
            raise InvalidStateError("another task is receiving from this stream")
        item = self._state.take()
        if item is None:
            self._is_receiving = True
            try:
                item = await self._wait_for_item()
            finally:
                self._is_receiving = False
        if isinstance(item, Payload):
            return item
        try:
            return wire.decode(item, self._receives, f"message of {self.method.name}")
        except ProtocolViolation as error:
            self._connection.violate(error)
            raise

    def accept_payloads(self, sink: Callable[[int, int], memoryview] | None, window: int) -> None:
        """Let payloads of up to ``window`` bytes pass, with ``window`` bytes on the way at most, from now on.

        ``sink(tag, length)`` returns writable memory of exactly ``length`` bytes, into which the payload is
        decrypted; the :class:`Payload` that :meth:`receive` returns views that memory, and only then are its bytes
        complete and verified. It may be asked for payloads out of the order in which they are returned. A sink raises
        :class:`ProtocolViolation` to refuse, which ends the connection. Payloads that came before this call are copied.
        Without a sink, memory is allocated.
        """
        if window < 1:
            raise InvalidValueError(f"window must be at least 1 byte, got {window}")
        try:
            self._state.accept_payloads(None if sink is None else self._guarded(sink), window)
        except ProtocolViolation as error:
            self._connection.violate(error)
            raise

    def __aiter__(self) -> AsyncIterator[Any]:
        """Receive until :class:`EndOfStream`."""
        return self

    async def __anext__(self) -> Any:
        try:
            return await self.receive()
        except EndOfStream:
            raise StopAsyncIteration from None

    def expire(self, timeout: float) -> None:
        """The deadline has passed: the stream fails on both sides."""
        message = f"{self.method.name} with {self.remote} took longer than {timeout:g} s"
        self._state.reset(ResetCode.DEADLINE, message, DeadlineExceeded(message))

    def _guarded(self, sink: Callable[[int, int], memoryview]) -> Callable[[int, int], memoryview]:
        def place(tag: int, length: int) -> memoryview:
            try:
                given = sink(tag, length)
            except ProtocolViolation:
                raise
            except Exception:
                # The application's code, called from the middle of the connection's: only its own stream may
                # suffer from its mistakes.
                logger.exception("the payload sink of %s failed", self.method.name)
                reason = "the payload sink failed"
            else:
                try:
                    return payload_memory(given, length)
                except InvalidValueError as error:
                    reason = str(error)
            self.reset(ResetCode.INTERNAL, reason)
            return memoryview(bytearray(length))

        return place

    def _check_sendable(self) -> None:
        if self._state.failure is not None:
            raise self._state.failure
        if self._state.local_finished:
            raise InvalidStateError(f"the stream of {self.method.name} is finished: nothing more can be sent")

    async def _wait_for_item(self) -> wire.Body | Payload:
        while True:
            item = self._state.take()
            if item is not None:
                return item
            if self._state.remote_finished:
                raise EndOfStream(f"{self.remote} has finished the stream of {self.method.name}")
            if self._state.failure is not None:
                raise self._state.failure
            self._state.is_waiting()
            await self._wait()

    async def _wait(self, *, for_writing: bool = False) -> None:
        waiter: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiters.append(waiter)
        if for_writing and not self._connection.writer.takes_payload:
            self._connection.writer.add_write_waiter(waiter)
        try:
            await waiter
        finally:
            if waiter in self._waiters:
                self._waiters.remove(waiter)
            if for_writing:
                self._connection.writer.remove_write_waiter(waiter)

    def _wake(self) -> None:
        waiters, self._waiters = self._waiters, []
        for waiter in waiters:
            if not waiter.done():
                waiter.set_result(None)
