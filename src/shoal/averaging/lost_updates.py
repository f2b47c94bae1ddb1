"""A debug switch: notices updates that a trainer makes to the tensors while an averager holds their lock.

The averager reads an element, adds its correction and writes it. An update between the two is overwritten; an
optimizer that has read the element before overwrites the average. Neither raises anything. Here every tensor is
compared with what it should hold, which takes two more copies of the tensors and several times as long.

For tensors on the CPU. On CUDA an average is written between two kernels of the trainer's own stream.
"""

from __future__ import annotations

import logging
from collections.abc import Callable

import torch

logger = logging.getLogger(__name__)

_INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


class UpdateWatch:
    """Compares tensors with what they should hold, and warns of the first that differs.

    :param name: of the averager
    :param advice: what the user should do
    """

    def __init__(self, name: str, advice: str) -> None:
        self._name = name
        self._advice = advice
        self._written: list[tuple[int, torch.Tensor, torch.Tensor]] = []
        self._has_warned = False

    def check_copy(self, index: int, tensor: torch.Tensor, copy: torch.Tensor) -> None:
        """``copy`` (flat) was just made of ``tensor``: they should be equal still."""
        self._compare(index, tensor, copy.view(tensor.shape), "was copied")

    def write(self, index: int, tensor: torch.Tensor, move: Callable[[torch.Tensor], None]) -> None:
        """As ``move(tensor)``, which changes a tensor in place; looked at until :meth:`finish`."""
        before = tensor.clone(memory_format=torch.contiguous_format)
        moved = before.clone()
        move(moved)
        self._compare(index, tensor, before, "was averaged")
        tensor.copy_(moved)
        self._written.append((index, tensor, moved))

    def finish(self) -> None:
        """The lock is about to be released."""
        written, self._written = self._written, []
        for index, tensor, moved in written:
            self._compare(index, tensor, moved, "was averaged")

    def _compare(self, index: int, tensor: torch.Tensor, expected: torch.Tensor, doing: str) -> None:
        if self._has_warned or tensor.numel() == 0:
            return
        integers = _INTEGERS[tensor.itemsize]  # bits, since NaN does not equal itself
        changed = int(torch.ne(tensor.view(integers), expected.view(integers)).sum())
        if not changed:
            return
        self._has_warned = True
        logger.warning(
            "%s: averaged_tensors[%d] was updated while it %s, in %d of %d elements. An update that meets an average "
            "this way gets lost, or the average does. %s",
            self._name,
            index,
            doing,
            changed,
            tensor.numel(),
            self._advice,
        )
