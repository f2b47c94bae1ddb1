"""Small tensors, several at a time: to copy, compare and write each by itself takes far longer than its bytes do.

Never uses torch's intra-op thread pool, which the trainer needs.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import groupby
from typing import NamedTuple

import numpy as np
import torch

from shoal.averaging.partition import Layout, TensorSlot
from shoal.averaging.trainer.chunk_size import ChunkSize
from shoal.averaging.trainer.lost_updates import counts_of_updates
from shoal.averaging.trainer.merging import BITS, Bits
from shoal.compression.base import borrowed_array

SMALL_NBYTES = 1 << 14
"""A larger tensor loses by company: its elements are copied once more, to be compared. Nor has a small one more
elements than torch copies on one thread."""

_address = torch.Tensor.data_ptr

SMALLER = 2
"""A batch is so much smaller than a chunk of one tensor, since others may do something to any of its tensors meanwhile,
without the lock."""


@dataclass(frozen=True)
class Run:
    """Consecutive tensors of one dtype, which lie in the arena without gaps: one of any size, or several small ones.

    ``first`` is the index of the first tensor.
    """

    first: int
    slots: tuple[TensorSlot, ...]

    @cached_property
    def indices(self) -> range:
        return range(self.first, self.first + len(self.slots))

    def part(self, start: int, stop: int) -> Run:
        """Some of its tensors, counted from its own first one."""
        return Run(self.first + start, self.slots[start:stop])

    @cached_property
    def whole(self) -> TensorSlot:
        """Where all of them lie in the arena, as if they were one flat tensor."""
        count = sum(slot.count for slot in self.slots)
        return replace(self.slots[0], shape=(count,), count=count)

    @cached_property
    def ends(self) -> list[int]:
        """Where each tensor ends in the arena, in bytes."""
        return [slot.offset + slot.nbytes for slot in self.slots]


def runs_of(layout: Layout) -> Iterator[Run]:
    """All tensors, in order."""
    first, slots = 0, layout.slots
    for index in range(1, len(slots) + 1):
        if index == len(slots) or not _go_together(slots[index - 1], slots[index]):
            yield Run(first, slots[first:index])
            first = index


def _go_together(last: TensorSlot, new: TensorSlot) -> bool:
    return max(last.nbytes, new.nbytes) <= SMALL_NBYTES and new.dtype == last.dtype


@dataclass(frozen=True)
class Batch:
    """Tensors that are copied in one go: a part of a run."""

    run: Run
    tensors: Sequence[torch.Tensor]
    flats: list[torch.Tensor]
    """The bits of each, flat, in its own memory, which they do not keep alive."""
    memory: list[torch.Tensor]
    """This does, whatever others make of ``tensor.data`` meanwhile."""

    def is_there(self) -> bool:
        """Whether the tensors lie there still. A storage may move at any time: ``share_memory_()``, for a queue."""
        return list(map(_address, self.tensors)) == list(map(_address, self.flats))

    def counts_of_updates(self) -> list[int]:
        """As :func:`.lost_updates.counts_of_updates`."""
        return counts_of_updates(self.tensors)

    def gather(self, target: Bits) -> None:
        """Copy the tensors to where they lie together."""
        torch.cat(self.flats, out=torch.from_numpy(target))

    def scatter(self, source: Bits) -> None:
        """The way back."""
        counts = [slot.count for slot in self.run.slots]
        torch._foreach_copy_(self.flats, torch.split_with_sizes(torch.from_numpy(source), counts))

    def slices(self) -> Iterator[slice]:
        """The elements of each tensor, among those of all."""
        start = 0
        for slot in self.run.slots:
            yield slice(start, start + slot.count)
            start += slot.count


class Located(NamedTuple):
    """A run, and where the bits of its tensors are."""

    run: Run
    flats: list[torch.Tensor]
    """As of a :class:`Batch`; none where a tensor has to be copied by itself, since it has gaps or is not on the CPU,
    or is the only one.
    """

    def batches(self, tensors: Sequence[torch.Tensor], size: ChunkSize) -> Iterator[Batch]:
        """All of them, in order."""
        run, start = self.run, 0
        while start < len(self.flats):
            nbytes = size.next() // SMALLER
            stop = max(start + 1, bisect_right(run.ends, run.slots[start].offset + nbytes))
            members = tensors[run.first + start : run.first + stop]
            memory = [tensor.data for tensor in members]
            yield Batch(run.part(start, stop), members, self.flats[start:stop], memory)
            start = stop


class Runs:
    """The runs of one layout; remembers where their tensors lie."""

    def __init__(self, layout: Layout) -> None:
        self._runs = tuple(runs_of(layout))
        self._located: list[Located] = []
        self._flats: dict[int, torch.Tensor] = {}
        self._places: object = None

    def locate(self, tensors: Sequence[torch.Tensor], places: object) -> list[Located]:
        """Where the bits of the tensors are. A run comes in parts where some have to be copied by themselves; all of
        them where torch does not reach memory.

        :param places: another object whenever a tensor lies elsewhere, or otherwise, than at the last call
        """
        if not _reaches_memory():
            return [Located(run, []) for run in self._runs]
        if self._places is not places:
            known, self._flats = self._flats, {}
            # Also inside inference_mode(), whose tensors could not be written outside of it.
            with torch.inference_mode(False):
                self._located = [part for run in self._runs for part in self._locate(run, tensors, known)]
            self._places = places
        return self._located

    def _locate(
        self, run: Run, tensors: Sequence[torch.Tensor], known: Mapping[int, torch.Tensor]
    ) -> Iterator[Located]:
        if len(run.slots) == 1:
            yield Located(run, [])
            return
        start = 0
        for are_plain, indices in groupby(run.indices, lambda index: is_plain(tensors[index])):
            part = run.part(start, start + len(list(indices)))
            start += len(part.slots)
            flats = {index: _flat(tensors[index], known.get(index)) for index in part.indices if are_plain}
            self._flats |= flats
            yield Located(part, list(flats.values()))


def _flat(tensor: torch.Tensor, known: torch.Tensor | None) -> torch.Tensor:
    """:param known: what it was before, perhaps elsewhere"""
    if known is not None and _address(known) == _address(tensor):
        return known
    return torch.from_numpy(borrowed_array(tensor, BITS[tensor.itemsize]))


def _reaches_memory() -> bool:
    """Whether torch's calls on this thread read and write memory now. Where functions are traced or transformed, they
    may do something else: ``make_fx()``, ``torch.func.grad()``, ``functionalize()``.
    """
    source, target = np.ones(1, dtype=np.int32), np.zeros(1, dtype=np.int32)
    try:
        goal = torch.from_numpy(target)
        is_there = goal.data_ptr() == target.ctypes.data
        torch._foreach_copy_([goal], [torch.cat([torch.from_numpy(source)])])
    except Exception:  # noqa: BLE001 - of whatever stands between
        return False
    return is_there and bool(target[0] == 1)


def is_plain(tensor: torch.Tensor) -> bool:
    """Whether a tensor's memory is its elements in order, readable by the CPU."""
    return tensor.is_cpu and tensor.is_contiguous() and not tensor.is_neg()
