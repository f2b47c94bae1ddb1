"""How an average changes the elements of a tensor: the rule, in numpy and in torch. Reads and writes memory, and knows
neither locks nor where the memory comes from.

Never uses torch's intra-op thread pool on the CPU, which the trainer needs.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import torch

MERGE_ELEMENTS = 1 << 15
"""What is computed on at a time: the most elements for which torch does not wake its intra-op threads."""
MOST_PIECES = 8
"""Of one chunk, where there is no such limit: each costs a few calls (:mod:`.chunk_size`)."""

_INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}
BITS = {size: np.dtype(f"i{size}") for size in _INTEGERS}

Bits: TypeAlias = npt.NDArray[Any]
"""The elements of a tensor in the CPU's memory, as integers of their size: a flat view that can be written."""


class Merge:
    """:func:`merge` on the CPU, for one chunk after the other; one that the trainer did not touch is only copied."""

    def __init__(self, alpha: float) -> None:
        self.alpha = alpha
        self._scratch = np.empty(0, dtype=np.uint8)

    def __call__(self, bits: Bits, old: Bits, new: Bits, dtype: torch.dtype) -> None:
        """Change ``bits`` in place."""
        if self.is_untouched(bits, old):
            np.copyto(bits, new)
        elif bits.itemsize == 2:
            for piece in slices(len(bits), MERGE_ELEMENTS):
                current, before, after = (elements(array[piece], dtype) for array in (bits, old, new))
                merge(current, before, after, self.alpha)
        else:
            for piece in slices(len(bits), max(MERGE_ELEMENTS, len(bits) // MOST_PIECES)):
                self._merge_wide(bits[piece], old[piece], new[piece])

    def is_untouched(self, bits: Bits, old: Bits) -> bool:
        """Whether the average itself is the result."""
        return self.alpha == 1 and (bits is old or _equal(bits, old))

    def _merge_wide(self, bits: Bits, old_bits: Bits, new_bits: Bits) -> None:
        """For float32 and float64, where numpy takes half the time."""
        alpha, wide = self.alpha, np.dtype(f"f{bits.itemsize}")
        current, old, new = (array.view(wide) for array in (bits, old_bits, new_bits))
        if self._scratch.nbytes < bits.nbytes:
            self._scratch = np.empty(bits.nbytes, dtype=np.uint8)
        moved = self._scratch[: bits.nbytes].view(wide)
        np.subtract(new, old, out=moved)
        if alpha != 1:
            np.multiply(moved, alpha, out=moved)
        np.add(moved, current, out=moved)
        finite = np.isfinite(moved)
        if not finite.all():
            half = old.dtype.type(0.5)  # of finite values: differences of halves stay in range
            carefully = 2 * (current * half + alpha * (new * half - old * half))
            rescued = np.where(np.isfinite(current), current, new)
            np.copyto(moved, np.where(np.isfinite(old), carefully, rescued), where=~finite)
        if alpha == 1:
            np.copyto(moved, new, where=np.equal(bits, old_bits))
        np.copyto(current, moved)


def _equal(first: Bits, second: Bits) -> bool:
    head = 256  # an optimizer's step changes nearly every element: seldom is more than this looked at in vain
    if first[:head].tobytes() != second[:head].tobytes():
        return False
    return len(first) <= head or bool((first == second).all())


def merge(current: torch.Tensor, old: torch.Tensor, new: torch.Tensor, alpha: float) -> None:
    """The rule of :meth:`TensorStore.apply` for flat tensors on one device; writes to ``current``."""
    wide = torch.float64 if current.dtype == torch.float64 else torch.float32
    moved = torch.sub(new.to(wide), old.to(wide)).mul_(alpha).add_(current)
    finite = moved.isfinite()
    if current.is_cuda or not bool(finite.all()):  # to look at CUDA's would hold up its stream
        now, before, after = current.to(wide) / 2, old.to(wide) / 2, new.to(wide) / 2
        carefully = 2 * (now + alpha * (after - before))
        rescued = torch.where(current.isfinite(), current, new).to(wide)
        moved = torch.where(finite, moved, torch.where(old.isfinite(), carefully, rescued))
    if alpha != 1:
        current.copy_(moved)
        return
    integers = _INTEGERS[current.itemsize]
    untouched = torch.eq(current.view(integers), old.view(integers))
    current.copy_(torch.where(untouched, new, moved.to(current.dtype)))


def slices(stop: int, step: int) -> Iterator[slice]:
    return (slice(first, min(first + step, stop)) for first in range(0, stop, step))


def elements(bits: Bits, dtype: torch.dtype) -> torch.Tensor:
    return torch.from_numpy(bits).view(dtype)
