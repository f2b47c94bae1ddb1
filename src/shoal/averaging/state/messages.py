"""The messages of a state download, and what donors declare in the DHT. The state itself travels as payloads.

One stream, opened by the joiner: it sends :class:`RequestState`; the donor sends any number of :class:`Waiting`, then
either an :class:`Offer` with its :class:`ManifestPage` s, or :class:`Resumed`; then the chunks as payloads, whose tags
are their numbers, and :class:`Digest` at the end. A donor that refuses ends the stream with a code:
:class:`~shoal.averaging.codes.AveragingCode`, or ``busy``.
"""

from __future__ import annotations

import math
from typing import Annotated, TypeAlias

import msgspec

from shoal.averaging.state.digest import KEY_BYTES
from shoal.errors import InvalidValueError, ProtocolViolation
from shoal.p2p.config import MAX_ANNOUNCED
from shoal.p2p.multiaddr import Multiaddr
from shoal.p2p.rpc import Method
from shoal.utils.structs import CompactStruct, Message, NamedStruct

STATE_ID_BYTES = 16
MAX_DTYPE_LENGTH = 32
MAX_DIMENSIONS = 64
MAX_AGE = 1e9
"""Seconds; no donor has run for longer."""
PAGE_ENTRIES = 512
"""A page of entries with as many dimensions as torch allows still fits into a message."""


class TensorEntry(CompactStruct, frozen=True):
    """One tensor of a state; ``codec`` is the wire id of the codec of its chunks."""

    dtype: Annotated[str, msgspec.Meta(max_length=MAX_DTYPE_LENGTH)]
    shape: Annotated[tuple[int, ...], msgspec.Meta(max_length=MAX_DIMENSIONS)]
    codec: int


def pack_entries(entries: tuple[TensorEntry, ...]) -> bytes:
    """One string of bytes, which is pickled, hashed and read in a fraction of the time that as many objects take."""
    return msgspec.msgpack.encode(entries)


def unpack_entries(packed: bytes) -> tuple[TensorEntry, ...]:
    """What was packed in this process or in its other half."""
    return msgspec.msgpack.decode(packed, type=tuple[TensorEntry, ...])


class Resume(NamedStruct, frozen=True):
    """What the joiner has of a state: all chunks before ``next_chunk``."""

    state_id: bytes
    next_chunk: Annotated[int, msgspec.Meta(ge=0)]


class RequestState(Message, frozen=True):
    """The first message of the stream; ``prefix`` finds the averager among those that share the connection."""

    prefix: str
    resume: Resume | None = None


class Waiting(Message, frozen=True):
    """The donor lives, but has nothing to send yet: ``position`` others are served first; 0: its copy is made."""

    position: Annotated[int, msgspec.Meta(ge=0)]


class Offer(Message, frozen=True):
    """A state of ``tensors`` tensors, metadata included, and ``nbytes`` encoded bytes; its manifest follows. It was
    copied ``age`` seconds ago, or later. ``key`` is that of its :class:`~.digest.StateDigest`.
    """

    state_id: Annotated[bytes, msgspec.Meta(max_length=STATE_ID_BYTES)]
    tensors: int
    nbytes: int
    key: Annotated[bytes, msgspec.Meta(min_length=KEY_BYTES, max_length=KEY_BYTES)]
    age: Annotated[float, msgspec.Meta(ge=0, le=MAX_AGE)] = 0.0


class ManifestPage(Message, frozen=True):
    """The next entries of the manifest."""

    entries: Annotated[tuple[TensorEntry, ...], msgspec.Meta(min_length=1, max_length=PAGE_ENTRIES)]


class Resumed(Message, frozen=True):
    """The state is still here: the chunks follow from the one that was asked for."""


class Digest(Message, frozen=True):
    """The :class:`~.digest.StateDigest` of manifest and chunks: all has been sent."""

    value: bytes


DonorMessage: TypeAlias = Waiting | Offer | ManifestPage | Resumed | Digest

STATE: Method[RequestState, DonorMessage] = Method("averaging.state", RequestState, DonorMessage)  # type: ignore[arg-type]  # a union is no type


def check_request(request: RequestState) -> None:
    """:raises ProtocolViolation: an id that no state has"""
    if request.resume is not None and len(request.resume.state_id) != STATE_ID_BYTES:
        raise ProtocolViolation(f"a state id of {len(request.resume.state_id)} bytes")


class DonorDeclaration(NamedStruct, frozen=True):
    """A peer that shares its state; stored under its peer id as sub-key, so that the DHT checks its signature."""

    sharing: bool
    """False: withdrawn, where an earlier declaration has not expired yet."""
    priority: float
    addresses: tuple[str, ...]


WITHDRAWN = DonorDeclaration(sharing=False, priority=0.0, addresses=())

_encoder = msgspec.msgpack.Encoder()
_decoder = msgspec.msgpack.Decoder(DonorDeclaration)


def donors_key(prefix: str) -> str:
    """Under which donors declare themselves."""
    return f"{prefix}.all_averagers"


def encode_donor(declaration: DonorDeclaration) -> bytes:
    """The value that the DHT stores."""
    return _encoder.encode(declaration)


def decode_donor(raw: object) -> DonorDeclaration:
    """What a donor declares, :data:`WITHDRAWN` if it shares nothing, whatever else it says then.

    :raises InvalidValueError: ``raw`` is no declaration; it comes from a stranger
    """
    if not isinstance(raw, bytes):
        raise InvalidValueError(f"a declaration is bytes, not {type(raw).__name__}")
    try:
        declaration = _decoder.decode(raw)
    except msgspec.DecodeError as e:
        raise InvalidValueError(f"not a declaration: {e}") from e
    if not math.isfinite(declaration.priority) or len(declaration.addresses) > MAX_ANNOUNCED:
        raise InvalidValueError("a declaration with a field out of bounds")
    for address in declaration.addresses:
        Multiaddr.parse(address)
    return declaration if declaration.sharing else WITHDRAWN
