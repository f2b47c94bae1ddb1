"""What codecs with statistics share: part of a tensor as finite float32 numbers. May touch CPU tensors only."""

from __future__ import annotations

import math

import torch

from shoal.errors import InvalidValueError

FLOAT32_MAX = torch.finfo(torch.float32).max


def finite_float32(part: torch.Tensor, codec: object) -> torch.Tensor:
    """The values of a part as float32: the part itself where it can be, else a copy.

    Infinities, and float64 values beyond float32, become the largest finite value of the part's dtype (of
    float32 for float64). One cheap pass where all is finite: a finite sum has only finite terms.

    :raises InvalidValueError: there is a NaN, for which ``codec`` has no code
    """
    return finite_and_sum(part, codec)[0]


def finite_and_sum(part: torch.Tensor, codec: object) -> tuple[torch.Tensor, float]:
    """As :func:`finite_float32`, and the sum of the values."""
    values = part.detach().to(torch.float32)
    total = values.sum().item()
    if math.isfinite(total):
        return values, total
    if bool(values.isnan().any()):
        raise InvalidValueError(
            f"the tensor has NaN among its values; {codec!r} encodes numbers and infinities only"
        )
    limit = min(torch.finfo(part.dtype).max, FLOAT32_MAX)
    values = values.clamp(-limit, limit)
    return values, values.sum(dtype=torch.float64).item()
