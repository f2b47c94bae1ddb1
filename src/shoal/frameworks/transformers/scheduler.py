"""The scheduler of a Trainer whose learning rate is the swarm's: :class:`SwarmScheduler`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch.optim.lr_scheduler import LRScheduler

from shoal.errors import InvalidTypeError
from shoal.optim.optimizer import Optimizer


class SwarmScheduler(LRScheduler):
    """Tells a Trainer the learning rate of the swarm, and changes nothing when it is stepped.

    A Trainer steps its scheduler after each of its own updates, and peers make different numbers of these. The schedule
    of a swarm follows epochs: give it to ``shoal.Optimizer(scheduler=...)``, and this one to the Trainer.

    :param optimizer: whose learning rate is told
    :raises InvalidTypeError: it is no :class:`shoal.Optimizer`
    """

    def __init__(self, optimizer: Optimizer) -> None:
        # torch's constructor would set learning rates, and count the steps of the optimizer.
        if not isinstance(optimizer, Optimizer):
            raise InvalidTypeError(f"optimizer must be a shoal.Optimizer, got {type(optimizer).__name__}")
        self.optimizer: Optimizer = optimizer

    def step(self, epoch: int | None = None) -> None:
        """Nothing: the optimizer steps the schedule of the swarm at the end of an epoch."""

    def get_last_lr(self) -> list[Any]:
        """The learning rate of each group."""
        return [group["lr"] for group in self.optimizer.param_groups]

    def get_lr(self) -> list[Any]:
        """The same: it is set by the schedule of the swarm."""
        return self.get_last_lr()

    def state_dict(self) -> dict[str, Any]:
        """The epoch, for people. What is restored is in the optimizer's own state."""
        return {"last_epoch": self.optimizer.local_epoch}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Nothing: the optimizer loads its epoch and schedule itself."""
