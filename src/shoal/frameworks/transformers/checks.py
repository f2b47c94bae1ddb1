"""What a Trainer and an optimizer must be to work together; each error says what to do."""

from __future__ import annotations

from typing import Any

from torch.optim.lr_scheduler import LRScheduler

from shoal.errors import InvalidTypeError, InvalidValueError
from shoal.frameworks.transformers.scheduler import SwarmScheduler
from shoal.optim.optimizer import Optimizer

_ADVICE = "Trainer(..., optimizers=(opt, SwarmScheduler(opt)))"


def find_optimizer(given: Any) -> Optimizer:
    """The swarm's optimizer in what a Trainer has, which accelerate wraps.

    :raises InvalidTypeError: there is none
    """
    found = given
    while not isinstance(found, Optimizer) and hasattr(found, "optimizer"):
        found = found.optimizer
    if not isinstance(found, Optimizer):
        name = "none" if found is None else type(found).__name__
        raise InvalidTypeError(
            f"the Trainer's optimizer must be a shoal.Optimizer, got {name}: give {_ADVICE}"
        )
    return found


def check_arguments(args: Any) -> None:
    """Refuse what shards the model.

    :param args: ``transformers.TrainingArguments``
    :raises InvalidValueError: a peer cannot be trained like this
    """
    if getattr(args, "deepspeed_plugin", None) is not None:
        raise InvalidValueError(
            "deepspeed must be off: DeepSpeed replaces the optimizer by its own. Train one process a peer without it; "
            "shoal.Optimizer(offload_optimizer=True) saves memory of the GPU"
        )
    if getattr(args, "fsdp", None):
        raise InvalidValueError(
            f"fsdp must be off, got {args.fsdp!r}: it shards the parameters that Shoal averages as a whole. Train one "
            "process a peer without it"
        )


def check_optimizer(optimizer: Optimizer, args: Any, batch_size: int) -> None:
    """Refuse modes that a Trainer would spoil.

    :param batch_size: samples of one step of the Trainer
    :raises InvalidValueError: a mode that does not go with a Trainer, or another batch size or number of processes
    """
    if optimizer.ranks != args.world_size:
        raise InvalidValueError(
            f"shoal.Optimizer must be made by all {args.world_size} processes of the Trainer as one peer, got "
            f"{optimizer.ranks}: make TrainingArguments first, which begins torch.distributed, then a DHT at rank 0 "
            "alone, and give dht=None at the others"
        )
    if optimizer.options.reuse_grad_buffers:
        raise InvalidValueError(
            "reuse_grad_buffers must be False with a Trainer, which clears the gradients after each step"
        )
    if optimizer.auxiliary:
        raise InvalidValueError("auxiliary must be False with a Trainer, which processes batches")
    given = optimizer.options.batch_size_per_step
    if given is not None and given != batch_size:
        raise InvalidValueError(
            f"batch_size_per_step must be {batch_size} (per_device_train_batch_size on all devices of this process, "
            f"times gradient_accumulation_steps {args.gradient_accumulation_steps}), or be left out, got {given}"
        )


def check_scheduler(optimizer: Optimizer, scheduler: Any) -> None:
    """Refuse two schedules of one learning rate.

    :param scheduler: of the Trainer; None: it was given none, and makes its own
    :raises InvalidValueError: the optimizer has one, and the Trainer would overwrite what it sets
    """
    if optimizer.state_averager.scheduler is not None and not isinstance(scheduler, SwarmScheduler):
        name = "none, for which the Trainer makes its own" if scheduler is None else type(scheduler).__name__
        raise InvalidValueError(
            "the Trainer's scheduler must be a SwarmScheduler if shoal.Optimizer has a scheduler, "
            f"got {name}: give {_ADVICE}"
        )


def advice(optimizer: Optimizer, scheduler: LRScheduler | None, args: Any) -> list[str]:
    """What is allowed, and seldom meant."""
    found = []
    if not isinstance(scheduler, SwarmScheduler):
        found.append(
            "the learning rate follows this peer's own steps, which are not those of other peers: give the schedule to "
            f"shoal.Optimizer(scheduler=...), and {_ADVICE}"
        )
    if args.max_grad_norm:
        found.append(
            f"the Trainer clips the gradient of each step to max_grad_norm={args.max_grad_norm:g}. To clip that "
            "of the swarm, give TrainingArguments(max_grad_norm=0) and shoal.Optimizer(max_grad_norm=...)"
        )
    if args.data_seed is None:
        found.append(
            f"data_seed is not set, so that all peers with seed={args.seed} read one data set in the same order, and "
            "learn the same from it: give each peer a TrainingArguments(data_seed=...) of its own"
        )
    return found
