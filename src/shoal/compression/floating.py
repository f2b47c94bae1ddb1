"""Codecs that send each element as a shorter floating-point number. May touch CPU tensors only."""

from __future__ import annotations

import numpy as np
import torch

from shoal.compression.base import CompressionBase, decode_raw, tensor_bytes
from shoal.compression.finite import FLOAT32_MAX, finite_and_sum
from shoal.errors import ProtocolViolation

FLOAT16_MAX = torch.finfo(torch.float16).max


class Float16Compression(CompressionBase):
    """Half precision (binary16 of IEEE 754-2008): 2 bytes an element, relative error at most 2^-11, absolute error at
    most 2^-25 near zero.

    Values beyond the range of half precision, infinities included, are clipped to +-65504, never sent as
    infinity. NaN stays NaN. Tensors that are float16 already pass unchanged.
    """

    compression_type = 1
    elementwise = True

    def lossless(self, dtype: torch.dtype) -> bool:
        return dtype == torch.float16

    def is_raw(self, dtype: torch.dtype) -> bool:
        return dtype == torch.float16

    def encoded_nbytes(self, dtype: torch.dtype, count: int) -> int:
        return 2 * count

    def encode(self, part: torch.Tensor) -> memoryview:
        if part.dtype == torch.float16:
            return tensor_bytes(part)
        # Clipping after rounding gives the same values as before it (what overflowed is infinite), and needs no copy.
        return tensor_bytes(part.detach().to(torch.float16).clamp_(-FLOAT16_MAX, FLOAT16_MAX))

    def _decode(
        self, data: memoryview, dtype: torch.dtype, count: int, out: torch.Tensor | None
    ) -> torch.Tensor:
        if dtype == torch.float16:
            return decode_raw(data, dtype, count, out)
        values = decode_raw(data, torch.float16, count, None)
        # All other dtypes reach farther than half precision: nothing can overflow here.
        return values.to(dtype) if out is None else out.copy_(values)


class BFloat16Compression(CompressionBase):
    """The upper half of float32 (Kalamkar et al. 2019, arXiv 1905.12322): 2 bytes an element, relative error at most
    2^-8 (2^-133 near zero, in any case).

    The range is that of float32. Values beyond it, infinities included, are clipped to +-3.39e38 (+-65280 for float16
    tensors, which could not hold the next one), never sent as infinity. NaN stays NaN. Tensors that are bfloat16
    already pass unchanged. Values that were sent as infinity or NaN, by a peer that breaks these rules, arrive as
    such, except that float16 tensors get +-65504 for infinities.
    """

    compression_type = 2
    elementwise = True

    def lossless(self, dtype: torch.dtype) -> bool:
        return dtype == torch.bfloat16

    def is_raw(self, dtype: torch.dtype) -> bool:
        return dtype == torch.bfloat16

    def encoded_nbytes(self, dtype: torch.dtype, count: int) -> int:
        return 2 * count

    def encode(self, part: torch.Tensor) -> memoryview:
        if part.dtype == torch.bfloat16:
            return tensor_bytes(part)
        # The largest bfloat16 that the receiver's dtype can hold; clipped after rounding, as above.
        limit = 65280.0 if part.dtype == torch.float16 else torch.finfo(torch.bfloat16).max
        return tensor_bytes(part.detach().to(torch.bfloat16).clamp_(-limit, limit))

    def _decode(
        self, data: memoryview, dtype: torch.dtype, count: int, out: torch.Tensor | None
    ) -> torch.Tensor:
        if dtype == torch.bfloat16:
            return decode_raw(data, dtype, count, out)
        values = decode_raw(data, torch.bfloat16, count, None)
        decoded = values.to(dtype) if out is None else out.copy_(values)
        return decoded.clamp_(-FLOAT16_MAX, FLOAT16_MAX) if dtype == torch.float16 else decoded


SCALED_BLOCK = 1 << 16
"""Elements with one mean and scale: the 8 bytes of both add a 16,000th, and a block stays in the cache."""

_HUGE = 2.0**126
"""Two values up to here differ by a number that float32 still has."""
_LEAST_SCALE = 2.0**-126
"""The smallest normal number of float32; the inverse of one below it may overflow."""

_STATISTICS = np.dtype([("centre", "<f4"), ("scale", "<f4")])


class ScaledFloat16Compression(CompressionBase):
    """Half precision around the mean of each block of 65,536 elements, scaled to the block's range: 2 bytes an element
    and 8 for each block.

    The idea is hivemind's, whose codec of this name takes mean and standard deviation along a tensor's last axis. Here
    the largest deviation is the scale, which spends the whole range of half precision and lets nothing overflow.

    The error of a value x in a block with mean m is at most 2^-11 |x - m| + 2^-21 (|x| + |m|), near the mean 2^-40 of
    the block's largest |x - m|, and never more than 2^-12 of that: no value overflows, none is too small. A constant
    block comes back exactly but for the rounding of the mean (2^-21). The mean is taken as 0 in blocks with values
    beyond 2^126.

    Infinities are clipped to the largest finite value of the tensor's dtype. NaN raises
    :class:`~shoal.errors.InvalidValueError`, since a block with it has no mean. float64 is rounded to float32 first;
    float16 and bfloat16 are rounded once more when they are decoded.
    """

    compression_type = 3

    def lossless(self, dtype: torch.dtype) -> bool:
        return False

    def encoded_nbytes(self, dtype: torch.dtype, count: int) -> int:
        return 2 * count + _STATISTICS.itemsize * -(-count // SCALED_BLOCK)

    def encode(self, part: torch.Tensor) -> memoryview:
        count = len(part)
        buffer = bytearray(self.encoded_nbytes(part.dtype, count))
        if count == 0:
            return memoryview(buffer)
        halves = torch.frombuffer(buffer, dtype=torch.float16, count=count)
        statistics = np.frombuffer(buffer, dtype="<f4", offset=2 * count).reshape(-1, 2)
        scratch = torch.empty(min(count, SCALED_BLOCK))
        for block, start in enumerate(range(0, count, SCALED_BLOCK)):
            values, total = finite_and_sum(part[start : start + SCALED_BLOCK], self)
            centre, scale = statistics[block] = _centre_and_scale(values, total / len(values))
            scaled = torch.sub(values, centre, out=scratch[: len(values)]).mul_(1 / scale)
            halves[start : start + SCALED_BLOCK].copy_(scaled)
        return memoryview(buffer)

    def _decode(
        self, data: memoryview, dtype: torch.dtype, count: int, out: torch.Tensor | None
    ) -> torch.Tensor:
        decoded = torch.empty(count, dtype=dtype) if out is None else out
        statistics = np.frombuffer(data, dtype=_STATISTICS, offset=2 * count)
        centres, scales = statistics["centre"].astype(np.float32), statistics["scale"].astype(np.float32)
        if not (np.isfinite(centres).all() and np.isfinite(scales).all() and (scales > 0).all()):
            raise ProtocolViolation(f"{self!r}: the mean or the scale of a block is impossible")
        halves = decode_raw(data[: 2 * count], torch.float16, count, None)
        limit = min(torch.finfo(dtype).max, FLOAT32_MAX)
        for index, start in enumerate(range(0, count, SCALED_BLOCK)):
            centre, scale = centres[index].item(), scales[index].item()
            block = halves[start : start + SCALED_BLOCK].to(torch.float32).mul_(scale).add_(centre)
            # No number of half precision reaches 2^16. Most blocks cannot overflow, and need no clipping.
            if abs(centre) + 2**16 * scale > limit:
                block.clamp_(-limit, limit)
            decoded[start : start + SCALED_BLOCK].copy_(block)
        return decoded


def _centre_and_scale(values: torch.Tensor, mean: float) -> tuple[float, float]:
    """A block's centre, and what takes its largest deviation to the end of half precision, as float32 numbers."""
    low, high = (extreme.item() for extreme in torch.aminmax(values))
    # Deviations from the mean of huge values might overflow.
    centre = _float32(min(max(mean, low), high)) if max(-low, high) <= _HUGE else 0.0
    # The largest number of half precision is at the end of its binade, where the relative error is the least.
    return centre, _float32(max(max(high - centre, centre - low) / FLOAT16_MAX, _LEAST_SCALE))


def _float32(value: float) -> float:
    return float(np.float32(value))
