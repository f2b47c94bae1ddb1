"""What the codecs' docstrings promise, as numbers: how far a value may be off after its journey."""

from __future__ import annotations

from collections.abc import Callable

import torch

from shoal.compression import (
    BFloat16Compression,
    BlockwiseQuantization,
    CompressionBase,
    Float16Compression,
    Quantile8BitQuantization,
    ScaledFloat16Compression,
    Uniform8BitQuantization,
)
from shoal.errors import InvalidTypeError

_ROUNDING = {
    torch.float16: 2.0**-11,
    torch.bfloat16: 2.0**-8,
    torch.float32: 2.0**-24,
    torch.float64: 2.0**-24,
}


def error_bound(codec: CompressionBase, values: torch.Tensor) -> torch.Tensor:
    """The largest error of each element that ``codec`` may make, as float64.

    :param values: one-dimensional, finite, within the codec's range; any floating dtype
    """
    wide = values.double()
    if codec.lossless(values.dtype) or not len(values):
        return torch.zeros_like(wide)
    bound = _bound(codec, wide)
    info = torch.finfo(values.dtype)
    # The result has the tensor's own dtype.
    return bound + _ROUNDING[values.dtype] * (wide.abs() + bound) + info.smallest_normal * info.eps


def _bound(codec: CompressionBase, wide: torch.Tensor) -> torch.Tensor:
    match codec:
        case Float16Compression():
            return torch.clamp(wide.abs() * 2**-11, min=2**-25)
        case BFloat16Compression():
            return torch.clamp(wide.abs() * 2**-8, min=2**-133)
        case ScaledFloat16Compression():
            return _by_piece(_scaled, wide, 1 << 16)
        case Uniform8BitQuantization():
            return _by_piece(_uniform, wide, 1 << 18)
        case Quantile8BitQuantization():
            return _by_piece(_quantile, wide, 1 << 19)
        case BlockwiseQuantization():
            return _by_piece(_blockwise, wide, 4096)
    raise InvalidTypeError(f"no bound is known for {codec!r}; it is known for Shoal's own plain codecs")


def _by_piece(bound: Callable[[torch.Tensor], torch.Tensor], wide: torch.Tensor, size: int) -> torch.Tensor:
    return torch.cat([bound(wide[start : start + size]) for start in range(0, len(wide), size)])


def _scaled(block: torch.Tensor) -> torch.Tensor:
    mean = block.mean() if block.abs().max() <= 2.0**126 else torch.zeros((), dtype=block.dtype)
    deviations = (block - mean).abs()
    return torch.clamp(deviations * 2**-11, min=float(deviations.max()) * 2**-40) + 2**-21 * (
        block.abs() + mean.abs()
    )


def _uniform(chunk: torch.Tensor) -> torch.Tensor:
    """The range of all but the outliers is not larger than that of all."""
    return (chunk.max() - chunk.min()) * (1 / 508 + 2**-16) + 2**-22 * chunk.abs()


def _quantile(chunk: torch.Tensor) -> torch.Tensor:
    if len(chunk) <= 256:
        return torch.zeros_like(chunk)
    return ((chunk.max() - chunk.min()) / 16).expand_as(chunk) + 2**-22 * chunk.abs()


def _blockwise(block: torch.Tensor) -> torch.Tensor:
    largest = block.abs().max()
    share = 1 / 120 if largest > 6 * block.square().mean().sqrt() else 1 / 160
    return (largest * share + 2**-134).expand_as(block)
