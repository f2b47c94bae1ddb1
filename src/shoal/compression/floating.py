"""Codecs that send each element as a shorter floating-point number. May touch CPU tensors only."""

from __future__ import annotations

import torch

from shoal.compression.base import CompressionBase, decode_raw, tensor_bytes

FLOAT16_MAX = torch.finfo(torch.float16).max


class Float16Compression(CompressionBase):
    """IEEE half precision: 2 bytes an element, relative error at most 2^-11, absolute error at most 2^-25
    near zero.

    Values beyond the range of half precision, infinities included, are clipped to +-65504, never sent as
    infinity. NaN stays NaN. Tensors that are float16 already pass unchanged.
    """

    compression_type = 1

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
        return values.to(dtype) if out is None else out.copy_(values)
