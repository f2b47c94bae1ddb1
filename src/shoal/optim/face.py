"""What torch, schedulers and frameworks call of an optimizer: groups, state, and what is saved."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch

from shoal.errors import InvalidStateError, InvalidValueError

if TYPE_CHECKING:
    from shoal.optim.gradients import GradientAverager
    from shoal.optim.options import Options
    from shoal.optim.progress.tracker import ProgressTracker
    from shoal.optim.ranks.roles import Ranks
    from shoal.optim.state.averager import TrainingStateAverager

_NAMES_PARAMETERS = "torch.distributed.checkpoint.state_dict"
"""torch's module that replaces the numbers of parameters in a state by their names."""


class TorchFace(torch.optim.Optimizer):
    """The part of :class:`~shoal.Optimizer` that is torch's. Groups are those of the model."""

    options: Options
    state_averager: TrainingStateAverager
    grad_averager: GradientAverager | None
    tracker: ProgressTracker
    auxiliary: bool
    _ranks: Ranks
    _made = False
    """Whether the constructor of torch's class has ended, which sets groups and state."""
    _samples = 0
    """Of the own epoch."""

    @property
    def local_epoch(self) -> int:
        """The epoch of this peer."""
        return self.state_averager.local_epoch

    def _begin_anew(self, others: int = 0) -> None:
        """A state was loaded: what was accumulated belongs to another one.

        :param others: peers that it came from
        """
        if self.grad_averager is not None:
            self.grad_averager.reset_accumulated_grads_()
        self._samples = 0
        self.tracker.update_epoch(self.local_epoch, others=others)
        self._set_priority()

    def _set_priority(self) -> None:
        """Joiners load the state of the latest epoch."""
        if not (self.auxiliary or self.state_averager.client_mode):
            self.state_averager.state_sharing_priority = self.local_epoch

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """Groups with the model's parameters; hyperparameters that are set in them count in the next update."""
        return self.state_averager.param_groups

    @param_groups.setter
    def param_groups(self, value: Any) -> None:
        if self._made:
            raise InvalidStateError("param_groups must be changed in place: set values in its dictionaries")

    @property
    def state(self) -> Any:
        """The inner optimizer's, with "local_epoch"."""
        return {**self.state_averager.optimizer.state, "local_epoch": self.local_epoch}

    @state.setter
    def state(self, value: Any) -> None:
        if self._made:
            raise InvalidStateError("state must be loaded with load_state_dict()")

    def state_dict(self) -> dict[str, Any]:
        """The inner optimizer's, with "local_epoch" and, if there is one, "scheduler" in its "state".

        Delayed work ends first, and is written into the model: what is saved then is of one moment. Of several ranks
        only rank 0 has the statistics, unless all take local updates. Load that at all.

        :raises InvalidStateError: it was called by ``get_optimizer_state_dict`` of torch, which has no place for these
        """
        if sys._getframe(1).f_globals.get("__name__") == _NAMES_PARAMETERS:
            raise InvalidStateError(
                "get_optimizer_state_dict() must not be used with shoal.Optimizer, as it takes nothing but parameters "
                "and would lose the epoch: give opt.state_dict() to torch.distributed.checkpoint.save() as it is"
            )
        self.state_averager.finish_delayed()
        inner = self.state_averager.optimizer.state_dict()
        extra: dict[str, Any] = {"local_epoch": self.local_epoch, **self._ranks.mark()}
        if self.state_averager.scheduler is not None:
            extra["scheduler"] = self.state_averager.scheduler.state_dict()
        return {**inner, "state": {**inner["state"], **extra}}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Load what :meth:`state_dict` gave; of hivemind's, too. The given dictionary stays as it is."""
        self.state_averager.finish_delayed()
        state = dict(state_dict.get("state", {}))
        if "local_epoch" not in state:
            raise InvalidValueError(
                "state_dict must have 'local_epoch' in its 'state': it is of another optimizer"
            )
        epoch, scheduler_state = int(state.pop("local_epoch")), state.pop("scheduler", None)
        holder, scheduler = self.state_averager.holder, self.state_averager.scheduler
        with self.state_averager.get_tensors():
            holder.load_state_dict({**state_dict, "state": self._ranks.part_of(state)})
            holder.parameters_from_model()
        if scheduler is not None:
            if scheduler_state is not None:
                scheduler.load_state_dict(dict(scheduler_state))
            else:
                scheduler.last_epoch = epoch  # the groups that were loaded have its learning rate
        with self.tracker.pause_updates():
            self.state_averager.local_epoch = epoch
            self.state_averager.rewritten += 1
            self._begin_anew()

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clear the gradients of the model."""
        if self.options.reuse_grad_buffers:
            raise InvalidStateError(
                "zero_grad() must not be called with reuse_grad_buffers=True: gradients are accumulated in param.grad"
            )
        for parameter in (p for group in self.param_groups for p in group["params"]):
            if parameter.grad is None:
                continue
            if set_to_none:
                parameter.grad = None
            else:
                parameter.grad.detach_().zero_()

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """An error: what is averaged is the same for life."""
        if self._made:
            raise InvalidStateError("parameter groups must be given when the optimizer is made")
