"""How far apart the members of a group were before a round: an estimate from a sample of elements. Pure.

Each owner looks at a block of elements in some of the parts that it averages; that costs about one percent of the
reduction, and no pass over the data of its own. Only what arrived and was averaged counts.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from shoal.averaging.elements import Elements, empty, widen
from shoal.utils.dtypes import FLOAT64, DType

BLOCK = 4096
"""Elements in a row that are looked at in a part; all of a smaller one."""
SPARSEST = 32
"""In a long span, one part of so many is looked at."""
FEWEST_PARTS = 8
"""In a short one, so many if it has them."""
_STRIDE = 0x9E3779B1
"""Of the places of blocks: the golden ratio's multiple of 2^32 spreads them over the parts."""


class SpreadSample:
    """The sums over what was looked at in one span of ``part_count`` parts."""

    def __init__(self, part_count: int) -> None:
        self._every = max(1, min(SPARSEST, part_count // FEWEST_PARTS))
        self._distance = self._average = 0.0
        self._elements = 0

    def wants(self, index: int) -> bool:
        """Whether the ``index``-th part of the span is in the sample."""
        return index % self._every == 0

    @np.errstate(all="ignore")
    def add(self, index: int, parts: Sequence[Elements], average: Elements, dtype: DType) -> None:
        """The senders' versions of a part, and their average; all finite, of one dtype and count."""
        count = min(BLOCK, len(average))
        start = index * _STRIDE % (1 << 32) * (len(average) - count) >> 32
        block, distance = empty(FLOAT64, count), empty(FLOAT64, count)
        widen(average[start : start + count], dtype, block)
        self._average += float(np.dot(block, block))
        for part in parts:
            widen(part[start : start + count], dtype, distance)
            distance -= block
            self._distance += float(np.dot(distance, distance)) / len(parts)
        self._elements += count

    def total(self, elements: int) -> tuple[float | None, float | None]:
        """Scaled to a span of so many elements: the members' mean squared distance from the average, summed over
        elements, and the sum of the average's squares. None: beyond the range of float64, or nothing was sampled.
        """
        if not self._elements:
            return (None, None)
        scale = elements / self._elements
        sums = (self._distance * scale, self._average * scale)
        return sums if all(map(math.isfinite, sums)) else (None, None)
