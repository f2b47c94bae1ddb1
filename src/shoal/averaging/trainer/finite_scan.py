"""Looks for NaN and infinity in a snapshot while it is taken: right behind the copies, where the cache still has what
they wrote, so that memory is read once and not twice.

Never uses torch's intra-op thread pool, which the trainer needs.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import torch

from shoal.averaging.partition import Layout, Section
from shoal.compression.base import tensor_array
from shoal.compression.finite import is_finite

BLOCK_NBYTES = 1 << 19
"""What is looked at in one go: it fits the cache, and tensors may be far smaller."""
SINGLE_THREADED_ELEMENTS = 1 << 15
"""The most elements for which torch does not wake its intra-op threads."""

_NUMPY: dict[torch.dtype, np.dtype[Any]] = {torch.float32: np.dtype("f4"), torch.float64: np.dtype("f8")}


class _Block(NamedTuple):
    """A stretch of the area, in bytes, within one section."""

    section: Section
    start: int
    stop: int


class FiniteScan:
    """Follows the copies through an area; call :meth:`follow` after each of them, and :meth:`finish` once.

    :param area: one-dimensional, uint8, ``layout.nbytes`` long; filled from its beginning to its end
    """

    def __init__(self, layout: Layout, area: torch.Tensor) -> None:
        self._layout = layout
        self._area = area
        self._blocks = _blocks(layout)
        self._next = next(self._blocks, None)
        self._found: int | None = None

    def follow(self, stop: int) -> None:
        """The first ``stop`` bytes are filled."""
        while self._next is not None and self._next.stop <= stop:
            if not self._is_finite(self._next):
                self._found, self._next = self._locate(self._next), None
                return
            self._next = next(self._blocks, None)

    def finish(self) -> int | None:
        """All is filled: the index of the first tensor that has NaN or infinite elements, or None."""
        self.follow(self._layout.nbytes)
        return self._found

    def _is_finite(self, block: _Block) -> bool:
        values = self._values(block)
        numpy_type = _NUMPY.get(values.dtype)
        if numpy_type is None:
            size = SINGLE_THREADED_ELEMENTS
            return all(is_finite(values[start : start + size]) for start in range(0, len(values), size))
        array = tensor_array(values, numpy_type)
        # A sum that is finite has only finite terms. np.sum takes three times as long.
        return math.isfinite(np.einsum("i->", array)) or bool(np.isfinite(array).all())

    def _locate(self, block: _Block) -> int:
        element = int(self._values(block).isfinite().logical_not().nonzero()[0])
        place = block.start + element * block.section.dtype.itemsize
        return bisect_right(self._layout.slots, place, key=lambda slot: slot.offset) - 1

    def _values(self, block: _Block) -> torch.Tensor:
        return self._area[block.start : block.stop].view(block.section.dtype.torch_dtype)


def _blocks(layout: Layout) -> Iterator[_Block]:
    for section in layout.sections:
        end = section.offset + section.nbytes
        for start in range(section.offset, end, BLOCK_NBYTES):
            yield _Block(section, start, min(start + BLOCK_NBYTES, end))
