"""Several schedulers as one, which counts its steps: :class:`Schedule`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch.optim.lr_scheduler import LRScheduler


class Schedule:
    """Several schedulers of one optimizer as the one that :class:`~shoal.Optimizer` moves, a step for each epoch.

    It counts by itself: a ``ChainedScheduler`` of torch has no count.
    """

    def __init__(self, schedulers: Sequence[LRScheduler]) -> None:
        self._schedulers = tuple(schedulers)
        self.last_epoch = 0

    def step(self) -> None:
        """Move all of them by one epoch."""
        self.last_epoch += 1
        for scheduler in self._schedulers:
            scheduler.step()

    def state_dict(self) -> dict[str, Any]:
        """The states of all, with the count."""
        return {"last_epoch": self.last_epoch, "schedulers": [s.state_dict() for s in self._schedulers]}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Load what :meth:`state_dict` gave."""
        self.last_epoch = state["last_epoch"]
        for scheduler, saved in zip(self._schedulers, state["schedulers"], strict=True):
            scheduler.load_state_dict(saved)
