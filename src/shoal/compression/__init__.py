"""Tensor codecs: how tensors become bytes and back. See :mod:`shoal.compression.base` for what a codec is."""

from __future__ import annotations

from shoal.compression.adaptive import (
    AdaptiveCompressionBase,
    PerTensorCompression,
    RoleAdaptiveCompression,
    SizeAdaptiveCompression,
)
from shoal.compression.base import (
    CompressionBase,
    CompressionInfo,
    NoCompression,
    SerializedTensor,
    TensorRole,
)
from shoal.compression.floating import BFloat16Compression, Float16Compression, ScaledFloat16Compression
from shoal.compression.quantization import (
    BlockwiseQuantization,
    Quantile8BitQuantization,
    Quantization,
    Uniform8BitQuantization,
)
from shoal.compression.registry import (
    CodecRegistry,
    deserialize_tensor,
    get_codec,
    register_codec,
    serialize_tensor,
    user_codecs,
)

__all__ = [
    "CompressionBase",
    "CompressionInfo",
    "TensorRole",
    "NoCompression",
    "Float16Compression",
    "BFloat16Compression",
    "ScaledFloat16Compression",
    "Quantization",
    "Uniform8BitQuantization",
    "Quantile8BitQuantization",
    "BlockwiseQuantization",
    "AdaptiveCompressionBase",
    "PerTensorCompression",
    "RoleAdaptiveCompression",
    "SizeAdaptiveCompression",
    "SerializedTensor",
    "CodecRegistry",
    "register_codec",
    "get_codec",
    "user_codecs",
    "serialize_tensor",
    "deserialize_tensor",
]
