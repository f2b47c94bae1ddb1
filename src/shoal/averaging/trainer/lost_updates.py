"""Notices updates that a trainer makes to the tensors while an averager holds their lock.

The averager reads an element, adds its correction and writes it. An update between the two is overwritten; an
optimizer that has read the element before overwrites the average. Neither raises anything.

Torch counts how often a tensor is changed in place. Comparing these counts costs nothing, and shows an update that
ends while an average is written. It does not show one that lasts longer, or goes through ``tensor.data``. For these
there is a debug switch: every tensor is compared with what it should hold, which takes two more copies of the tensors
and several times as long.

For tensors on the CPU. On CUDA an average is written between two kernels of the trainer's own stream.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch

logger = logging.getLogger(__name__)

_INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


class UpdateWatch:
    """Warns, once, of a tensor that is updated while the averager works on it.

    :param name: of the averager
    :param advice: what the user should do
    :param labels: of the tensors; default: by number
    :param compares: compare all elements, instead of torch's counts alone; then each tensor is written by :meth:`write`
    :param updates_while_copying: the trainer may update the tensors while they are copied for a round
    """

    def __init__(
        self,
        name: str,
        advice: str = "",
        *,
        labels: Sequence[str] = (),
        compares: bool = False,
        updates_while_copying: bool = False,
    ) -> None:
        self._name = name
        self._labels = labels
        self._advice = advice
        self.compares = compares
        self.checks_copies = compares and not updates_while_copying
        self._written: list[tuple[int, torch.Tensor, torch.Tensor]] = []
        self._has_warned = False

    def check_copy(self, index: int, tensor: torch.Tensor, copy: torch.Tensor) -> None:
        """``copy`` (flat) was just made of ``tensor``: they should be equal still."""
        if not tensor.is_cuda:
            self._compare(index, tensor, copy.view(tensor.shape), "was copied")

    @contextmanager
    def writing(self, tensors: Sequence[torch.Tensor]) -> Iterator[None]:
        """Averages are written to ``tensors``, under the lock; if it compares, by :meth:`write` alone."""
        self._written.clear()  # of a write that has failed
        counts = counts_of_updates(tensors)
        yield
        for index, tensor, moved in self._written:
            self._compare(index, tensor, moved, "was averaged")
        self._written.clear()
        for index, (before, after) in enumerate(zip(counts, counts_of_updates(tensors), strict=True)):
            if before != after:
                self._warn(index, "was averaged")

    def write(self, index: int, tensor: torch.Tensor, move: Callable[[torch.Tensor], None]) -> None:
        """As ``move(tensor)``, which changes a tensor in place. ``tensor`` has a count of updates of its own, as
        ``tensor.data`` has.
        """
        if tensor.is_cuda or not self.compares:
            move(tensor)
            return
        before = tensor.clone(memory_format=torch.contiguous_format)
        moved = before.clone()
        move(moved)
        self._compare(index, tensor, before, "was averaged")
        tensor.copy_(moved)
        self._written.append((index, tensor, moved))

    def _compare(self, index: int, tensor: torch.Tensor, expected: torch.Tensor, doing: str) -> None:
        if tensor.numel() == 0:
            return
        integers = _INTEGERS[tensor.itemsize]  # bits, since NaN does not equal itself
        changed = int(torch.ne(tensor.view(integers), expected.view(integers)).sum())
        if changed:
            self._warn(index, f"{doing}, in {changed} of {tensor.numel()} elements")

    def _warn(self, index: int, doing: str) -> None:
        if self._has_warned:
            return
        self._has_warned = True
        logger.warning(
            "%s: %s was updated while it %s. An update that meets an average this way gets lost, or "
            "the average does. %s",
            self._name,
            self._labels[index] if self._labels else f"averaged_tensors[{index}]",
            doing,
            self._advice,
        )


def counts_of_updates(tensors: Sequence[torch.Tensor]) -> list[int]:
    """How often each tensor has been changed in place; 0 where torch does not count, or an update can't get lost."""
    return [0 if tensor.is_cuda or tensor.is_inference() else tensor._version for tensor in tensors]
