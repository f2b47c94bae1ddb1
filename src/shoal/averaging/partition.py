"""Tensors as one flat vector in an arena, the vector as spans of owners, the spans as parts. Pure.

The arena is a stretch of bytes that holds all tensors one after another. Consecutive tensors with the same
dtype and codec form a *section*, within which there are no gaps, so that a part may reach over the border of
two tensors; where the dtype changes, the next tensor begins at a multiple of 64 bytes. So a tensor's place does not
depend on codecs: memory can be laid out before it is known how tensors travel. Elements are numbered through all
sections. Each
member owns one contiguous *span* of elements (possibly none), and a *part* never crosses the border of a
section or a span.

Codecs that fit levels to the values they see must not see two tensors at once. Under such a codec a part is a row
of *segments*, one for each tensor that it reaches into.

A part is what members send, await and average in one go. Many small ones cost time for each, and a few large ones
keep owners waiting for the first of them. So uncompressed tensors are cut by the size of the span, within the limits
of :func:`_plain_part_nbytes`.

All of this follows from the schema, the members' sizes and ``part_size_bytes`` alone, so that every member computes
the same.
"""

from __future__ import annotations

import itertools
import math
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

from shoal.averaging.elements import Elements, elements_in
from shoal.averaging.formats import Format, format_of
from shoal.averaging.schema import TensorSchema
from shoal.errors import InvalidValueError
from shoal.utils.dtypes import DType

if TYPE_CHECKING:
    import torch

    from shoal.compression.base import CompressionBase

ALIGNMENT = 64
MAX_PARTS = 1 << 20
ENOUGH_PARTS = 12
"""Uncompressed parts are joined as long as a span has so many left:"""
MAX_JOINED = 4
"""so many at most,"""
MAX_JOINED_NBYTES = 1 << 21
"""and no more than so many bytes. Parts that are larger by themselves stay as they are, since peers take no payload
that is longer than the largest part."""
FEW_PARTS = 8
"""A span with fewer parts than this has smaller ones, if they are uncompressed,"""
LEAST_PART_NBYTES = 1 << 16
"""of so many bytes at least."""


@dataclass(frozen=True, slots=True)
class Section:
    """A maximal run of consecutive tensors of one dtype and codec.

    ``first_element`` counts elements of the flat vector, ``offset`` bytes of the arena, ``data_offset`` bytes
    of the vector's data (the arena without its gaps).
    """

    index: int
    format: Format
    first_element: int
    count: int
    offset: int
    data_offset: int

    @property
    def dtype(self) -> DType:
        return self.format.dtype

    @property
    def nbytes(self) -> int:
        return self.count * self.dtype.itemsize

    @property
    def end_element(self) -> int:
        return self.first_element + self.count


@dataclass(frozen=True, slots=True)
class TensorSlot:
    """Where one tensor lies in the arena: ``count`` elements from byte ``offset`` on."""

    shape: tuple[int, ...]
    dtype: DType
    count: int
    offset: int

    @property
    def nbytes(self) -> int:
        return self.count * self.dtype.itemsize


@dataclass(frozen=True)
class Layout:
    """Where each tensor lies in the arena."""

    slots: tuple[TensorSlot, ...]
    sections: tuple[Section, ...]

    @classmethod
    def from_schema(cls, schema: TensorSchema) -> Layout:
        slots: list[TensorSlot] = []
        sections: list[Section] = []
        element = data_offset = end = 0
        groups = itertools.groupby(schema.specs, key=lambda spec: (spec.dtype, spec.codec))
        for (dtype, wire_id), specs in groups:
            if not sections or sections[-1].dtype != dtype:
                end = -(-end // ALIGNMENT) * ALIGNMENT
            start = end
            for spec in specs:
                slots.append(TensorSlot(spec.shape, dtype, math.prod(spec.shape), end))
                end += slots[-1].nbytes
            count = (end - start) // dtype.itemsize
            sections.append(
                Section(len(sections), format_of(dtype, wire_id), element, count, start, data_offset)
            )
            element, data_offset = element + count, data_offset + end - start
        return cls(tuple(slots), tuple(sections))

    @classmethod
    def from_tensors(
        cls, tensors: Sequence[torch.Tensor], codecs: Sequence[CompressionBase] | None = None
    ) -> Layout:
        return cls.from_schema(TensorSchema.from_tensors(tensors, codecs))

    @cached_property
    def nbytes(self) -> int:
        """Size of an arena, a multiple of 64."""
        end = self.sections[-1].offset + self.sections[-1].nbytes if self.sections else 0
        return -(-end // ALIGNMENT) * ALIGNMENT

    @cached_property
    def data_nbytes(self) -> int:
        """Bytes of the tensors alone: what :func:`load_balance_peers` divides."""
        return sum(section.nbytes for section in self.sections)

    @cached_property
    def numel(self) -> int:
        return sum(section.count for section in self.sections)

    def part_in(self, memory: memoryview, part: Part) -> Elements:
        """A part's elements in the bytes of an arena."""
        return elements_in(memory, self.sections[part.section].dtype, part.count, part.offset)

    def is_plain(self, part: Part) -> bool:
        """Whether a part travels as the memory that it is, so that no codec need be asked."""
        return self.sections[part.section].format.is_plain

    def dtype_of(self, part: Part) -> DType:
        return self.sections[part.section].dtype

    def format_of(self, part: Part) -> Format:
        """How a part travels: as its section does, one segment at a time."""
        form = self.sections[part.section].format
        return form if len(part.segments) == 1 else form.in_segments(part.segments)

    @cached_property
    def tensor_ends(self) -> tuple[int, ...]:
        """Each tensor's end in the flat vector, in elements."""
        return tuple(itertools.accumulate(slot.count for slot in self.slots))

    def element_at(self, data_offset: int) -> int:
        """The element of the flat vector in which a byte of its data lies (``numel`` for the byte after the
        last).
        """
        starts = [section.data_offset for section in self.sections]
        section = self.sections[bisect_right(starts, data_offset) - 1]
        inside = min((data_offset - section.data_offset) // section.dtype.itemsize, section.count)
        return section.first_element + inside


@dataclass(frozen=True, slots=True)
class Span:
    """Elements ``start`` to ``stop`` (exclusive) of the flat vector; ``owner`` is a member's index in the
    group.
    """

    owner: int
    start: int
    stop: int

    @property
    def count(self) -> int:
        return self.stop - self.start


@dataclass(frozen=True, slots=True)
class Part:
    """What travels as one piece.

    :param index: its number, the same for every member; numbers follow the flat vector
    :param owner: index in the group of the member that averages it
    :param start: first element in the flat vector, ``count`` elements
    :param segments: elements of each piece that the codec encodes by itself; one for all under a codec that is
      :attr:`~shoal.compression.CompressionBase.elementwise`
    :param nbytes: on the wire, after the codec
    :param offset: first byte in the arena, ``memory_nbytes`` bytes
    """

    index: int
    owner: int
    section: int
    start: int
    count: int
    segments: tuple[int, ...]
    nbytes: int
    offset: int
    memory_nbytes: int


@dataclass(frozen=True)
class Partition:
    """The flat vector divided among the members of one group."""

    layout: Layout
    spans: tuple[Span, ...]
    parts: tuple[Part, ...]

    @classmethod
    def create(cls, layout: Layout, owned_nbytes: Sequence[int], part_size_bytes: int) -> Partition:
        """Divide a vector.

        :param owned_nbytes: for each member, the bytes that it owns: ``load_balance_peers(layout.data_nbytes,
          ...)``; borders are moved to the beginning of an element
        :param part_size_bytes: largest size of a part on the wire, but for uncompressed ones that are joined (a part
          has at least one element all the same)
        :raises InvalidValueError: the sizes do not sum to the vector's, or there would be more than 2^20
          parts
        """
        if sum(owned_nbytes) != layout.data_nbytes or any(size < 0 for size in owned_nbytes):
            raise InvalidValueError(
                f"owned_nbytes must be sizes of at least 0 whose sum is {layout.data_nbytes}, got {list(owned_nbytes)}"
            )
        if part_size_bytes < 1:
            raise InvalidValueError(f"part_size_bytes must be at least 1, got {part_size_bytes}")
        ends = [layout.element_at(end) for end in itertools.accumulate(owned_nbytes)] if layout.numel else []
        spans = tuple(
            Span(owner, start, stop) for owner, (start, stop) in enumerate(itertools.pairwise([0, *ends]))
        ) or tuple(Span(owner, 0, 0) for owner in range(len(owned_nbytes)))
        return cls(layout, spans, _cut(layout, spans, part_size_bytes))

    def parts_of(self, owner: int) -> tuple[Part, ...]:
        """The parts that a member averages, in order."""
        return self._by_owner[owner]

    @cached_property
    def _by_owner(self) -> tuple[tuple[Part, ...], ...]:
        lists: list[list[Part]] = [[] for _ in self.spans]
        for part in self.parts:
            lists[part.owner].append(part)
        return tuple(map(tuple, lists))


def _cut(layout: Layout, spans: Sequence[Span], part_size_bytes: int) -> tuple[Part, ...]:
    parts: list[Part] = []
    for span in spans:
        for section in layout.sections:
            start, stop = max(span.start, section.first_element), min(span.stop, section.end_element)
            if start >= stop:
                continue
            nbytes = part_size_bytes
            if section.format.is_plain:
                nbytes = _plain_part_nbytes((stop - start) * section.dtype.itemsize, part_size_bytes)
            largest = max(1, section.format.max_count(nbytes))
            cut = _whole if section.format.is_elementwise else _segmented
            if len(parts) + (stop - start) // largest > MAX_PARTS:
                raise _too_many_parts(layout, part_size_bytes)
            for segments in cut(layout, section, (start, stop), part_size_bytes, largest):
                if len(parts) == MAX_PARTS:
                    raise _too_many_parts(layout, part_size_bytes)
                parts.append(_part(section, span.owner, len(parts), start, segments))
                start = parts[-1].start + parts[-1].count
    return tuple(parts)


def _plain_part_nbytes(span_nbytes: int, limit: int) -> int:
    """How large parts of an uncompressed stretch are: ``limit``, larger if there are many, smaller if there are few."""
    joined = min(span_nbytes // (ENOUGH_PARTS * limit), MAX_JOINED, MAX_JOINED_NBYTES // limit)
    if joined > 1:
        return joined * limit
    shared = -(-span_nbytes // (FEW_PARTS * ALIGNMENT)) * ALIGNMENT
    return min(limit, max(LEAST_PART_NBYTES, shared))


def _too_many_parts(layout: Layout, part_size_bytes: int) -> InvalidValueError:
    return InvalidValueError(
        f"part_size_bytes must be large enough for {MAX_PARTS} parts to hold {layout.data_nbytes} bytes of tensors, "
        f"got {part_size_bytes}"
    )


def _whole(
    layout: Layout, section: Section, elements: tuple[int, int], part_size_bytes: int, largest: int
) -> Iterator[tuple[int, ...]]:
    """The segments of each part, one for each: borders of tensors do not matter."""
    start, stop = elements
    for first in range(start, stop, largest):
        yield (min(largest, stop - first),)


def _segmented(
    layout: Layout, section: Section, elements: tuple[int, int], part_size_bytes: int, largest: int
) -> Iterator[tuple[int, ...]]:
    """The segments of each part. A part is filled up to its limit, so that small tensors share one."""
    form = section.format
    position, stop = elements
    segments: list[int] = []
    room = part_size_bytes
    tensor = bisect_right(layout.tensor_ends, position)
    while position < stop:
        count = rest = min(layout.tensor_ends[tensor], stop) - position
        if not segments:
            count = min(rest, largest)
        elif form.encoded_nbytes(rest) > room:
            count = form.max_count(room) if room > 0 else 0
        if count:
            segments.append(count)
            position += count
            room -= form.encoded_nbytes(count)
        if count < rest:
            yield tuple(segments)
            segments, room = [], part_size_bytes
        else:
            tensor += 1
    if segments:
        yield tuple(segments)


def _part(section: Section, owner: int, index: int, start: int, segments: tuple[int, ...]) -> Part:
    itemsize = section.dtype.itemsize
    count = sum(segments)
    return Part(
        index=index,
        owner=owner,
        section=section.index,
        start=start,
        count=count,
        segments=segments,
        nbytes=sum(section.format.encoded_nbytes(segment) for segment in segments),
        offset=section.offset + (start - section.first_element) * itemsize,
        memory_nbytes=count * itemsize,
    )
