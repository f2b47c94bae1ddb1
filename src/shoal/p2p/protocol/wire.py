"""The bodies of frames: how they are encoded, and the only place where a peer's bytes become objects. Pure.

Bodies of OPEN, RESET, HELLO and GOODBYE are msgpack arrays (fields may be added at their end); CREDIT is a
64-bit number; STRIPED and RECEIVED carry a few numbers; PING and PONG carry 8 bytes of the asker's choice; MESSAGE and
END carry a message of the method (END without a body is a half close without a last message).

Texts that are there for people (reasons, names of programs) are escaped and cut on decoding, see
:func:`~shoal.utils.text.printable`.

Codes of RESET are :class:`~shoal.p2p.protocol.codes.ResetCode`, and what applications add. One that is not known is
kept as text.
"""

from __future__ import annotations

import math
import struct
from dataclasses import dataclass
from functools import lru_cache
from typing import Annotated, Any, TypeVar

import msgspec

from shoal.errors import InvalidTypeError, InvalidValueError, ProtocolViolation
from shoal.p2p.config import MAX_AGENT, MAX_ANNOUNCED
from shoal.p2p.protocol.claims import UNKNOWN, UNSETTLED, Incarnation
from shoal.p2p.protocol.violations import EndKind
from shoal.utils.structs import CompactStruct
from shoal.utils.text import printable

T = TypeVar("T")

MAX_METHOD_NAME = 128
MAX_CODE = 32
MAX_REASON = 512
MAX_ADDRESSES = MAX_ANNOUNCED
MAX_ADDRESS = 512
MAX_PROOF = 256
PING_BYTES = 8
MAX_NUMBER = 2**32 - 1
"""Of a striped payload of one stream."""

Body = bytes | bytearray | memoryview

_NO_MESSAGE = msgspec.Raw(b"\xc0")
_CREDIT = struct.Struct("!Q")
_STRIPED = struct.Struct("!IQI")
_RECEIVED = struct.Struct("!I")
_encoder = msgspec.msgpack.Encoder()


class Open(CompactStruct, frozen=True):
    """Body of OPEN: begins a stream."""

    method: Annotated[str, msgspec.Meta(max_length=MAX_METHOD_NAME)]
    timeout: float | None
    """Seconds that the opener still waits."""
    final: bool
    """Whether the opener sends nothing after ``message``: with a message, that is a unary call."""
    message: msgspec.Raw = _NO_MESSAGE

    @property
    def has_message(self) -> bool:
        return bytes(self.message) != b"\xc0"


class Reset(CompactStruct, frozen=True):
    """Body of RESET: ends a stream in both directions."""

    code: Annotated[str, msgspec.Meta(max_length=MAX_CODE)]
    message: Annotated[str, msgspec.Meta(max_length=MAX_REASON)]


class Hello(CompactStruct, frozen=True):
    """Body of HELLO: the first frame in each direction, says who speaks."""

    lane: Annotated[int, msgspec.Meta(ge=0, le=255)]
    agent: Annotated[str, msgspec.Meta(max_length=MAX_AGENT)]
    is_client: bool
    """Whether the sender cannot be dialed now, or does not know yet."""
    addresses: Annotated[
        list[Annotated[str, msgspec.Meta(max_length=MAX_ADDRESS)]], msgspec.Meta(max_length=MAX_ADDRESSES)
    ]
    clock: float
    """The sender's DHT time."""
    incarnation: Incarnation = UNKNOWN
    """The number that this run of the sender has drawn; with ``tenure``, see :mod:`shoal.p2p.protocol.claims`."""
    tenure: float = UNSETTLED
    seen: Annotated[str, msgspec.Meta(max_length=MAX_ADDRESS)] = ""
    """The address that the receiver has for the sender: what it dialed, or from where it was dialed."""


class Goodbye(CompactStruct, frozen=True):
    """Body of GOODBYE: the last frame of a connection that is closed in order."""

    reason: Annotated[str, msgspec.Meta(max_length=MAX_REASON)]
    rival: Annotated[bytes, msgspec.Meta(max_length=MAX_PROOF)] = b""
    """If the reason is that another peer holds the same identity: what that one signed; ``reason`` is its address."""
    kind: Annotated[int, msgspec.Meta(ge=0, le=255)] = EndKind.OTHER
    """The :class:`~shoal.p2p.protocol.violations.EndKind`; one that is not known counts as OTHER."""


@dataclass(frozen=True)
class Refusal:
    """Why a connection is refused, and the proof, if the reason is another peer with the same identity."""

    reason: str
    proof: bytes = b""
    kind: EndKind = EndKind.OTHER


@lru_cache(maxsize=1024)
def _decoder(kind: Any) -> msgspec.msgpack.Decoder[Any]:
    return msgspec.msgpack.Decoder(kind)


def encode(message: object) -> bytes:
    """The body of a message; :class:`InvalidTypeError` or :class:`InvalidValueError` if it cannot be sent."""
    try:
        return _encoder.encode(message)
    except UnicodeEncodeError as error:
        raise InvalidValueError(f"message: {type(message).__name__} cannot be encoded: {error}") from error
    except (TypeError, OverflowError, RecursionError) as error:
        raise InvalidTypeError(f"message: {type(message).__name__} cannot be encoded: {error}") from error


def decode(body: Body | msgspec.Raw, kind: type[T], what: str) -> T:
    """The object in ``body``; :class:`ProtocolViolation` that names ``what`` if there is none of that kind."""
    try:
        value: T = _decoder(kind).decode(body)  # type: ignore[arg-type]
    except (msgspec.MsgspecError, ValueError, OverflowError, RecursionError) as error:
        # MsgspecError: malformed, or of another type. ValueError: not UTF-8. RecursionError: nested too deeply.
        # msgspec quotes tags and names as the peer wrote them.
        raise ProtocolViolation(f"{what} does not decode: {printable(str(error))}") from error
    return value


def encode_open(method: str, timeout: float | None, final: bool, message: bytes | None) -> bytes:
    """Body of OPEN."""
    raw = _NO_MESSAGE if message is None else msgspec.Raw(message)
    return _encoder.encode(Open(method, timeout, final, raw))


def decode_open(body: Body) -> Open:
    """Body of OPEN; its timeout is checked to be a number >= 0."""
    opened = decode(body, Open, "OPEN")
    if opened.timeout is not None and not (opened.timeout >= 0 and math.isfinite(opened.timeout)):
        raise ProtocolViolation(f"OPEN with a timeout of {opened.timeout} s")
    return opened


def encode_reset(code: str, message: str) -> bytes:
    """Body of RESET; texts are cut to their limits."""
    return _encoder.encode(Reset(_sendable(code, MAX_CODE), _sendable(message, MAX_REASON)))


def decode_reset(body: Body) -> Reset:
    """Body of RESET."""
    reset = decode(body, Reset, "RESET")
    return Reset(printable(reset.code, MAX_CODE), printable(reset.message, MAX_REASON))


def encode_goodbye(refusal: Refusal) -> bytes:
    """Body of GOODBYE; the reason is cut to its limit."""
    return _encoder.encode(Goodbye(_sendable(refusal.reason, MAX_REASON), refusal.proof, int(refusal.kind)))


def _sendable(text: str, limit: int) -> str:
    """Cut, and without the lone surrogates that names of files may bring into the text of an error."""
    return text[:limit].encode(errors="replace").decode()


def decode_goodbye(body: Body) -> Refusal:
    """The reason in the body of GOODBYE, with the proof."""
    goodbye = decode(body, Goodbye, "GOODBYE")
    is_known = goodbye.kind in EndKind.__members__.values() and goodbye.kind != EndKind.LOST
    kind = EndKind(goodbye.kind) if is_known else EndKind.OTHER
    return Refusal(printable(goodbye.reason, MAX_REASON), goodbye.rival, kind)


def decode_hello(body: Body) -> Hello:
    """Body of HELLO; its clock is checked to be a number."""
    hello = decode(body, Hello, "HELLO")
    if not (math.isfinite(hello.clock) and math.isfinite(hello.tenure)):
        raise ProtocolViolation("HELLO with a time that is not a number")
    return msgspec.structs.replace(hello, agent=printable(hello.agent, MAX_AGENT))


def encode_credit(count: int) -> bytes:
    """Body of CREDIT."""
    return _CREDIT.pack(count)


def decode_credit(body: Body) -> int:
    """Body of CREDIT: bytes that the receiver may send in addition."""
    if len(body) != _CREDIT.size:
        raise ProtocolViolation(f"CREDIT with a body of {len(body)} bytes")
    count: int = _CREDIT.unpack(body)[0]
    if count == 0:
        raise ProtocolViolation("CREDIT of 0 bytes")
    return count


def encode_striped(number: int, tag: int, length: int) -> bytes:
    """Body of STRIPED."""
    return _STRIPED.pack(number, tag, length)


def decode_striped(body: Body) -> tuple[int, int, int]:
    """Body of STRIPED: the payload's number among the striped ones of its stream, its tag, its bytes."""
    if len(body) != _STRIPED.size:
        raise ProtocolViolation(f"STRIPED with a body of {len(body)} bytes")
    number, tag, length = _STRIPED.unpack(body)
    if length == 0:
        raise ProtocolViolation("STRIPED of 0 bytes")
    return number, tag, length


def encode_received(number: int) -> bytes:
    """Body of RECEIVED."""
    return _RECEIVED.pack(number)


def decode_received(body: Body) -> int:
    """Body of RECEIVED: the number of the payload of which every piece has arrived."""
    if len(body) != _RECEIVED.size:
        raise ProtocolViolation(f"RECEIVED with a body of {len(body)} bytes")
    number: int = _RECEIVED.unpack(body)[0]
    return number


def check_message_size(body: bytes, limit: int) -> None:
    """:class:`InvalidValueError` if an own message is longer than what peers accept."""
    if len(body) > limit:
        raise InvalidValueError(f"message must take at most {limit} bytes when encoded, got {len(body)}")
