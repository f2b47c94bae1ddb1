"""A part that holds pieces of several tensors, each encoded on its own. May touch CPU tensors only.

Codecs with levels or scales fit them to the values that they see. Neighbours of other magnitudes would share them: a
bias of 0.01 beside a weight of 20 would be lost. So such a codec sees one tensor at a time.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from shoal.compression.base import CompressionBase


@dataclass(frozen=True)
class SegmentedCodec(CompressionBase):
    """``codec`` for a part that is cut into *segments*, whose encoded forms follow one another.

    It has no wire id of its own: peers agree on ``codec``, and the segments follow from the tensors' shapes.
    """

    codec: CompressionBase
    segments: tuple[int, ...]
    """Elements of each segment, at least one each."""

    def lossless(self, dtype: torch.dtype) -> bool:
        return self.codec.lossless(dtype)

    def encoded_nbytes(self, dtype: torch.dtype, count: int) -> int:
        return sum(self.codec.encoded_nbytes(dtype, segment) for segment in self.segments)

    def encode(self, part: torch.Tensor) -> memoryview:
        buffer = bytearray(self.encoded_nbytes(part.dtype, len(part)))
        for elements, place in self._places(part.dtype):
            buffer[place] = self.codec.encode_checked(part[elements])
        return memoryview(buffer)

    def _decode(
        self, data: memoryview, dtype: torch.dtype, count: int, out: torch.Tensor | None
    ) -> torch.Tensor:
        decoded = torch.empty(count, dtype=dtype) if out is None else out
        for elements, place in self._places(dtype):
            segment = decoded[elements]
            self.codec.decode(data[place], dtype, len(segment), segment)
        return decoded

    def _places(self, dtype: torch.dtype) -> Iterator[tuple[slice, slice]]:
        """Where each segment is, in elements of the part and in bytes of its encoded form."""
        sizes = [self.codec.encoded_nbytes(dtype, segment) for segment in self.segments]
        elements = itertools.pairwise(itertools.accumulate(self.segments, initial=0))
        places = itertools.pairwise(itertools.accumulate(sizes, initial=0))
        for (start, stop), (begin, end) in zip(elements, places, strict=True):
            yield slice(start, stop), slice(begin, end)

    def __repr__(self) -> str:
        return f"{self.codec!r} in {len(self.segments)} segments"
