"""Tensors that travel beside the parameters: floating ones are averaged, of integers the largest counts."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch

MAX_INTEGERS = 4096
"""More of them are left out of rounds: all members send theirs to all others. They travel with the state."""


class Carried:
    """The extra tensors of one peer.

    In a round each integer becomes the largest of all members: a counter, such as BatchNorm's
    ``num_batches_tracked``, then never goes back. Booleans travel with the state only.
    """

    def __init__(self, tensors: Iterable[torch.Tensor]) -> None:
        self.tensors = tuple(tensors)
        self.floating = tuple(t for t in self.tensors if t.is_floating_point())
        self._integers = tuple(
            t for t in self.tensors if not (t.is_floating_point() or t.is_complex() or t.dtype is torch.bool)
        )
        self._largest: list[int] | None = None

    def integers(self) -> list[int]:
        """The values of all integers, for the group; none if there are too many."""
        if sum(t.numel() for t in self._integers) > MAX_INTEGERS:
            return []
        return [value for t in self._integers for value in t.detach().reshape(-1).tolist()]

    def note(self, told: Sequence[Any]) -> None:
        """What the members of a round told; what is not as many integers as the own counts for nothing."""
        own = self.integers()
        lists = [
            one
            for one in told
            if isinstance(one, list | tuple) and len(one) == len(own) and all(map(_fits, one))
        ]
        self._largest = [max(values) for values in zip(own, *lists, strict=True)] if own else None

    @torch.no_grad()
    def apply(self) -> None:
        """Write the largest ones, where the own have not become larger meanwhile."""
        largest, self._largest = self._largest, None
        if largest is None:
            return
        start = 0
        for tensor in self._integers:
            values = torch.tensor(largest[start : start + tensor.numel()], dtype=torch.int64)
            start += tensor.numel()
            limit = torch.iinfo(tensor.dtype).max
            tensor.copy_(torch.maximum(tensor, values.clamp(max=limit).reshape(tensor.shape).to(tensor)))


def _fits(value: Any) -> bool:
    return isinstance(value, int) and -(2**63) <= value < 2**63
