"""From what a module configures to the swarm's optimizer."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import torch
from torch.optim.lr_scheduler import LRScheduler

from shoal.dht.dht import DHT
from shoal.errors import InvalidTypeError, InvalidValueError
from shoal.optim.optimizer import Optimizer
from shoal.optim.state.rates import SchedulerFactory
from shoal.optim.state.schedule import Schedule


class StrategyOptimizer(Optimizer):
    """The swarm's optimizer, in which Lightning may clear gradients whenever it wants."""

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clear the gradients; with ``reuse_grad_buffers`` they are sums over the epoch, and stay."""
        if not self.options.reuse_grad_buffers:
            super().zero_grad(set_to_none)


def join(
    dht: DHT,
    configured: torch.optim.Optimizer,
    schedulers: Sequence[LRScheduler],
    scheduler_fn: SchedulerFactory | None,
    options: Mapping[str, Any],
) -> StrategyOptimizer:
    """The optimizer of the swarm around the one that the module has configured.

    With offloading that one is made once more, for the copies. The module's schedulers set the rates of those then.
    """
    given: dict[str, Any] = {"optimizer": configured}
    if options["offload_optimizer"]:
        given = {
            "optimizer": made_again(configured),
            "params": [dict(group) for group in configured.param_groups],
        }
    if schedulers:
        # What is asked of it is less than all that torch's class has.
        given["scheduler"] = lambda _: cast("LRScheduler", Schedule(schedulers))
    elif scheduler_fn is not None:
        given["scheduler"] = scheduler_fn
    return StrategyOptimizer(dht=dht, **given, **options)


def made_again(
    configured: torch.optim.Optimizer,
) -> Callable[[list[dict[str, Any]]], torch.optim.Optimizer]:
    """Makes an optimizer of the same class and settings for other groups, which ``configured`` then has, too."""

    def make(groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
        kind = cast("Callable[..., torch.optim.Optimizer]", type(configured))
        accepted = inspect.signature(kind).parameters
        settings = {name: value for name, value in configured.defaults.items() if name in accepted}
        try:
            made = kind(groups, **settings)
        except (TypeError, ValueError) as e:
            raise InvalidValueError(
                f"offload_optimizer must be False with {kind.__name__}, which cannot be made again for copies: {e}"
            ) from e
        configured.param_groups = made.param_groups  # where the module's schedulers set rates
        return made

    return make


def check_scheduler(scheduler: Any) -> LRScheduler:
    """A scheduler of torch that needs no metric.

    :raises InvalidTypeError: another one
    """
    if isinstance(scheduler, torch.optim.lr_scheduler.ReduceLROnPlateau):
        raise InvalidTypeError(
            "a scheduler must follow the swarm's epoch, got ReduceLROnPlateau: it follows a metric, which differs "
            "from peer to peer; use one without, such as CosineAnnealingLR"
        )
    if not isinstance(scheduler, LRScheduler):
        raise InvalidTypeError(
            f"a scheduler must be an LRScheduler of torch, got {type(scheduler).__name__}: give a LambdaLR that "
            "computes the same, or scheduler_fn"
        )
    return scheduler
