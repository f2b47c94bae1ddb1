"""How many samples a step of the optimizer stands for. Pure."""

from __future__ import annotations

from typing import Any

from shoal.errors import InvalidValueError
from shoal.frameworks.batches import batch_size


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
    """As :func:`~shoal.frameworks.batches.batch_size`.

    :raises InvalidValueError: it cannot be seen
    """
    size = batch_size(batch)
    if not size:
        raise InvalidValueError(
            "batch_size must be given to ShoalStrategy: no tensor with samples was found in a batch of type "
            f"{type(batch).__name__}"
        )
    return size
