"""Elements of tensors in the CPU's memory as numpy arrays, and the few things that numpy cannot do with them.

float32 and float64 are arrays of just that. numpy has no bfloat16, and takes 20 times as long as torch to convert
float16: both are arrays of their bits (uint16), which are *widened* before anything is computed with them, and
*narrowed* afterwards. Only that imports torch.
"""

from __future__ import annotations

import math
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from shoal.utils.dtypes import BFLOAT16, FLOAT16, FLOAT32, FLOAT64, DType

Elements: TypeAlias = npt.NDArray[Any]
"""One-dimensional and contiguous: float32, float64, or the bits of halves as uint16."""

_STORED_AS = {FLOAT16: np.uint16, BFLOAT16: np.uint16, FLOAT32: np.float32, FLOAT64: np.float64}
_EXPONENT_BITS = {FLOAT16: np.uint16(0x7C00), BFLOAT16: np.uint16(0x7F80)}
"""All of them are set in NaN and in infinities, and in nothing else."""
_LARGEST = {
    FLOAT16: 65504.0,
    BFLOAT16: 2.0**127 * (2 - 2.0**-7),
    FLOAT32: float(np.finfo(np.float32).max),
    FLOAT64: float(np.finfo(np.float64).max),
}
_PIECE = 1 << 16
"""Elements that are looked at in one go: so few that what is noted of them stays in the cache."""


def elements_in(
    memory: memoryview | bytes | bytearray, dtype: DType, count: int = -1, offset: int = 0
) -> Elements:
    """A view of ``count`` elements (all, by default) from byte ``offset`` on."""
    return np.frombuffer(memory, _STORED_AS[dtype], count, offset)


def empty(dtype: DType, count: int) -> Elements:
    """Memory for elements."""
    return np.empty(count, _STORED_AS[dtype])


def is_native(dtype: DType) -> bool:
    """Whether the elements are numbers to numpy, and not bits."""
    return dtype not in _EXPONENT_BITS


def largest(dtype: DType) -> float:
    """The largest finite number."""
    return _LARGEST[dtype]


def widen(values: Elements, dtype: DType, out: Elements) -> None:
    """Write elements of ``dtype`` to an array of float32 or float64 that is at least as wide."""
    if is_native(dtype):
        np.copyto(out, values)
    else:
        from shoal.averaging import halves

        halves.widen(values, dtype, out)


def narrow(values: Elements, dtype: DType, out: Elements) -> None:
    """Write float32 or float64 to elements of ``dtype``, each rounded to the nearest; beyond the range to infinity."""
    if is_native(dtype):
        np.copyto(out, values, casting="same_kind")
    else:
        from shoal.averaging import halves

        halves.narrow(values, dtype, out)


def is_finite(values: Elements, dtype: DType, at_once: int = _PIECE) -> bool:
    """Whether there is neither NaN nor an infinity. So many elements are looked at in one go."""
    exponent = _EXPONENT_BITS.get(dtype)
    for start in range(0, len(values), at_once):
        piece = values[start : start + at_once]
        if exponent is None and math.isfinite(np.einsum("i->", piece)):
            continue  # a sum that is finite has only finite terms, and takes less time
        finite = np.isfinite(piece) if exponent is None else (piece & exponent) != exponent
        if not finite.all():
            return False
    return True
