"""Copies between tensors on a CUDA device and the arena, through pinned memory."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from shoal.averaging.trainer.merging import merge, slices


class CudaCopier:
    """Copies between the tensors of one CUDA device and arenas, through pinned memory, in chunks."""

    CHUNK_NBYTES = 4 << 20

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._trainer_stream: torch.cuda.Stream = torch.cuda.default_stream(device)
        self._copy_stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._pinned: list[torch.Tensor] = []

    def mark_stream(self) -> None:
        self._trainer_stream = torch.cuda.current_stream(self._device)

    def read(self, tensor: torch.Tensor, target: torch.Tensor) -> None:
        """Copy a tensor to flat CPU memory; back when it is there."""
        # A stream of our own, so that the trainer's next kernels need not wait for the bus. It waits for an event
        # that is recorded on the trainer's stream now.
        self._copy_stream.wait_stream(self._trainer_stream)
        with torch.cuda.device(self._device), torch.cuda.stream(self._copy_stream):
            source = tensor.contiguous().view(-1)
            arrived: tuple[torch.cuda.Event, torch.Tensor, torch.Tensor] | None = None
            for number, (piece, goal) in enumerate(
                zip(self._split(source), self._split(target), strict=True)
            ):
                staged = self._staging(number % 2, piece)
                staged.copy_(piece, non_blocking=True)
                event = torch.cuda.Event()  # type: ignore[no-untyped-call]
                event.record(self._copy_stream)
                self._unload(arrived)
                arrived = (event, staged, goal)
            self._unload(arrived)

    def merge(self, tensor: torch.Tensor, old: torch.Tensor, new: torch.Tensor, alpha: float) -> None:
        """As :func:`.merging.merge` for the whole tensor; back when it is done."""
        # On the trainer's own stream: each element is read and written between two of the trainer's kernels.
        stream = self._trainer_stream
        used: list[torch.cuda.Event | None] = [None, None]
        with torch.cuda.device(self._device), torch.cuda.stream(stream):
            flat = tensor.contiguous().view(-1)
            triples = zip(self._split(flat), self._split(old), self._split(new), strict=True)
            for number, (piece, old_piece, new_piece) in enumerate(triples):
                turn = number % 2
                previous = used[turn]
                if previous is not None:
                    previous.synchronize()
                moved = []
                for slot, source in ((turn, old_piece), (2 + turn, new_piece)):
                    staged = self._staging(slot, source)
                    np.copyto(_bytes(staged), _bytes(source))
                    moved.append(staged.to(self._device, non_blocking=True))
                event = used[turn] = torch.cuda.Event()  # type: ignore[no-untyped-call]
                event.record(stream)
                merge(piece, moved[0], moved[1], alpha)
            if flat.data_ptr() != tensor.data_ptr():
                tensor.copy_(flat.view(tensor.shape))
            stream.synchronize()

    def _split(self, flat: torch.Tensor) -> Iterator[torch.Tensor]:
        return (flat[piece] for piece in slices(flat.numel(), self.CHUNK_NBYTES // flat.itemsize))

    def _staging(self, slot: int, like: torch.Tensor) -> torch.Tensor:
        while len(self._pinned) <= slot:
            self._pinned.append(torch.empty(self.CHUNK_NBYTES, dtype=torch.uint8, pin_memory=True))
        return self._pinned[slot][: like.numel() * like.itemsize].view(like.dtype)

    @staticmethod
    def _unload(arrived: tuple[torch.cuda.Event, torch.Tensor, torch.Tensor] | None) -> None:
        if arrived is not None:
            event, staged, goal = arrived
            event.synchronize()
            np.copyto(_bytes(goal), _bytes(staged))


def _bytes(flat: torch.Tensor) -> npt.NDArray[Any]:
    return flat.view(torch.uint8).numpy()
