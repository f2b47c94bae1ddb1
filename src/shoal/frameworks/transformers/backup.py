"""What a diverged model goes back to: :class:`Backup`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from shoal.optim.optimizer import Optimizer


class Backup:
    """A copy, in memory of the CPU, of what an optimizer trains and of its statistics."""

    def __init__(self, optimizer: Optimizer) -> None:
        self.epoch = optimizer.local_epoch
        self._state = copied(optimizer.state_dict())
        self._tensors = copied(_trained(optimizer))

    @torch.no_grad()
    def restore(self, optimizer: Optimizer) -> None:
        """Write the copy back. Epoch, learning rate and schedule stay: the swarm has gone on, and did not diverge."""
        with optimizer.state_averager.get_tensors():
            for target, source in zip(_trained(optimizer), self._tensors, strict=True):
                target.copy_(source)
        now = optimizer.state_dict()
        own = ("local_epoch", "scheduler")
        kept = {key: value for key, value in copied(self._state)["state"].items() if key not in own}
        kept |= {key: now["state"][key] for key in own if key in now["state"]}
        optimizer.load_state_dict({"state": kept, "param_groups": now["param_groups"]})


def is_finite(optimizer: Optimizer) -> bool:
    """Whether what it trains has neither NaN nor infinity."""
    return all(bool(torch.isfinite(tensor).all()) for tensor in _trained(optimizer))


def _trained(optimizer: Optimizer) -> list[torch.Tensor]:
    averager = optimizer.state_averager
    return [*averager.main_parameters, *averager.extra_tensors]


def copied(value: Any) -> Any:
    """The same with tensors on the CPU that nobody else has."""
    if isinstance(value, torch.Tensor):
        return value.detach().to("cpu", copy=True)
    if isinstance(value, Mapping):
        return {key: copied(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(copied(item) for item in value)
    return value
