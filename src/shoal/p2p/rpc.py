"""What calls and streams look like to those who use them: methods, lanes, payloads and :class:`Stream`.

A stream here is the asyncio side of one :class:`~shoal.p2p.streams.StreamState`, which holds all rules of the
protocol; this file only waits, encodes and decodes.
"""

from __future__ import annotations

import asyncio
import enum
from collections.abc import AsyncIterator, Buffer, Callable
from dataclasses import dataclass
from typing import Any, Generic, Protocol, TypeVar

from shoal.errors import InvalidStateError, InvalidValueError, ShoalError
from shoal.p2p.identity import PeerID

RequestT = TypeVar("RequestT")
ResponseT = TypeVar("ResponseT")


class Lane(enum.IntEnum):
    """Which connection to a peer carries a stream. The numbers are those on the wire."""

    CONTROL = 0
    """The one that all small calls share."""
    BULK = 1
    """One for bulk data, so that it holds up nothing else; opened when first needed."""
    PROBE = 2
    """Opened only to learn whether an address can be dialed; carries no streams."""


@dataclass(frozen=True)
class Method(Generic[RequestT, ResponseT]):
    """A method's name, and the closed set of messages that it may carry in each direction.

    ``request`` and ``response`` are :class:`msgspec.Struct` types, or tagged unions of them. Both sides must know the
    method under the same name with compatible types: a body that does not decode ends the connection.
    """

    name: str
    request: type[RequestT]
    response: type[ResponseT]


@dataclass(frozen=True)
class Payload:
    """Raw bytes with a tag (64 bits) that the application chose."""

    tag: int
    data: memoryview


class EndOfStream(ShoalError, EOFError):
    """The other side has finished sending."""


class Stream:
    """One stream: messages and payloads in both directions, in order, each direction with its own flow control.

    Made by :meth:`Host.open_stream` and handed to the handlers of :meth:`Host.serve_stream`. One task at a time may
    receive; any may send. Every method that waits raises :class:`ConnectionLost`, :class:`DeadlineExceeded` or
    :class:`RemoteError` once the stream has failed; what had arrived before a failure of the other side is still
    delivered.
    """

    remote: PeerID
    method: Method[Any, Any]

    async def send(self, message: object) -> None:
        """Send a message; waits for credit and for the socket. At most 1 MiB when encoded."""
        raise NotImplementedError

    async def send_payload(self, tag: int, data: Buffer) -> None:
        """Send raw bytes under a tag. ``data`` may be reused when this returns.

        Waits until the receiver has given credit for the whole payload: anything over 128 KiB passes only after it
        has called :meth:`accept_payloads` with a window of at least that size. Frames of other streams on the same
        connection wait for a payload that is under way.
        """
        raise NotImplementedError

    async def finish(self) -> None:
        """Tell the other side that nothing more will be sent (half close). Idempotent."""
        raise NotImplementedError

    def reset(self, code: str = "cancelled", message: str = "") -> None:
        """End the stream in both directions at once; the other side gets ``RemoteError(code, message)``."""
        raise NotImplementedError

    async def receive(self) -> Any:
        """The next message (decoded) or :class:`Payload`.

        :class:`EndOfStream` after the other side's last one; :class:`ProtocolViolation` for a body that does not
        decode, which ends the connection.
        """
        raise NotImplementedError

    def accept_payloads(self, sink: Callable[[int, int], memoryview] | None, window: int) -> None:
        """Let payloads of up to ``window`` bytes pass, with ``window`` bytes on the way at most, from now on.

        ``sink(tag, length)`` returns writable memory of exactly ``length`` bytes, into which the payload is decrypted;
        the :class:`Payload` that :meth:`receive` returns views that memory, and only then are its bytes complete
        and verified. A sink raises :class:`ProtocolViolation` to refuse, which ends the connection. Payloads that
        came before this call are copied. Without a sink, memory is allocated.
        """
        raise NotImplementedError

    def __aiter__(self) -> AsyncIterator[Any]:
        """Receive until :class:`EndOfStream`."""
        raise NotImplementedError
