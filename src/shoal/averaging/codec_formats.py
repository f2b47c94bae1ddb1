"""Formats of codecs: numpy's arrays on one side, torch's tensors on the other, in the same memory."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from shoal.averaging.elements import Elements, elements_in
from shoal.averaging.formats import Bytes, Format, PlainFormat
from shoal.averaging.halves import as_tensor
from shoal.compression.base import CompressionBase, NoCompression, tensor_bytes
from shoal.compression.registry import get_codec
from shoal.compression.segments import SegmentedCodec
from shoal.utils.dtypes import DType


@dataclass(frozen=True)
class CodecFormat:
    """See :class:`~shoal.averaging.formats.Format`."""

    dtype: DType
    codec: CompressionBase
    is_plain: ClassVar[bool] = False

    @property
    def wire_id(self) -> int:
        return self.codec.compression_type

    @property
    def is_raw(self) -> bool:
        return self.codec.is_raw(self.dtype.torch_dtype)

    @property
    def is_lossless(self) -> bool:
        return self.codec.lossless(self.dtype.torch_dtype)

    @property
    def is_elementwise(self) -> bool:
        return self.codec.elementwise

    def encoded_nbytes(self, count: int) -> int:
        return self.codec.encoded_nbytes(self.dtype.torch_dtype, count)

    def max_count(self, nbytes: int) -> int:
        return self.codec.max_count(self.dtype.torch_dtype, nbytes)

    def encode(self, values: Elements) -> memoryview:
        return self.codec.encode_checked(as_tensor(values, self.dtype))

    def decode(self, data: Bytes, count: int, out: Elements | None = None) -> Elements:
        target = None if out is None else as_tensor(out, self.dtype)
        decoded = self.codec.decode(data, self.dtype.torch_dtype, count, target)
        if out is not None:
            return out
        if count == 0:
            return np.empty(0)
        return elements_in(tensor_bytes(decoded.resolve_neg().contiguous()), self.dtype)

    def in_segments(self, segments: tuple[int, ...]) -> CodecFormat:
        return CodecFormat(self.dtype, SegmentedCodec(self.codec, segments))

    def __str__(self) -> str:
        return f"{self.dtype} with {self.codec!r}"


def format_by(dtype: DType, codec: CompressionBase) -> Format:
    """The format for a codec itself, with its own settings."""
    # Not of subclasses: users' codecs may do more than what they inherit.
    return PlainFormat(dtype) if type(codec) is NoCompression else CodecFormat(dtype, codec)


def registered(dtype: DType, wire_id: int) -> CodecFormat:
    """See :func:`shoal.averaging.formats.format_of`."""
    return CodecFormat(dtype, get_codec(wire_id))
