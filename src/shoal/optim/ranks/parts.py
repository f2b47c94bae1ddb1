"""What a rank other than 0 holds in place of averagers and a tracker."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch

from shoal.errors import InvalidStateError
from shoal.optim.options import Options
from shoal.optim.ranks.messages import Outcome
from shoal.optim.ranks.state import Changes, HeldState, shared_tensors
from shoal.optim.state.holder import OptimizerHolder
from shoal.optim.state.packing import unpack
from shoal.optim.state.rates import Rates


class RankState:
    """The training state of a rank other than 0: no averager, and without local updates no statistics of an optimizer.

    It has those methods of :class:`~shoal.optim.TrainingStateAverager` that :class:`~shoal.Optimizer` calls at all
    ranks.

    :param holder: of the rank's own model
    :param scheduler: as given to the optimizer
    """

    client_mode = False
    averaging_in_progress = False
    state_sharing_priority = 0.0

    def __init__(
        self,
        holder: OptimizerHolder,
        scheduler: Any,
        extra_tensors: Sequence[torch.Tensor],
        local_updates: bool,
        reused_gradients: bool,
    ) -> None:
        self.holder = holder
        self.scheduler = Rates(holder, scheduler).scheduler
        self.extra_tensors = tuple(extra_tensors)
        self.local_epoch = self.rewritten = 0
        self._local_updates, self._reused_gradients = local_updates, reused_gradients
        self._alive = True

    @property
    def optimizer(self) -> torch.optim.Optimizer:
        """The inner optimizer."""
        return self.holder.optimizer

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """Groups with the model's parameters."""
        return self.holder.param_groups

    @property
    def main_parameters(self) -> tuple[torch.Tensor, ...]:
        """The model's parameters that are averaged."""
        return self.holder.model_parameters

    def get_tensors(self) -> AbstractContextManager[None]:
        """Nobody else writes here."""
        return nullcontext()

    def step(self, **work: Any) -> None:
        """Nothing: no work is delayed at this rank."""

    def finish_delayed(self) -> None:
        """Nothing: no work is delayed at this rank."""

    def is_alive(self) -> bool:
        """Whether it was not shut down."""
        return self._alive

    def shutdown(self) -> None:
        """Idempotent."""
        self._alive = False

    @torch.no_grad()
    def take(self, changes: Changes, copy: Callable[[Sequence[torch.Tensor]], None]) -> None:
        """Become as rank 0 is.

        :param copy: gives tensors the values that they have at rank 0
        """
        of_optimizer = [torch.empty(shape, dtype=dtype) for shape, dtype in changes.specs]
        copy([*shared_tensors(self, self._local_updates), *of_optimizer])
        own = self.optimizer.state_dict()
        if not self._local_updates:
            own["state"] = {}
        self.holder.load_state_dict(unpack(changes.optimizer, of_optimizer, own))
        if self._local_updates:
            self.holder.parameters_to_model()
        if self.scheduler is not None and changes.scheduler is not None:
            self.scheduler.load_state_dict(changes.scheduler)
        self.local_epoch = changes.epoch

    @torch.no_grad()
    def follow(self, outcome: Outcome, fresh: bool) -> None:
        """Do what rank 0 did in a step.

        :param fresh: this rank has just become as rank 0 is
        """
        if outcome.updated and not fresh:
            self.holder.hyperparameters_from_model()
            self.holder.load_gradients(custom=False)
            self.optimizer.step()
            self.holder.parameters_to_model()
        if outcome.cleared and self._reused_gradients:
            for parameter in self.main_parameters:
                if parameter.grad is not None:
                    parameter.grad.zero_()  # in place: it may be a view of DDP's buckets


class AtRankZero:
    """Stands at other ranks for a part that only rank 0 has.

    :param name: of the part in the optimizer
    """

    def __init__(self, name: str, rank: int) -> None:
        self._name, self._rank = name, rank

    def pause_updates(self) -> AbstractContextManager[None]:
        """There are no updates here."""
        return nullcontext()

    def update_epoch(self, epoch: int, *, others: int = 0) -> None:
        """Nobody is told."""

    def shutdown(self, timeout: float | None = None) -> None:
        """Nothing runs here."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        raise InvalidStateError(
            f"{self._name}.{name} must be asked for at rank 0, which talks to the swarm, got rank {self._rank}"
        )


def listening_parts(given: Mapping[str, Any], options: Options, rank: int) -> tuple[RankState, AtRankZero]:
    """The state averager's and the tracker's places at a rank other than 0.

    :param given: the arguments of the optimizer
    """
    local = options.use_local_updates
    # Where rank 0 steps for all, the others need no copies to step on, and no statistics.
    holder = OptimizerHolder(
        given["optimizer"], given["params"], local and options.offload_optimizer, None if local else False
    )
    state = RankState(holder, given["scheduler"], given["extra_tensors"], local, options.reuse_grad_buffers)
    return state, AtRankZero("tracker", rank)


def facts(options: Options, state: HeldState) -> dict[str, Any]:
    """What must be the same at all ranks, by the parameter that decides it."""
    return {
        "run_id": options.run_id,
        "target_batch_size": options.target_batch_size,
        "use_local_updates": options.use_local_updates,
        "reuse_grad_buffers": options.reuse_grad_buffers,
        "averaging_timeout": options.averaging_timeout,
        "load_state_timeout": options.load_state_timeout,
        "optimizer": type(state.holder.optimizer).__name__,
        "scheduler": type(state.scheduler).__name__,
        "params": _shapes(state.holder.model_parameters),
        "extra_tensors": _shapes(state.extra_tensors),
    }


def _shapes(tensors: Sequence[torch.Tensor]) -> str:
    """In few words, since a model has hundreds of them."""
    shapes = hashlib.sha256(str([(tuple(t.shape), t.dtype) for t in tensors]).encode()).hexdigest()[:8]
    return f"{len(tensors)} tensors with {sum(t.numel() for t in tensors)} elements (shapes {shapes})"
