"""Looks for NaN and infinity in a snapshot while it is taken: right behind the copies, where the cache still has what
they wrote, so that memory is read once and not twice.

Never uses torch's intra-op thread pool, which the trainer needs.
"""

from __future__ import annotations

from bisect import bisect_right

import torch

from shoal.averaging.elements import elements_in, is_finite
from shoal.averaging.partition import Layout, TensorSlot
from shoal.compression.base import tensor_bytes
from shoal.utils.dtypes import DType

BLOCK_NBYTES = 1 << 19
"""The least that is looked at in one go, except for the end of a section: tensors may be far smaller."""
MOST_NBYTES = 1 << 22
"""The most: looking at halves takes as much memory besides."""


class FiniteScan:
    """Follows the copies through an area; call :meth:`follow` after each of them, and :meth:`finish` once.

    :param area: one-dimensional, uint8, ``layout.nbytes`` long; filled from its beginning to its end
    """

    def __init__(self, layout: Layout, area: torch.Tensor) -> None:
        self._layout = layout
        self._memory = tensor_bytes(area)
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
            end -= (end - start) % section.dtype.itemsize
            if not self._is_finite(section.dtype, start, end):
                self._found, self._section = self._locate(section.dtype, start, end), None
                return
            self._start = end
            if is_whole:
                self._section = next(self._sections, None)

    def finish(self) -> int | None:
        """All is filled: the index of the first tensor that has NaN or infinite elements, or None."""
        self.follow(self._layout.nbytes)
        return self._found

    def _is_finite(self, dtype: DType, start: int, end: int) -> bool:
        """Of the elements between two bytes, in one go: each look costs a few calls (:mod:`.chunk_size`)."""
        count = (end - start) // dtype.itemsize
        return is_finite(elements_in(self._memory, dtype, count, start), dtype, at_once=max(1, count))

    def _locate(self, dtype: DType, start: int, end: int) -> int:
        """The first tensor with such elements between two bytes, where there are some."""
        slots = self._layout.slots
        index = bisect_right(slots, start, key=lambda slot: slot.offset) - 1
        while self._is_finite(dtype, max(start, slots[index].offset), min(end, _end(slots[index]))):
            index += 1
        return index


def _end(slot: TensorSlot) -> int:
    return slot.offset + slot.nbytes
