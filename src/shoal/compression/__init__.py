"""Tensor codecs: how tensors become bytes and back. See :mod:`shoal.compression.base` for what a codec is."""

from __future__ import annotations

from shoal.compression.base import (
    CompressionBase,
    CompressionInfo,
    NoCompression,
    SerializedTensor,
    TensorRole,
)
from shoal.compression.floating import Float16Compression
from shoal.compression.registry import (
    CodecRegistry,
    deserialize_tensor,
    get_codec,
    register_codec,
    serialize_tensor,
)
from shoal.utils.lazy import names_with_advice

__all__ = [
    "CompressionBase",
    "CompressionInfo",
    "TensorRole",
    "NoCompression",
    "Float16Compression",
    "SerializedTensor",
    "CodecRegistry",
    "register_codec",
    "get_codec",
    "serialize_tensor",
    "deserialize_tensor",
]

__getattr__ = names_with_advice(__name__)
