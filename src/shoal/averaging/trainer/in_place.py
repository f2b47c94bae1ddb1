"""Averages tensors that were handed over (:class:`~.shared_buffers.SharedBuffers`): they are the arena's first area,
and so their own snapshot. Nothing is copied when a round begins; its average is copied to them when it has committed.

Their owner may not write to them in between. What shows such a write is compared before the average is written: torch's
count of operations in place, which sees no write through another tensor of the same memory; and in debug mode a digest.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable

import numpy as np
import torch

from shoal.averaging.trainer.chunk_size import WRITE_NBYTES, ChunkSize
from shoal.averaging.trainer.finite_scan import FiniteScan
from shoal.averaging.trainer.merging import BITS, Bits, Merge
from shoal.averaging.trainer.shared_buffers import SharedBuffers
from shoal.averaging.trainer.tensors import TensorStore
from shoal.errors import InvalidStateError
from shoal.runtime.memory import SharedMemory


class InPlaceTransfer:
    """The transfer of one averager to which ``buffers`` are handed over; ``store`` has the lock of their tensors."""

    holds_values = True
    why_not_late = (
        "it came after its step had ended, and the buffers may have been written since, without a copy"
    )

    def __init__(self, buffers: SharedBuffers, store: TensorStore) -> None:
        self._buffers = buffers
        self._store = store
        self._layout = buffers._layout
        self._occupancy = buffers._occupancy
        self._addresses = [tensor.data_ptr() for tensor in buffers.tensors]
        self._step: int | None = None
        """The step whose round began last."""
        self._counts: list[int] = []
        self._digests: list[bytes] = []

    def claim(self, holder: str) -> None:
        self._occupancy.take(holder)

    def open(self) -> SharedMemory:
        return self._buffers._memory

    def snapshot(
        self, step: int, *, checks_finite: bool, timeout: float | None, abandoned: Callable[[], bool]
    ) -> int | None:
        with self._store.lock(timeout, abandoned):
            self._check_places()
            self._step = step
            self._occupancy.begin(step)
            if abandoned():  # its end may have come in this moment, and seen no round
                self._occupancy.end(step)
                raise InvalidStateError("the step has ended")
            self._counts = [tensor._version for tensor in self._buffers.tensors]
            self._digests = self._digest() if self._buffers.debug else []
            return FiniteScan(self._layout, self._area(0)).finish() if checks_finite else None

    def apply(self, alpha: float, abandoned: Callable[[], bool]) -> None:
        """As :meth:`.TensorStore.apply`, but for what was written since the snapshot: that is an error."""
        try:
            with self._store.lock(None, abandoned), np.errstate(all="ignore"):
                self._check_places()
                self._check_unwritten()
                merge, size = Merge(alpha), ChunkSize(WRITE_NBYTES)
                for bits, new, section in zip(
                    self._bits(0), self._bits(1), self._layout.sections, strict=True
                ):
                    for chunk in size.slices(len(bits), bits.itemsize):
                        current = bits[chunk]
                        merge(current, current, new[chunk], section.dtype.torch_dtype)
        finally:
            if self._step is not None:
                self._occupancy.end(self._step)

    def is_read_by(self, step: int) -> bool:
        return self._occupancy.is_read_by(step)

    def release(self, step: int) -> None:
        self._occupancy.end(step)

    def close(self) -> None:
        pass

    @property
    def give_back(self) -> Callable[[], None]:
        return self._occupancy.give_back

    def _check_places(self) -> None:
        """:raises InvalidStateError: a tensor of the buffers lies elsewhere now, or shows its memory otherwise"""
        for index, (tensor, slot) in enumerate(zip(self._buffers.tensors, self._layout.slots, strict=True)):
            is_there = tensor.data_ptr() == self._addresses[index] and tensor.is_contiguous()
            if not is_there or tensor.shape != slot.shape or tensor.dtype != slot.dtype.torch_dtype:
                raise InvalidStateError(
                    f"{self._store.labels[index]} no longer lies in its SharedBuffers, since it was given another "
                    "memory, shape or dtype (by .data = or set_()); write into it instead: copy_()"
                )

    def _check_unwritten(self) -> None:
        """:raises InvalidStateError: a tensor was written since the snapshot, as far as that shows"""
        counts = [tensor._version for tensor in self._buffers.tensors]
        digests = self._digest() if self._digests else []
        for index, label in enumerate(self._store.labels):
            if counts[index] != self._counts[index] or (digests and digests[index] != self._digests[index]):
                raise InvalidStateError(
                    f"{label} was written between the trigger of a round and its average, while the round read it, so "
                    "that its group may have got a mixture of both values; write to SharedBuffers before the trigger "
                    "(allow_allreduce(), or step() without require_trigger) or when the step has ended"
                )

    def _digest(self) -> list[bytes]:
        memory = self._memory(0)
        return [
            hashlib.sha256(memory[slot.offset : slot.offset + slot.nbytes]).digest()
            for slot in self._layout.slots
        ]

    def _bits(self, number: int) -> list[Bits]:
        """The elements of each section in one area: of tensors without gaps between them."""
        memory = np.frombuffer(self._memory(number), dtype=np.uint8)
        return [
            memory[section.offset : section.offset + section.nbytes].view(BITS[section.dtype.itemsize])
            for section in self._layout.sections
        ]

    def _area(self, number: int) -> torch.Tensor:
        memory = self._memory(number)
        return (
            torch.frombuffer(memory, dtype=torch.uint8) if len(memory) else torch.empty(0, dtype=torch.uint8)
        )

    def _memory(self, number: int) -> memoryview:
        size = self._layout.nbytes
        return self._buffers._memory.buffer[number * size : (number + 1) * size]
