"""How many samples a step of a Trainer stands for, which the Trainer tells nobody: :class:`SampleCounter`."""

from __future__ import annotations

from typing import Any

import torch

from shoal.frameworks.batches import batch_size
from shoal.optim.optimizer import Optimizer


class SampleCounter:
    """Sets ``batch_size_per_step`` of an optimizer to the samples that the model has seen since the last step.

    So the last batch of the data, which may be shorter, has the weight that it should have. What counts is the first
    call of the model in each batch: losses that call it again see the same samples.

    :param planned: samples of a step, as long as the model was not seen. That is so for good if it is compiled or runs
      on several devices, where calls cannot be counted.
    """

    def __init__(self, optimizer: Optimizer, model: torch.nn.Module, planned: int, countable: bool) -> None:
        self._optimizer, self._planned = optimizer, planned
        self._before = optimizer.batch_size_per_step
        self._seen, self._counted = 0, True
        self._hook = model.register_forward_pre_hook(self._count, with_kwargs=True) if countable else None
        optimizer.batch_size_per_step = planned

    def begin_step(self) -> None:
        """The batches that follow belong to the next step."""
        self._seen, self._counted = 0, False
        self._optimizer.batch_size_per_step = self._planned

    def begin_batch(self) -> None:
        """The next batch follows, of the same step."""
        self._counted = False

    def end(self) -> None:
        """Leave model and optimizer as they were."""
        if self._hook is not None:
            self._hook.remove()
        self._optimizer.batch_size_per_step = self._before

    def _count(self, module: torch.nn.Module, args: Any, kwargs: Any) -> None:
        if torch.compiler.is_compiling() or self._counted or not module.training:
            return
        size = batch_size([*args, *kwargs.values()])
        if size:
            self._counted = True
            self._seen += size
            self._optimizer.batch_size_per_step = self._seen
