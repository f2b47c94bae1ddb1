"""The scheduler of an optimizer, and what it sets: :class:`Rates`."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import TypeAlias, cast

import torch

from shoal.errors import InvalidTypeError
from shoal.optim.state.holder import OptimizerHolder
from shoal.optim.state.schedule import Schedule

Scheduler: TypeAlias = torch.optim.lr_scheduler.LRScheduler
SchedulerFactory: TypeAlias = Callable[[torch.optim.Optimizer], Scheduler]


class Rates:
    """Moves a scheduler with the epoch. The model's groups get what it sets by :meth:`publish` alone: an optimizer may
    step in the background, and these groups belong to the thread that trains.

    :param scheduler: an instance, or a callable that takes the inner optimizer; None: rates stay as they are
    :raises InvalidTypeError: neither
    """

    def __init__(self, holder: OptimizerHolder, scheduler: Scheduler | SchedulerFactory | None) -> None:
        self._holder = holder
        self.scheduler = None if scheduler is None else _made(scheduler, holder.optimizer)
        self.publish()

    def follow(self, epoch: int) -> None:
        """Step until the count of steps is the epoch: a peer that joins late catches up."""
        if self.scheduler is None:
            return
        with warnings.catch_warnings():  # it may do so without a step of its own
            warnings.filterwarnings("ignore", "Detected call of `lr_scheduler.step", UserWarning)
            while self.scheduler.last_epoch < epoch:
                self.scheduler.step()

    def count_to(self, epoch: int) -> None:
        """As :meth:`follow`, for groups that were loaded: their rates have these steps in them, which must not count
        twice.
        """
        groups = self._holder.optimizer.param_groups
        loaded = [{name: value for name, value in group.items() if name != "params"} for group in groups]
        self.follow(epoch)
        for group, values in zip(groups, loaded, strict=True):
            group.update(values)
        self.publish()

    def publish(self) -> None:
        """Give the model's groups what has changed."""
        self._holder.hyperparameters_to_model()


def _made(scheduler: Scheduler | SchedulerFactory, optimizer: torch.optim.Optimizer) -> Scheduler:
    if not isinstance(scheduler, Scheduler) and not callable(scheduler):
        raise InvalidTypeError(
            f"scheduler must be a torch scheduler or a callable, got {type(scheduler).__name__}"
        )
    made = scheduler if isinstance(scheduler, Scheduler) else scheduler(optimizer)
    return made if hasattr(made, "last_epoch") else cast("Scheduler", Schedule([made]))
