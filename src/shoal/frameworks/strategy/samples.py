"""How many samples a step of the optimizer stands for. Pure."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch.nn.utils.rnn import PackedSequence

from shoal.errors import InvalidValueError


class SampleCount:
    """Counts the samples of the batches between two steps of the optimizer.

    :param batch_size: samples of each batch; None: the first dimension of the first tensor in it
    """

    def __init__(self, batch_size: int | None) -> None:
        self._batch_size = batch_size
        self._latest = self._untaken = 0

    def begin_batch(self, batch: Any, anew: bool) -> None:
        """A batch is about to be processed.

        :param anew: the gradients of earlier batches are cleared, also if no step has used them
        :raises InvalidValueError: its size cannot be seen
        """
        self._latest = size_of(batch) if self._batch_size is None else self._batch_size
        self._untaken = self._latest + (0 if anew else self._untaken)

    def take(self) -> int:
        """The samples since the last step; those of the latest batch if that makes several steps."""
        taken, self._untaken = self._untaken or self._latest, 0
        return taken


def size_of(batch: Any) -> int:
    """The first dimension of the first tensor that has one, in nested dictionaries, sequences and dataclasses.

    :raises InvalidValueError: there is none
    """
    size = _find(batch)
    if not size:
        raise InvalidValueError(
            "batch_size must be given to ShoalStrategy: no tensor with samples was found in a batch of type "
            f"{type(batch).__name__}"
        )
    return size


def _find(value: Any) -> int | None:
    if isinstance(value, PackedSequence):
        return int(value.batch_sizes[0])
    if isinstance(value, torch.Tensor):
        return value.shape[0] if value.dim() else None
    items: Iterable[Any] = ()
    if isinstance(value, Mapping):
        items = value.values()
    elif isinstance(value, list | tuple):
        items = value
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        items = (getattr(value, field.name) for field in dataclasses.fields(value))
    return next((size for size in map(_find, items) if size is not None), None)
