"""The arena of a round in memory of this process, and its tensors."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from shoal.averaging.allreduce.exchange import Arena
from shoal.averaging.partition import Layout, Part
from shoal.utils.dtypes import DType


def make_arena(layout: Layout, tensors: Sequence[torch.Tensor] = ()) -> Arena:
    """An arena full of zeros, with ``tensors`` as its snapshot."""
    arena = Arena(*(memoryview(bytearray(layout.nbytes)) for _ in range(2)))
    for index, tensor in enumerate(tensors):
        tensor_in(layout, arena.snapshot, index).copy_(tensor.reshape(-1))
    return arena


def tensor_in(layout: Layout, area: memoryview | torch.Tensor, index: int) -> torch.Tensor:
    """A tensor of the layout in an area, which is bytes or a uint8 tensor: a flat view of it."""
    slot = layout.slots[index]
    return _view(area, slot.dtype, slot.count, slot.offset)


def vector_in(layout: Layout, area: memoryview) -> torch.Tensor:
    """All elements in an area, whose tensors are of one dtype and codec: a flat view."""
    (section,) = layout.sections
    return _view(area, section.dtype, section.count, section.offset)


def part_tensor(layout: Layout, area: memoryview, part: Part) -> torch.Tensor:
    """A part's elements in an area: a flat view."""
    return _view(area, layout.dtype_of(part), part.count, part.offset)


def _view(area: memoryview | torch.Tensor, dtype: DType, count: int, offset: int) -> torch.Tensor:
    if isinstance(area, torch.Tensor):
        return area[offset : offset + count * dtype.itemsize].view(dtype.torch_dtype)
    if count == 0:
        return torch.empty(0, dtype=dtype.torch_dtype)
    return torch.frombuffer(area, dtype=dtype.torch_dtype, count=count, offset=offset)


def tensors_in(layout: Layout, area: memoryview) -> list[torch.Tensor]:
    """All tensors of the layout in an area, flat."""
    return [tensor_in(layout, area, index) for index in range(len(layout.slots))]
