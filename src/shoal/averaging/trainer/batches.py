"""Small tensors, several at a time: to copy, compare and write each by itself takes far longer than its bytes do, and
lets go of the interpreter's lock again and again, for which a busy trainer makes the averager wait.

Never uses torch's intra-op thread pool, which the trainer needs.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import NamedTuple

import torch

from shoal.averaging.partition import Layout, TensorSlot
from shoal.averaging.trainer.merging import BITS, elements
from shoal.compression.base import borrowed_array

BATCH_NBYTES = 1 << 17
"""The most that is copied at a time, so that what follows on a look at it finds it in the cache."""
SMALL_NBYTES = 1 << 15
"""A larger tensor loses by company: its elements are copied once more, to be compared. Nor has a small one more
elements than torch copies on one thread."""


@dataclass(frozen=True)
class Batch:
    """Consecutive tensors of one dtype, which lie in the arena without gaps: one of any size, or several small ones.

    ``first`` is the index of the first tensor.
    """

    first: int
    slots: tuple[TensorSlot, ...]

    @cached_property
    def indices(self) -> range:
        return range(self.first, self.first + len(self.slots))

    @cached_property
    def counts(self) -> list[int]:
        """How many elements each tensor has."""
        return [slot.count for slot in self.slots]

    @cached_property
    def whole(self) -> TensorSlot:
        """Where all of them lie, as if they were one flat tensor."""
        count = sum(self.counts)
        return replace(self.slots[0], shape=(count,), count=count)


def batches_of(layout: Layout) -> Iterator[Batch]:
    """All tensors, in order."""
    first, slots = 0, layout.slots
    for index in range(1, len(slots) + 1):
        if index == len(slots) or not _go_together(slots[first], slots[index - 1], slots[index]):
            yield Batch(first, slots[first:index])
            first = index


def _go_together(first: TensorSlot, last: TensorSlot, new: TensorSlot) -> bool:
    """Whether a batch from ``first`` to ``last`` has room for the tensor after it."""
    end = new.offset + new.nbytes
    is_small = max(last.nbytes, new.nbytes) <= SMALL_NBYTES
    return is_small and new.dtype == last.dtype and end - first.offset <= BATCH_NBYTES


class Located(NamedTuple):
    """A batch, and where the elements of its tensors are."""

    batch: Batch
    flats: list[torch.Tensor]
    """Of several tensors: each, flat, in its own memory, which it does not keep alive. None of them, where a tensor
    has to be copied by itself, since it has gaps or is not on the CPU.
    """


class Batches:
    """The batches of one layout; remembers where their tensors lie."""

    def __init__(self, layout: Layout) -> None:
        self._located = [Located(batch, []) for batch in batches_of(layout)]
        self._places: object = None

    def locate(self, tensors: Sequence[torch.Tensor], places: object) -> list[Located]:
        """Where the elements of the tensors are.

        :param places: another object whenever a tensor lies elsewhere, or otherwise, than at the last call
        """
        if self._places is not places:
            self._located = [Located(batch, _flats(batch, tensors)) for batch, _ in self._located]
            self._places = places
        return self._located


def _flats(batch: Batch, tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    members = [tensors[index] for index in batch.indices]
    if len(members) == 1 or not all(map(is_plain, members)):
        return []
    # Also inside inference_mode(), whose tensors could not be written outside of it.
    with torch.inference_mode(False):
        return [elements(borrowed_array(tensor, BITS[tensor.itemsize]), tensor.dtype) for tensor in members]


def is_plain(tensor: torch.Tensor) -> bool:
    """Whether a tensor's memory is its elements in order, readable by the CPU."""
    return tensor.is_cpu and tensor.is_contiguous() and not tensor.is_neg()


def gather(flats: list[torch.Tensor], target: torch.Tensor) -> None:
    """Copy flat tensors to one."""
    torch.cat(flats, out=target)


def scatter(source: torch.Tensor, flats: list[torch.Tensor], counts: list[int]) -> None:
    """The way back."""
    torch._foreach_copy_(flats, torch.split(source, counts))
