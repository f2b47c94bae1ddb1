"""How many samples a batch has, of which frameworks tell nobody: :func:`batch_size`. Pure."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch.nn.utils.rnn import PackedSequence


def batch_size(batch: Any) -> int | None:
    """The length of the first tensor that is no scalar, in nested dictionaries, sequences and dataclasses; None: there
    is none.
    """
    if isinstance(batch, PackedSequence):
        return int(batch.batch_sizes[0])
    if isinstance(batch, torch.Tensor):
        return batch.shape[0] if batch.dim() else None
    items: Iterable[Any] = ()
    if isinstance(batch, Mapping):
        items = batch.values()
    elif isinstance(batch, list | tuple):
        items = batch
    elif dataclasses.is_dataclass(batch) and not isinstance(batch, type):
        items = (getattr(batch, field.name) for field in dataclasses.fields(batch))
    return next((size for size in map(batch_size, items) if size is not None), None)
