"""How many tensors travel in few large pieces. Pure."""

from __future__ import annotations

from collections.abc import Sequence

import torch

PIECE = 1 << 26
"""Bytes of one piece; a larger tensor is a piece of its own."""
ALIGNMENT = 16
"""Bytes at a multiple of which each tensor begins, so that it can be seen in its dtype."""


def pieces(sizes: Sequence[int], limit: int = PIECE) -> list[range]:
    """Which tensors, of these sizes in bytes, share a piece: neighbours, up to ``limit`` bytes together."""
    found: list[range] = []
    begin, filled = 0, 0
    for index, size in enumerate(sizes):
        if index > begin and filled + padded(size) > limit:
            found.append(range(begin, index))
            begin, filled = index, 0
        filled += padded(size)
    if sizes:
        found.append(range(begin, len(sizes)))
    return found


def padded(size: int) -> int:
    """Bytes that a tensor of ``size`` bytes takes in a piece."""
    return -(-size // ALIGNMENT) * ALIGNMENT


def places(tensors: Sequence[torch.Tensor], piece: torch.Tensor) -> list[torch.Tensor]:
    """Where each tensor is in a piece of bytes, seen in its dtype and shape."""
    found, begin = [], 0
    for tensor in tensors:
        bytes_ = piece[begin : begin + tensor.nbytes]
        found.append(bytes_.view(tensor.dtype).view(tensor.shape))
        begin += padded(tensor.nbytes)
    return found
