"""What the ranks of a peer share of its training state."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import torch

from shoal.optim.state.holder import OptimizerHolder
from shoal.optim.state.packing import pack

if TYPE_CHECKING:
    from shoal.optim.state.averager import TrainingStateAverager


@dataclass(frozen=True)
class Changes:
    """What the other ranks take over from rank 0, beside the values of tensors.

    :param optimizer: the packed state of the inner optimizer: all of it with local updates, otherwise its groups
    :param specs: shapes and dtypes of the optimizer's tensors
    """

    epoch: int
    scheduler: dict[str, Any] | None
    optimizer: Any
    specs: tuple[tuple[tuple[int, ...], torch.dtype], ...]


class HeldState(Protocol):
    """What both kinds of a training state have."""

    holder: OptimizerHolder
    local_epoch: int

    @property
    def scheduler(self) -> Any: ...

    @property
    def extra_tensors(self) -> Sequence[torch.Tensor]: ...


def shared_tensors(state: HeldState, local_updates: bool) -> list[torch.Tensor]:
    """Whose values are the same at all ranks: what the optimizer works on if all step alike, otherwise the model."""
    holder = state.holder
    return [*(holder.parameters if local_updates else holder.model_parameters), *state.extra_tensors]


class SpokenState:
    """The training state of rank 0, as the others get it.

    :param state: of rank 0
    :param local_updates: all ranks take the steps of the inner optimizer, so that they need all of it
    """

    def __init__(self, state: TrainingStateAverager, local_updates: bool) -> None:
        self._state, self._local_updates = state, local_updates
        self._told: tuple[int, int] | None = None

    def changes(self) -> tuple[Changes | None, list[torch.Tensor]]:
        """What has changed since the last call other than by a local update, with its tensors; None: nothing."""
        state = self._state
        now = (state.local_epoch, state.rewritten)
        if now == self._told:
            return None, []
        self._told = now
        of_optimizer: list[torch.Tensor] = []
        inner = state.optimizer.state_dict()
        if not self._local_updates:
            inner["state"] = {}
        # A delayed step may have moved the rates of the inner optimizer: they hold once the model's groups have them.
        inner["param_groups"] = [
            {**group, **{name: value for name, value in shown.items() if name != "params"}}
            for group, shown in zip(inner["param_groups"], state.holder.param_groups, strict=True)
        ]
        packed = pack(inner, of_optimizer)
        scheduler = None if state.scheduler is None else state.scheduler.state_dict()
        specs = tuple((tuple(tensor.shape), tensor.dtype) for tensor in of_optimizer)
        changes = Changes(state.local_epoch, scheduler, packed, specs)
        return changes, [*shared_tensors(state, self._local_updates), *of_optimizer]
