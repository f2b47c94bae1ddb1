"""How the elements of one dtype travel: as the memory that they are, or through a codec.

Codecs are torch's business. What travels as it is, which is the default, needs none and imports none.
"""

from __future__ import annotations

import importlib
import sys
from dataclasses import dataclass
from typing import ClassVar, Protocol

from shoal.averaging.elements import Elements, elements_in
from shoal.errors import ProtocolViolation
from shoal.utils.dtypes import DType

PLAIN_ID = 0
"""The wire id of :class:`~shoal.compression.NoCompression`."""

_NAMES = {
    PLAIN_ID: "NoCompression",
    1: "Float16Compression",
    2: "BFloat16Compression",
    3: "ScaledFloat16Compression",
    4: "Uniform8BitQuantization",
    5: "Quantile8BitQuantization",
    6: "BlockwiseQuantization",
}
"""Shoal's own codecs by wire id: what a peer without codecs of its own can say of those of others."""

Bytes = bytes | bytearray | memoryview


class Format(Protocol):
    """A dtype, and what becomes of its elements on the wire. Sizes follow from their number alone."""

    @property
    def dtype(self) -> DType: ...
    @property
    def wire_id(self) -> int:
        """That of the codec."""
        ...

    @property
    def is_plain(self) -> bool:
        """Whether no codec need be asked: elements travel as the memory that they are."""
        ...

    @property
    def is_raw(self) -> bool:
        """Whether they do so, though a codec may check them: they can be received in place."""
        ...

    @property
    def is_lossless(self) -> bool:
        """Whether finite elements come back bit for bit."""
        ...

    @property
    def is_elementwise(self) -> bool:
        """Whether elements of several tensors may be encoded together."""
        ...

    def encoded_nbytes(self, count: int) -> int:
        """Bytes that ``count`` elements take."""
        ...

    def max_count(self, nbytes: int) -> int:
        """The most elements that take no more than ``nbytes``; 0 if not even one does."""
        ...

    def encode(self, values: Elements) -> memoryview:
        """What is sent of elements; it may be their own memory.

        :raises UsageError: the codec, one of the user's own, failed, or made another size than it says
        """
        ...

    def decode(self, data: Bytes, count: int, out: Elements | None = None) -> Elements:
        """What another peer sent, in ``out`` if it is given.

        :raises ProtocolViolation: it is no such thing
        :raises UsageError: the codec, one of the user's own, made something else of it
        """
        ...

    def in_segments(self, segments: tuple[int, ...]) -> Format:
        """The format of elements that are encoded in pieces of so many."""
        ...


@dataclass(frozen=True, slots=True)
class PlainFormat:
    """The memory itself."""

    dtype: DType
    wire_id: ClassVar[int] = PLAIN_ID
    is_plain: ClassVar[bool] = True
    is_raw: ClassVar[bool] = True
    is_lossless: ClassVar[bool] = True
    is_elementwise: ClassVar[bool] = True

    def encoded_nbytes(self, count: int) -> int:
        return count * self.dtype.itemsize

    def max_count(self, nbytes: int) -> int:
        return nbytes // self.dtype.itemsize

    def encode(self, values: Elements) -> memoryview:
        return values.data.cast("B")

    def decode(self, data: Bytes, count: int, out: Elements | None = None) -> Elements:
        if len(data) != self.encoded_nbytes(count):
            raise ProtocolViolation(f"{count} elements of {self.dtype} are not {len(data)} bytes")
        values = elements_in(data, self.dtype, count)
        if out is None:
            return values
        out[:] = values
        return out

    def in_segments(self, segments: tuple[int, ...]) -> PlainFormat:
        return self

    def __str__(self) -> str:
        return f"{self.dtype} as it is"


def prepare_codecs() -> None:
    """Import what :func:`format_of` needs for codecs, and torch with it: for a thread, since that takes seconds."""
    importlib.import_module("shoal.averaging.codec_formats")


def format_of(dtype: DType, wire_id: int) -> Format:
    """The format for the codec with this wire id.

    :raises ProtocolViolation: there is none
    """
    if wire_id == PLAIN_ID:
        return PlainFormat(dtype)
    from shoal.averaging import codec_formats

    return codec_formats.registered(dtype, wire_id)


def codec_name(wire_id: int) -> str | None:
    """The class of the codec with this wire id, as far as this process knows it."""
    registry = sys.modules.get("shoal.compression.registry")  # there if users' codecs are
    if registry is not None and wire_id in registry.CODECS:
        return type(registry.CODECS.codec(wire_id)).__name__
    return _NAMES.get(wire_id)
