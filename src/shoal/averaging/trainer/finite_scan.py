"""Looks for NaN and infinity in a snapshot while it is taken: right behind the copies, where the cache still has what
they wrote, so that memory is read once and not twice.

Never uses torch's intra-op thread pool, which the trainer needs.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from shoal.averaging.partition import Layout, Section
from shoal.compression.base import UINT8, tensor_array

BLOCK_NBYTES = 1 << 19
"""The least that is looked at in one go, except for the end of a section: tensors may be far smaller."""
MOST_NBYTES = 1 << 22
"""The most: looking at halves takes as much memory besides."""

_WIDE: dict[torch.dtype, np.dtype[Any]] = {torch.float32: np.dtype("f4"), torch.float64: np.dtype("f8")}
_INFINITY = {torch.float16: 0x7C00, torch.bfloat16: 0x7F80}
"""Its bits; those of NaN are greater. The highest bit is the sign."""
_WITHOUT_SIGN = np.uint16(0x7FFF)


class FiniteScan:
    """Follows the copies through an area; call :meth:`follow` after each of them, and :meth:`finish` once.

    :param area: one-dimensional, uint8, ``layout.nbytes`` long; filled from its beginning to its end
    """

    def __init__(self, layout: Layout, area: torch.Tensor) -> None:
        self._layout = layout
        self._memory = tensor_array(area, UINT8)
        self._sections = iter(layout.sections)
        self._section = next(self._sections, None)
        self._start = 0
        """What lies before was looked at."""
        self._found: int | None = None

    def follow(self, stop: int) -> None:
        """The first ``stop`` bytes are filled."""
        while self._section is not None:
            section, start = self._section, max(self._start, self._section.offset)
            end = min(stop, start + MOST_NBYTES, section.offset + section.nbytes)
            is_whole = end == section.offset + section.nbytes
            if end - start < BLOCK_NBYTES and not is_whole:
                return
            values = self._values(section, start, end)
            if not _is_finite(values, section.dtype.torch_dtype):
                self._found, self._section = self._locate(section, start, end), None
                return
            self._start = start + values.nbytes
            if is_whole:
                self._section = next(self._sections, None)

    def finish(self) -> int | None:
        """All is filled: the index of the first tensor that has NaN or infinite elements, or None."""
        self.follow(self._layout.nbytes)
        return self._found

    def _locate(self, section: Section, start: int, end: int) -> int:
        values = torch.from_numpy(self._values(section, start, end))
        element = int(values.view(section.dtype.torch_dtype).isfinite().logical_not().nonzero()[0])
        place = start + element * section.dtype.itemsize
        return bisect_right(self._layout.slots, place, key=lambda slot: slot.offset) - 1

    def _values(self, section: Section, start: int, end: int) -> npt.NDArray[Any]:
        """The whole elements between two bytes; of two bytes each as integers."""
        dtype = _WIDE.get(section.dtype.torch_dtype, np.dtype("u2"))
        end -= (end - start) % dtype.itemsize
        return self._memory[start:end].view(dtype)


def _is_finite(values: npt.NDArray[Any], dtype: torch.dtype) -> bool:
    if len(values) == 0:
        return True
    if dtype in _WIDE:
        # A sum that is finite has only finite terms. np.sum takes three times as long.
        return math.isfinite(np.einsum("i->", values)) or bool(np.isfinite(values).all())
    return bool((values & _WITHOUT_SIGN).max() < _INFINITY[dtype])
