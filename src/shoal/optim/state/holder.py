"""An optimizer with the tensors that it works on: the model's own, or copies in float32 on the CPU (*offloaded*)."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TypeAlias

import torch

from shoal.errors import InvalidTypeError, InvalidValueError
from shoal.optim.parameters import trained_parameters
from shoal.optim.state.packing import unpack

Params: TypeAlias = Iterable[torch.Tensor] | Iterable[Mapping[str, Any]]
OptimizerFactory: TypeAlias = Callable[[list[dict[str, Any]]], torch.optim.Optimizer]
Group: TypeAlias = dict[str, Any]

_REWOUND = {"step": 0, "mu_product": 1}
"""State that counts steps, with what it is before the first one."""


class OptimizerHolder:
    """The inner optimizer, the model's parameters, and what passes between the two.

    :param optimizer: an instance, or a callable that takes parameter groups
    :param params: the model's parameters or groups; needed with a callable
    :param offload: let the optimizer work on copies; needs a callable
    :param initialize: make the optimizer's state without a step; None: if it has no tensor yet
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer | OptimizerFactory,
        params: Params | None,
        offload: bool,
        initialize: bool | None,
    ) -> None:
        self.offloaded = offload
        if isinstance(optimizer, torch.optim.Optimizer):
            if offload:
                raise InvalidValueError(
                    "optimizer must be a callable with offload_optimizer, got an instance, "
                    "which works on the model's own parameters; give lambda params: Optimizer(params, ...)"
                )
            self.optimizer = optimizer
            self._model_groups: list[Group] | None = None
        elif callable(optimizer):
            if params is None:
                raise InvalidValueError("params must be given if optimizer is a callable, got None")
            groups = as_groups(params)
            inner = (
                [{**g, "params": [_copy_of(p) for p in g["params"]]} for g in groups] if offload else groups
            )
            self.optimizer = optimizer(inner)
            self._model_groups = groups if offload else None
        else:
            raise InvalidTypeError(
                f"optimizer must be a torch optimizer or a callable, got {type(optimizer).__name__}"
            )
        inner_parameters = [p for g in self.optimizer.param_groups for p in g["params"]]
        model_parameters = [p for g in self._model_groups or self.optimizer.param_groups for p in g["params"]]
        trained = {id(p) for p in trained_parameters(model_parameters)}
        pairs = [
            pair for pair in zip(model_parameters, inner_parameters, strict=True) if id(pair[0]) in trained
        ]
        self.model_parameters = tuple(model for model, _ in pairs)
        self.parameters = tuple(inner for _, inner in pairs)
        self._agreed: list[Group] = []  # hyperparameters as both last had them
        self._hyperparameters_as_loaded()
        self.gradients = tuple(torch.zeros_like(p) for p in self.parameters) if offload else ()
        if initialize or (initialize is None and not has_tensors(self.optimizer)):
            initialize_state(self.optimizer)
        self._devices = [parameter.device for parameter in self.parameters]

    @property
    def param_groups(self) -> list[Group]:
        """The groups of the model: hyperparameters that are set in them count in the next step."""
        return self.optimizer.param_groups if self._model_groups is None else self._model_groups

    def hyperparameters_to_model(self) -> None:
        """The scheduler, or the optimizer itself, has set those of the inner optimizer."""
        if self._model_groups is not None:
            _hand_on(self.optimizer.param_groups, self._model_groups, self._agreed)

    def hyperparameters_from_model(self) -> None:
        """The user may have set those of the model; what the optimizer counts in its groups stays."""
        if self._model_groups is not None:
            _hand_on(self._model_groups, self.optimizer.param_groups, self._agreed)

    def _hyperparameters_as_loaded(self) -> None:
        """Those of the inner optimizer hold, whatever was set before."""
        if self._model_groups is not None:
            self._agreed = [_hyperparameters(group) for group in self.optimizer.param_groups]
            for group, values in zip(self._model_groups, self._agreed, strict=True):
                group.update(values)

    def follow_parameters(self) -> None:
        """Bring what the optimizer keeps for each parameter to its device: the model may have been moved."""
        devices = [parameter.device for parameter in self.parameters]
        if devices != self._devices:
            self._devices = devices
            move_state(self.optimizer)

    @torch.no_grad()
    def load_gradients(self, custom: bool) -> None:
        """Give the copies their gradients: those of the model, unless others fill ``gradients``."""
        if not self.offloaded:
            return
        for inner, model, grad in zip(self.parameters, self.model_parameters, self.gradients, strict=True):
            if not custom:
                grad.zero_() if model.grad is None else grad.copy_(model.grad)
            # The optimizer's zero_grad() may have taken it away. Without one it leaves a parameter alone.
            inner.grad = grad if model.requires_grad else None

    @torch.no_grad()
    def parameters_to_model(self) -> None:
        """Write what the optimizer works on into the model."""
        if self.offloaded:
            for inner, model in zip(self.parameters, self.model_parameters, strict=True):
                model.copy_(inner)

    @torch.no_grad()
    def parameters_from_model(self) -> None:
        """Take the model's values, which somebody has set."""
        if self.offloaded:
            for inner, model in zip(self.parameters, self.model_parameters, strict=True):
                inner.copy_(model)

    def statistics(self, names: Iterable[str]) -> list[tuple[str, torch.Tensor]]:
        """Those of each name, for all parameters, in their order.

        :raises InvalidValueError: the optimizer has no such tensors
        """
        found = []
        for name in names:
            for index, parameter in enumerate(self.parameters):
                value = self.optimizer.state.get(parameter, {}).get(name)
                if not isinstance(value, torch.Tensor):
                    raise InvalidValueError(
                        f"average_opt_statistics must name tensors of the optimizer's state, got {name!r}; "
                        f"there are {sorted(self.optimizer.state.get(parameter, {}))}"
                    )
                found.append((f"{name}.{index}", value))
        return found

    @torch.no_grad()
    def load_shared(
        self, packed: Any, tensors: Sequence[torch.Tensor], extras: Sequence[torch.Tensor]
    ) -> None:
        """Take what another peer shares: its parameters, extra tensors, and optimizer, all of it or nothing.

        :param packed: the optimizer's values, of which ``tensors`` has those after parameters and extra ones
        :raises InvalidValueError: it is of another model or optimizer
        """
        own = [*self.parameters, *extras]
        given, of_optimizer = tensors[: len(own)], tensors[len(own) :]
        shapes, wanted = [tuple(t.shape) for t in given], [tuple(t.shape) for t in own]
        if shapes != wanted:
            raise InvalidValueError(f"it must have tensors of the shapes {wanted}, got {shapes}")
        try:
            self.load_state_dict(unpack(packed, of_optimizer, self.optimizer.state_dict()))
        except (ValueError, TypeError, KeyError, AttributeError) as e:
            raise InvalidValueError(f"its optimizer is another: {e}") from e
        for target, source in zip(own, given, strict=True):
            target.copy_(source)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Load into the optimizer; groups that others refer to stay the same objects."""
        groups = self.optimizer.param_groups
        self.optimizer.load_state_dict(dict(state))
        for group, loaded in zip(groups, self.optimizer.param_groups, strict=True):
            group.update(loaded)
        self.optimizer.param_groups = groups
        self._hyperparameters_as_loaded()


def as_groups(params: Params) -> list[Group]:
    """Parameters, or groups of them, as groups.

    :raises InvalidValueError: a parameter twice
    :raises InvalidTypeError: neither parameters nor groups
    """
    if not isinstance(params, Iterable):
        raise InvalidTypeError(f"params must be parameters or groups of them, got {params!r}")
    given = list(params)
    groups: list[Group] = []
    if given and all(isinstance(item, Mapping) for item in given):
        for item in given:
            if not isinstance(item, Mapping) or "params" not in item:
                raise InvalidValueError(f"each group of params must have 'params', got {item!r}")
            held = item["params"]
            groups.append({**item, "params": [held] if isinstance(held, torch.Tensor) else list(held)})
    else:
        groups.append({"params": given})
    ids = [id(p) for group in groups for p in group["params"]]
    if len(set(ids)) < len(ids):
        raise InvalidValueError(f"params must have each parameter once, got {len(ids) - len(set(ids))} twice")
    return groups


def has_tensors(optimizer: torch.optim.Optimizer) -> bool:
    """Whether its state has any."""
    return any(isinstance(v, torch.Tensor) for state in optimizer.state.values() for v in state.values())


def initialize_state(optimizer: torch.optim.Optimizer) -> None:
    """Make the state that a first step would make, as it is before that step.

    The optimizer takes a step with zero gradients on copies of the parameters, without weight decay; counters are set
    back then. The parameters themselves are never touched.

    :raises InvalidValueError: its ``step`` needs a closure
    """
    groups = [dict(group) for group in optimizer.param_groups]
    copies = [[_with_zero_grad(p) for p in group["params"]] for group in groups]
    try:
        for group, own in zip(optimizer.param_groups, copies, strict=True):
            group["params"] = own
            if "weight_decay" in group:
                group["weight_decay"] = 0.0
        step: Callable[[Any], Any] = type(optimizer).step
        step(optimizer)
    except TypeError as e:
        raise InvalidValueError(
            f"optimizer must take step() without a closure to make its state, got {type(optimizer).__name__} ({e}); "
            "give initialize_optimizer=False"
        ) from e
    finally:
        for group, before in zip(optimizer.param_groups, groups, strict=True):
            group.update(before)
            for name in group.keys() - before.keys():  # such as a counter that a first step makes
                del group[name]
        for group, own in zip(groups, copies, strict=True):
            for parameter, copied in zip(group["params"], own, strict=True):
                if copied in optimizer.state:
                    optimizer.state[parameter] = _rewound(optimizer.state.pop(copied))


def move_state(optimizer: torch.optim.Optimizer) -> None:
    """Move the tensors of an optimizer's state to the devices of their parameters; counters stay, as torch has them."""
    for parameter, state in optimizer.state.items():
        for name, value in state.items():
            if isinstance(value, torch.Tensor) and value.dim() > 0 and value.device != parameter.device:
                state[name] = value.to(parameter.device)


def _rewound(state: dict[str, Any]) -> dict[str, Any]:
    for name, start in _REWOUND.items():
        value = state.get(name)
        if isinstance(value, torch.Tensor):
            value.fill_(start)
        elif value is not None:
            state[name] = type(value)(start)
    return state


def _with_zero_grad(parameter: torch.Tensor) -> torch.Tensor:
    copied = parameter.detach().clone().requires_grad_(parameter.requires_grad)
    if parameter.requires_grad:
        copied.grad = torch.zeros_like(copied)
    return copied


def _copy_of(parameter: torch.Tensor) -> torch.nn.Parameter:
    data = parameter.detach().to("cpu", torch.float32, copy=True)
    return torch.nn.Parameter(data, requires_grad=parameter.requires_grad)


def _hyperparameters(group: Group) -> Group:
    return {name: value for name, value in group.items() if name != "params"}


def _hand_on(source: list[Group], target: list[Group], agreed: list[Group]) -> None:
    """Give ``target`` what has changed in ``source`` since both last agreed, and nothing else."""
    for taken, given, before in zip(source, target, agreed, strict=True):
        for name, value in _hyperparameters(taken).items():
            if name not in before or not _is_same(value, before[name]):
                given[name] = before[name] = value


def _is_same(one: Any, other: Any) -> bool:
    if one is other:
        return True
    plain = (bool, int, float, str, tuple)
    return isinstance(one, plain) and isinstance(other, plain) and one == other
