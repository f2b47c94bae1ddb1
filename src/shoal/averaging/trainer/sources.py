"""Where an averager's tensors come from, and what they are called in messages.

Users give tensors as they have them: a module, a list, names with tensors, or a function. A module and a function
are *sources*: asked anew in each round, so that a tensor that was replaced meanwhile does not matter. Reads
properties of tensors, never their values.
"""

from __future__ import annotations

import inspect
import logging
import math
from collections.abc import Callable, ItemsView, Iterable, KeysView, Mapping
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from typing import Any, Protocol, TypeAlias

import torch

from shoal.averaging.trainer.tensor_checks import same_elements
from shoal.errors import InvalidStateError, InvalidTypeError, InvalidValueError

logger = logging.getLogger(__name__)

_NAME = "averaged_tensors"
_ALLOWED = (
    "a torch.nn.Module, an iterable of tensors, tensors by name (a state_dict, named_parameters()), or a function "
    "that returns the tensors of each round"
)
SHOWN_NAMES = 5
FROZEN_SHARE = 0.1
"""Of the bytes: from here on parameters that are sent and never change are worth a warning."""

Tensors: TypeAlias = (
    torch.nn.Module | Mapping[str, torch.Tensor] | Iterable[torch.Tensor] | Iterable[tuple[str, torch.Tensor]]
)
AveragedTensors: TypeAlias = Tensors | Callable[[], Tensors]
"""What users may give as ``averaged_tensors``."""


class HeldTensors(tuple[torch.Tensor, ...]):
    """The averaged tensors as users see them: ``tensors[0] += 1`` works, replacing one of them is an error."""

    __slots__ = ()

    @classmethod
    def of(cls, tensors: Iterable[torch.Tensor]) -> HeldTensors:
        """``tensors`` themselves if they are held so already."""
        return tensors if isinstance(tensors, cls) else cls(tensors)

    def __setitem__(self, index: Any, value: Any) -> None:
        if value is not self[index]:  # what in-place operators assign is the tensor itself
            raise InvalidTypeError(
                f"tensors[{index!r}] = ... would put another object in place of an averaged tensor; "
                f"write into it: tensors[{index!r}].copy_(value)"
            )


@dataclass(frozen=True)
class NamedTensors:
    """Tensors in their order, and what errors call them: ``averaged_tensors['layer.weight']``, or a number."""

    tensors: HeldTensors
    labels: tuple[str, ...]


class TensorSource(Protocol):
    """Gives the tensors of each round."""

    runs_users_code: bool
    """Whether :meth:`find` calls a function of the user's, which needs the lock."""

    def find(self) -> NamedTensors:
        """The tensors as they are now: the same labels each time.

        :raises UsageError: they are not what they were; names the tensor
        """


def take_tensors(averaged_tensors: Any) -> tuple[NamedTensors, TensorSource | None]:
    """What a user gave for ``averaged_tensors``: its tensors, and their source if they are to be found anew.

    The tensors themselves are not looked at: see :func:`~.schema.check_tensors`.

    :raises InvalidTypeError: no tensors are in it, or not where they are looked for; says what to pass
    :raises InvalidValueError: it is empty
    """
    if isinstance(averaged_tensors, torch.nn.Module):
        module = ModuleSource(averaged_tensors)
        return module.find(), module
    if _is_function(averaged_tensors):
        function = FunctionSource(averaged_tensors)
        return function.find(), function
    return _collect(averaged_tensors), None


class ModuleSource:
    """The parameters of a module that required grad when the averager was made, found by name in each round."""

    runs_users_code = False

    def __init__(self, module: torch.nn.Module) -> None:
        self._module = module
        self._names = tuple(name for name, parameter in module.named_parameters() if parameter.requires_grad)
        self._warned = False
        if not self._names:
            raise InvalidValueError(
                f"{_NAME} is a {type(module).__name__} of which no parameter requires grad, so that none would be "
                "averaged; to average them all the same, pass list(module.parameters())"
            )

    def find(self) -> NamedTensors:
        present = dict(self._module.named_parameters(remove_duplicate=False))
        missing = [name for name in self._names if name not in present]
        if missing:
            raise InvalidStateError(
                f"{label_of(missing[0])} is no longer a parameter of the {type(self._module).__name__}"
                f"{_more(missing)}; make a new averager"
            )
        found = HeldTensors(present[name] for name in self._names)
        if not self._warned:
            self._warn_of_strays(present, found)
        return NamedTensors(found, tuple(map(label_of, self._names)))

    def _warn_of_strays(
        self, present: Mapping[str, torch.nn.Parameter], found: Iterable[torch.Tensor]
    ) -> None:
        """Say what is trained and not averaged: it came, was unfrozen or untied after the averager was made."""
        averaged = set(map(id, found))
        others = {name: one for name, one in present.items() if one.requires_grad and id(one) not in averaged}
        if not others:
            return
        elements = set(map(same_elements, found))  # tied weights may be other objects, too
        strays = [name for name, one in others.items() if same_elements(one) not in elements]
        if strays:
            self._warned = True
            logger.warning(
                "%s requires grad and is not averaged, since it did not when the averager was made, was not there, "
                "or was tied to another parameter%s; make a new averager, at all peers",
                label_of(strays[0]),
                _more(strays),
            )


class FunctionSource:
    """The tensors that a function of the user's returns in each round."""

    runs_users_code = True

    def __init__(self, function: Callable[[], Any]) -> None:
        self._function = function
        self._labels: tuple[str, ...] | None = None
        try:
            inspect.signature(function).bind()
        except TypeError as e:
            raise InvalidTypeError(
                f"{_NAME} must be callable without arguments if it is a function, got {function!r}: {e}"
            ) from None
        except ValueError:  # a builtin that says nothing of its parameters
            pass

    def find(self) -> NamedTensors:
        found = _collect(self._call())
        if self._labels is None:
            self._labels = found.labels
        elif found.labels != self._labels:
            raise InvalidStateError(_difference(self._labels, found.labels))
        return found

    def _call(self) -> Any:
        # Without grad: p.to_local() and p[:10] are parts of leaves then, and not computed by autograd.
        with torch.no_grad():
            if self._labels is None:
                return self._function()  # what it raises is for its author, as it is
            try:
                return self._function()
            except Exception as e:
                raise InvalidStateError(
                    f"{_NAME}, the function, raised {type(e).__name__}: {e}; it must return the tensors of each round"
                ) from e


def warn_of_frozen(named: NamedTensors, prefix: str) -> None:
    """Say so if much of what is averaged in every round is parameters that are frozen, beside others that are not."""
    if not any(tensor.requires_grad for tensor in named.tensors):
        return  # detached ones say nothing of whether they are trained
    sizes = [tensor.numel() * tensor.itemsize for tensor in named.tensors]
    frozen = [
        index
        for index, tensor in enumerate(named.tensors)
        if isinstance(tensor, torch.nn.Parameter) and not tensor.requires_grad
    ]
    share = sum(sizes[index] for index in frozen) / max(1, sum(sizes))
    if share >= FROZEN_SHARE:
        largest = max(frozen, key=lambda index: sizes[index])
        logger.warning(
            "%s: %.4g %% of the bytes that each round sends are frozen parameters (requires_grad=False), the largest "
            "of %d is %s; give the averager the trained ones alone: the module itself, or "
            "[p for p in model.parameters() if p.requires_grad], at all peers",
            prefix,
            math.floor(1000 * share) / 10,
            len(frozen),
            named.labels[largest],
        )


def _is_function(given: Any) -> bool:
    # A mapping or a list that can be called is taken for what it holds.
    return callable(given) and not isinstance(given, type | torch.Tensor | Iterable)


def _collect(given: Any) -> NamedTensors:
    """The tensors of anything but a function, and their labels."""
    if isinstance(given, torch.nn.Module):
        return ModuleSource(given).find()
    _refuse_wrong_kinds(given)
    if isinstance(given, Mapping):
        return _named(list(given.items()))
    items = list(given)
    if not items:
        hint = "" if isinstance(given, list | tuple) else ": a generator can be used once"
        raise InvalidValueError(f"{_NAME} must hold at least one tensor, got none{hint}")
    if all(isinstance(item, tuple) and len(item) == 2 and isinstance(item[0], str) for item in items):
        return _named(items)
    return NamedTensors(HeldTensors(map(_local_part, items)), tuple(map(label_of, range(len(items)))))


def _refuse_wrong_kinds(given: Any) -> None:
    """:raises InvalidTypeError: nothing that holds tensors; says what to pass"""
    if isinstance(given, torch.Tensor):
        raise InvalidTypeError(f"{_NAME} must be {_ALLOWED}, got a single tensor: pass [tensor]")
    if isinstance(given, torch.optim.Optimizer):
        raise InvalidTypeError(
            f"{_NAME} must be {_ALLOWED}, got an optimizer ({type(given).__name__}): pass its parameters, "
            "[p for group in optimizer.param_groups for p in group['params']]"
        )
    if isinstance(given, type):
        raise InvalidTypeError(
            f"{_NAME} must be {_ALLOWED}, got the class {given.__name__}: pass an object of it"
        )
    if isinstance(given, AbstractSet) and not isinstance(given, KeysView | ItemsView):
        raise InvalidTypeError(
            f"{_NAME} must be {_ALLOWED}, got a {type(given).__name__}, whose order differs from peer to peer, and "
            "tensors are averaged by their order: pass a list"
        )
    if isinstance(given, str | bytes) or not isinstance(given, Iterable):
        raise InvalidTypeError(f"{_NAME} must be {_ALLOWED}, got {type(given).__name__}")


def _named(items: list[tuple[Any, Any]]) -> NamedTensors:
    """Tensors by name; of names for the same elements, as a state_dict has them for tied weights, the first counts."""
    if not items:
        raise InvalidValueError(f"{_NAME} must hold at least one tensor, got none")
    kept: dict[Any, Any] = {}
    seen: set[object] = set()
    for name, tensor in items:
        if name in kept:
            raise InvalidValueError(f"{_NAME} must have each name once, got {name!r} twice")
        elements = same_elements(tensor) if isinstance(tensor, torch.Tensor) else name
        if elements not in seen:
            seen.add(elements)
            kept[name] = tensor
    return NamedTensors(HeldTensors(map(_local_part, kept.values())), tuple(map(label_of, kept)))


def _local_part(tensor: Any) -> Any:
    """``DTensor.to_local()`` outside of ``no_grad`` says that autograd computed it: its memory is that of the leaf."""
    if (
        isinstance(tensor, torch.Tensor)
        and tensor.grad_fn is not None
        and "_ToTorchTensor" in tensor.grad_fn.name()
    ):
        return tensor.detach()
    return tensor


def label_of(name: Any) -> str:
    """What errors call the averaged tensor with this name or number."""
    return f"{_NAME}[{name!r}]"


def _more(names: list[str]) -> str:
    if len(names) == 1:
        return ""
    shown = ", ".join(map(repr, names[1 : 1 + SHOWN_NAMES]))
    return f" (and {len(names) - 1} more: {shown}{', ...' if len(names) > 1 + SHOWN_NAMES else ''})"


def _difference(before: tuple[str, ...], now: tuple[str, ...]) -> str:
    start = f"{_NAME}, the function, must return the same tensors in each round, in the same order"
    missing = [label for label in before if label not in now]
    new = [label for label in now if label not in before]
    if missing:
        return (
            f"{start}: it returned {len(before)} when the averager was made, and {missing[0]} is missing now"
        )
    if new:
        return f"{start}: it returned {len(before)} when the averager was made, and {new[0]} is new"
    first = next(label for label, former in zip(now, before, strict=True) if label != former)
    return f"{start}: {first} is at another place now"
