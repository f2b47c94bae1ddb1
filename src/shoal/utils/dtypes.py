"""The dtypes of tensors, by their names on the wire.

Most of what handles tensors needs only the name and the size of their elements. A process that does nothing else
never imports torch, which takes seconds and 140 MB.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, slots=True)
class DType:
    """A dtype of torch.

    :param name: as in ``torch.float32``
    :param itemsize: bytes of an element
    :param is_floating: whether its elements are real floating-point numbers
    """

    name: str
    itemsize: int
    is_floating: bool = False

    @property
    def torch_dtype(self) -> torch.dtype:
        """Torch's object for it; imports torch."""
        return _torch_dtype(self.name)

    def __str__(self) -> str:
        return self.name


@functools.cache
def _torch_dtype(name: str) -> torch.dtype:
    import torch

    dtype: torch.dtype = getattr(torch, name)
    return dtype


FLOAT16 = DType("float16", 2, is_floating=True)
BFLOAT16 = DType("bfloat16", 2, is_floating=True)
FLOAT32 = DType("float32", 4, is_floating=True)
FLOAT64 = DType("float64", 8, is_floating=True)
UINT8 = DType("uint8", 1)
BOOL = DType("bool", 1)

AVERAGED: dict[str, DType] = {dtype.name: dtype for dtype in (FLOAT16, BFLOAT16, FLOAT32, FLOAT64)}
"""The dtypes that can be averaged."""

_OTHERS = (
    UINT8,
    DType("int8", 1),
    DType("int16", 2),
    DType("int32", 4),
    DType("int64", 8),
    BOOL,
    DType("complex64", 8),
    DType("complex128", 16),
    DType("uint16", 2),
    DType("uint32", 4),
    DType("uint64", 8),
)
DTYPES: dict[str, DType] = {**AVERAGED, **{dtype.name: dtype for dtype in _OTHERS}}
"""The dtypes that a state may have."""


def dtype_of(tensor: torch.Tensor) -> DType:
    """That of a tensor.

    :raises KeyError: none of :data:`DTYPES`
    """
    return DTYPES[name_of(tensor.dtype)]


def name_of(dtype: torch.dtype) -> str:
    """Its name on the wire, such as ``"float32"``; also of dtypes that are not in :data:`DTYPES`."""
    return str(dtype).removeprefix("torch.")
