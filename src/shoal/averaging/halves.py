"""Conversions of float16 and bfloat16, by torch: numpy is slow with the one and does not know the other."""

from __future__ import annotations

import torch

from shoal.averaging.elements import Elements
from shoal.utils.dtypes import DType


def widen(values: Elements, dtype: DType, out: Elements) -> None:
    """See :func:`shoal.averaging.elements.widen`."""
    torch.from_numpy(out).copy_(as_tensor(values, dtype))


def narrow(values: Elements, dtype: DType, out: Elements) -> None:
    """See :func:`shoal.averaging.elements.narrow`."""
    as_tensor(out, dtype).copy_(torch.from_numpy(values))


def as_tensor(values: Elements, dtype: DType) -> torch.Tensor:
    """Elements as a tensor, in the same memory."""
    return torch.from_numpy(values).view(dtype.torch_dtype)
