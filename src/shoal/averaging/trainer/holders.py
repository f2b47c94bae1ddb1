"""Notices averaged tensors that are no longer used: what is averaged then reaches no model, without a word.

The averager keeps the tensors that it was given. ``load_state_dict(assign=True)`` and ``zero_grad()`` put others in
their places. The evidence is in the *slots* in which torch keeps tensors: a module's parameters and buffers, a
parameter's ``grad``, an optimizer's state. Those that hold an averaged tensor, or another view of its memory, when
the averager is made are looked at before each step. A tensor is reported if none of its slots has it any more,
nor any other slot of the process: modules are wrapped and parametrized, and their tensors move. Tensors that were
in no slot (plain lists, copies) are left alone.

Slots are found among the objects that the garbage collector knows, and their owners are referred to weakly.
"""

from __future__ import annotations

import contextlib
import gc
import logging
import sys
import weakref
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from shoal.averaging.trainer.tensor_checks import memory_of

logger = logging.getLogger(__name__)

SHOWN = 3


class Slot(Protocol):
    """A place in which torch keeps a tensor. None refers to a tensor, not even weakly: a tensor with a weak reference
    is refused by ``torch.utils.swap_tensors``, which modules may be told to use.
    """

    @property
    def is_gone(self) -> bool:
        """Whether its owner does not exist any more."""

    def holds(self, tensor: torch.Tensor, look: Look) -> bool:
        """Whether a tensor, or another view of its memory, is in it now."""

    def __str__(self) -> str:
        """What it is, and what has become of it if it does not hold the tensor any more."""


class Look:
    """What is found in one look at many slots."""

    def __init__(self) -> None:
        self._of_optimizers: dict[int, set[int]] = {}

    def state_of(self, optimizer: torch.optim.Optimizer) -> set[int]:
        """The identities of all that an optimizer keeps for its parameters."""
        known = self._of_optimizers.get(id(optimizer))
        if known is None:
            states = _states(optimizer).values()
            known = {
                id(value)
                for state in list(states)
                if isinstance(state, dict)
                for value in list(state.values())
            }
            self._of_optimizers[id(optimizer)] = known
        return known


@dataclass(frozen=True)
class _ModuleSlot:
    """A parameter or buffer of a module."""

    module: weakref.ref[torch.nn.Module]
    kind: str
    name: str
    owner: str

    @property
    def is_gone(self) -> bool:
        return self.module() is None

    def holds(self, tensor: torch.Tensor, look: Look) -> bool:
        return _is_same(self._read(), tensor)

    def _read(self) -> Any:
        module = self.module()
        return None if module is None else _entries(module, self.kind).get(self.name)

    def __str__(self) -> str:
        what = "parameter" if self.kind == "_parameters" else "buffer"
        now = "None" if self._read() is None else "another tensor"
        return (
            f"the {what} {self.name!r} of a {self.owner}, which is {'gone' if self.is_gone else f'{now} now'}"
        )


@dataclass(frozen=True)
class _GradientSlot:
    """The gradient of a leaf: in C++, where references are counted."""

    shape: tuple[int, ...]

    @property
    def is_gone(self) -> bool:
        return False

    def holds(self, tensor: torch.Tensor, look: Look) -> bool:
        return not _is_alone(tensor)

    def __str__(self) -> str:
        return f"the gradient of a parameter of shape {list(self.shape)}, which has another one or none now"


@dataclass(frozen=True)
class _OptimizerSlot:
    """An entry of what an optimizer keeps for a parameter."""

    optimizer: weakref.ref[torch.optim.Optimizer]
    key: Any
    owner: str

    @property
    def is_gone(self) -> bool:
        return self.optimizer() is None

    def holds(self, tensor: torch.Tensor, look: Look) -> bool:
        optimizer = self.optimizer()
        return optimizer is not None and id(tensor) in look.state_of(optimizer)

    def __str__(self) -> str:
        fate = "is gone" if self.is_gone else "holds another tensor now"
        return f"{self.key!r} in the state of an optimizer ({self.owner}), which {fate}"


class UsageWatch:
    """Looks, before each step, whether the averaged tensors are still in the slots in which they were."""

    def __init__(self, tensors: Sequence[torch.Tensor], labels: Sequence[str], prefix: str) -> None:
        """``tensors``: the averager's only sequence of them; what the user gave is alive still."""
        self._tensors = tensors
        self._labels = labels
        self._prefix = prefix
        searched = any(map(self._may_be_in_a_slot, range(len(tensors))))
        self._slots = find_slots(enumerate(tensors)) if searched else {}

    def check(self) -> None:
        """Warn, once for each tensor, of those that are no longer used."""
        look = Look()
        suspects = [
            index
            for index, slots in list(self._slots.items())  # of several threads that step, each may look
            if not any(slot.holds(self._tensors[index], look) for slot in slots)
        ]
        if not suspects:
            return
        moved = find_slots((index, self._tensors[index]) for index in suspects)
        lost: list[tuple[int, Slot]] = []
        for index in suspects:
            former = self._slots.pop(index, [])
            if index in moved:
                self._slots[index] = moved[index]
                continue
            replaced = [slot for slot in former if not slot.is_gone]
            if replaced or (former and not self._is_held(index)):
                lost.append((index, (replaced or former)[0]))
        if lost:
            self._warn(lost)

    def _warn(self, lost: Sequence[tuple[int, Slot]]) -> None:
        shown = "; ".join(f"{self._labels[index]} was {slot}" for index, slot in lost[:SHOWN])
        more = f"; and {len(lost) - SHOWN} more" if len(lost) > SHOWN else ""
        gradients = any(isinstance(slot, _GradientSlot) for _, slot in lost)
        advice = (
            "Give the averager a function that returns those of each round, lambda: [p.grad for p in "
            "model.parameters()]; or keep them, with zero_grad(set_to_none=False)"
            if gradients
            else "Give the averager the module itself, or a function that returns the tensors of each round; or make "
            "a new averager"
        )
        logger.warning(
            "%s: %d of the %d averaged tensors are no longer used, and their averages reach nothing: %s%s. %s",
            self._prefix,
            len(lost),
            len(self._tensors),
            shown,
            more,
            advice,
        )

    def _may_be_in_a_slot(self, index: int) -> bool:
        """False if nothing but a list of the user's refers to a tensor; this spares the search, some 0.1 s."""
        if type(self._tensors[index]) is not torch.Tensor:
            return True
        if self._references(index) > 1:
            return True
        return not _is_alone(self._tensors[index])

    def _is_held(self, index: int) -> bool:
        """Whether anything but the averager and optimizers refers to a tensor: it may be used without a module."""
        return self._references(index) > _references_of_optimizers(self._tensors[index])

    def _references(self, index: int) -> int:
        """Python's references to a tensor, beyond that of the averager's own sequence."""
        alone = (torch.empty(0),)
        return sys.getrefcount(self._tensors[index]) - sys.getrefcount(alone[0])


def find_slots(tensors: Iterable[tuple[int, torch.Tensor]]) -> dict[int, list[Slot]]:
    """For each number the slots of this process in which its tensor, or another view of its memory, is."""
    search = _Search(tensors)
    kinds: dict[type, Any] = {}
    # Wrappers of tensors have their own ideas of what .grad is.
    with torch._C.DisableTorchFunctionSubclass():
        for one in gc.get_objects():
            kind = type(one)
            if kind not in kinds:
                kinds[kind] = search.look_for(kind)
            look = kinds[kind]
            if look is not None:
                look(one)
    return dict(search.found)


class _Search:
    """Looks into one object after the other for slots that hold one of some tensors."""

    def __init__(self, tensors: Iterable[tuple[int, torch.Tensor]]) -> None:
        self.found: defaultdict[int, list[Slot]] = defaultdict(list)
        self._by_identity: dict[int, int] = {}
        self._by_memory: defaultdict[object, list[int]] = defaultdict(list)
        for index, tensor in tensors:
            self._by_identity[id(tensor)] = index
            memory = _memory(tensor)
            if memory is not None and memory[1] != 0:
                self._by_memory[memory].append(index)

    def look_for(self, kind: type) -> Any:
        """What looks into objects of a type; None: they have no slots."""
        if issubclass(kind, torch.nn.Module):
            return self._look_into_module
        if issubclass(kind, torch.Tensor):
            return self._look_at_gradient
        if issubclass(kind, torch.optim.Optimizer):
            return self._look_into_optimizer
        return None

    def _look_into_module(self, module: torch.nn.Module) -> None:
        for kind in ("_parameters", "_buffers"):
            for name, value in list(_entries(module, kind).items()):
                for index in self._indices(value):
                    slot = _ModuleSlot(weakref.ref(module), kind, name, type(module).__name__)
                    self.found[index].append(slot)

    def _look_at_gradient(self, tensor: torch.Tensor) -> None:
        with contextlib.suppress(RuntimeError, NotImplementedError):  # wrappers of other tensors
            gradient = tensor.grad if tensor.is_leaf else None
            for index in self._indices(gradient):
                self.found[index].append(_GradientSlot(tuple(tensor.shape)))

    def _look_into_optimizer(self, optimizer: torch.optim.Optimizer) -> None:
        for state in list(_states(optimizer).values()):
            for key, value in list(state.items()) if isinstance(state, dict) else ():
                index = self._by_identity.get(id(value))
                if index is not None:
                    slot = _OptimizerSlot(weakref.ref(optimizer), key, type(optimizer).__name__)
                    self.found[index].append(slot)

    def _indices(self, value: Any) -> Iterable[int]:
        if not isinstance(value, torch.Tensor):
            return ()
        index = self._by_identity.get(id(value))
        if index is not None:
            return (index,)
        return self._by_memory.get(_memory(value), ())


def _entries(module: torch.nn.Module, kind: str) -> dict[str, Any]:
    entries = object.__getattribute__(module, "__dict__").get(kind)
    return entries if isinstance(entries, dict) else {}  # those of a compiled script are in C++


def _is_same(value: Any, tensor: torch.Tensor) -> bool:
    if value is tensor:
        return True
    if not isinstance(value, torch.Tensor):
        return False
    memory = _memory(value)
    return memory is not None and memory == _memory(tensor)


def _memory(tensor: torch.Tensor) -> tuple[str, int] | None:
    local = getattr(tensor, "_local_tensor", None)  # of a DTensor
    return memory_of(local if isinstance(local, torch.Tensor) else tensor)


def _is_alone(tensor: torch.Tensor) -> bool:
    """Whether no other object of C++ refers to a tensor (as a gradient), and no other tensor to its memory. False also
    if torch does not count.
    """
    count_tensors = getattr(tensor, "_use_count", None)
    count_storages = getattr(torch._C, "_storage_Use_Count", None)
    if count_tensors is None or count_storages is None or tensor.layout != torch.strided:
        return False
    storage = tensor.untyped_storage()  # itself the second reference
    return bool(count_tensors() == 1 and count_storages(storage._cdata) <= 2)


def are_temporary(tensors: Sequence[torch.Tensor]) -> bool:
    """Whether nothing but ``tensors``, which the caller alone has, refers to any of them or to their memory: what is
    written to them is gone with them. Not said of memory that torch has borrowed (numpy's, shared memory), nor of
    tensors that are not dense.
    """
    alone = (torch.empty(0),)
    own = sys.getrefcount(alone[0])
    return all(
        type(tensors[index]) is torch.Tensor
        and sys.getrefcount(tensors[index]) == own
        and _is_alone(tensors[index])
        and tensors[index].untyped_storage().resizable()
        for index in range(len(tensors))
    )


def _references_of_optimizers(tensor: torch.Tensor) -> int:
    """How many times the optimizers of this process have a tensor as a parameter, and as the key of its state. What
    several have in common, as a wrapper and the optimizer in it, counts once.
    """
    optimizers = [one for one in gc.get_objects() if issubclass(type(one), torch.optim.Optimizer)]
    states = {id(state): state for state in map(_states, optimizers)}
    lists = {id(parameters): parameters for one in optimizers for parameters in _parameter_lists(one)}
    return sum(tensor in state for state in states.values()) + sum(
        parameter is tensor for parameters in lists.values() for parameter in parameters
    )


def _states(optimizer: torch.optim.Optimizer) -> Mapping[Any, Any]:
    """What an optimizer keeps, by parameter; nothing of a wrapper that has no such attribute, or an odd one."""
    with contextlib.suppress(Exception):  # properties of others' classes, which may not be ready
        if isinstance(optimizer.state, Mapping):
            return optimizer.state
    return {}


def _parameter_lists(optimizer: torch.optim.Optimizer) -> list[list[Any]]:
    """The lists of an optimizer's parameters; none of a wrapper that has no such attribute, or an odd one."""
    with contextlib.suppress(Exception):
        return [group["params"] for group in optimizer.param_groups]
    return []
