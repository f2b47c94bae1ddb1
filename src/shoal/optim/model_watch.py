"""Notices that a model is not the one any more for which an optimizer was made: :class:`ModelWatch`."""

from __future__ import annotations

import gc
import weakref
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch

from shoal.errors import InvalidStateError

_ADVICE = "Make another optimizer for the model as it is now"
_KINDS = {"_parameters": "parameter", "_buffers": "buffer"}


@dataclass(frozen=True)
class _Place:
    """Where a module has a tensor. Modules are referred to weakly, and tensors not even so: ``swap_tensors`` refuses
    those.
    """

    module: weakref.ref[torch.nn.Module]
    kind: str
    name: str
    owner: str

    def holds(self, tensor: torch.Tensor) -> bool:
        module = self.module()
        return module is not None and _entries(module, self.kind).get(self.name) is tensor

    def __str__(self) -> str:
        fate = "is gone" if self.module() is None else "has another one now"
        return f"the {_KINDS[self.kind]} {self.name!r} of a {self.owner}, which {fate}"


class ModelWatch:
    """Knows a model's tensors as they were when its optimizer was made.

    A model that is moved to another device, compiled or wrapped keeps its parameters. One that is cast, sharded or
    loaded with ``assign=True`` afterwards would be trained by an optimizer that has other tensors, without a word.
    Tensors that were in no module are left alone, but for their shapes and dtypes.

    :param tensors: the model's own, by name
    :param casts: whether dtypes may change, since the optimizer works on copies
    :param frozen: the optimizer's parameters that did not require grad: they are not averaged, and so must stay frozen
    """

    def __init__(
        self, tensors: Mapping[str, torch.Tensor], casts: bool, frozen: Iterable[torch.Tensor] = ()
    ) -> None:
        self._names, self._tensors, self._casts = tuple(tensors), tuple(tensors.values()), casts
        self._frozen = tuple(frozen)
        self._kinds = [(tuple(t.shape), t.dtype) for t in self._tensors]
        self._places = _find(enumerate(self._tensors))

    def check(self, after_backward: bool = False) -> None:
        """Takes some microseconds a tensor.

        :param after_backward: a tensor without gradient whose module is gone is not used
        :raises InvalidStateError: a tensor is of another shape or dtype, or the model has another one in its place
        """
        self._check_kinds()
        suspects = [
            index
            for index, places in self._places.items()
            if not any(place.holds(self._tensors[index]) for place in places)
        ]
        if not suspects:
            return
        self._places.update(
            _find((index, self._tensors[index]) for index in suspects)
        )  # of one that was wrapped
        lost = [index for index in suspects if self._is_lost(index, after_backward)]
        if lost:
            index = lost[0]
            more = f", and {len(lost) - 1} more" if len(lost) > 1 else ""
            raise InvalidStateError(
                f"{self._names[index]} was {self._places[index][0]}{more}: what is trained is not used. {_ADVICE}"
            )

    def _check_kinds(self) -> None:
        thawed = [tuple(tensor.shape) for tensor in self._frozen if tensor.requires_grad]
        if thawed:
            raise InvalidStateError(
                f"{len(thawed)} parameters were frozen when the optimizer was made and require grad now, the first of "
                f"shape {list(thawed[0])}: this peer would train them alone. {_ADVICE}, or freeze them after the "
                "optimizer was made"
            )
        for name, tensor, (shape, dtype) in zip(self._names, self._tensors, self._kinds, strict=True):
            if tensor.shape != shape or (tensor.dtype != dtype and not self._casts):
                raise InvalidStateError(
                    f"{name} was {_kind(shape, dtype)} when the optimizer was made, and is "
                    f"{_kind(tuple(tensor.shape), tensor.dtype)} now: cast a model before its optimizer is made. "
                    f"{_ADVICE}"
                )

    def _is_lost(self, index: int, after_backward: bool) -> bool:
        tensor, places = self._tensors[index], self._places[index]
        if any(place.holds(tensor) for place in places):
            return False
        if any(place.module() is not None for place in places):
            return True
        return after_backward and tensor.requires_grad and tensor.grad is None


def _find(tensors: Iterable[tuple[int, torch.Tensor]]) -> dict[int, list[_Place]]:
    """For each number the places of its tensor, in all modules of this process; those of no tensor are left out."""
    wanted = {id(tensor): index for index, tensor in tensors}
    is_module: dict[type, bool] = {}
    found: defaultdict[int, list[_Place]] = defaultdict(list)
    for one in gc.get_objects():
        kind = type(one)
        if kind not in is_module:
            is_module[kind] = issubclass(kind, torch.nn.Module)
        if not is_module[kind]:
            continue
        for entries in _KINDS:
            for name, value in list(_entries(one, entries).items()):
                index = wanted.get(id(value))
                if index is not None:
                    found[index].append(_Place(weakref.ref(one), entries, name, kind.__name__))
    return dict(found)


def _entries(module: torch.nn.Module, kind: str) -> dict[str, torch.Tensor | None]:
    entries = object.__getattribute__(module, "__dict__").get(kind)
    return entries if isinstance(entries, dict) else {}  # those of a compiled script are in C++


def _kind(shape: tuple[int, ...], dtype: torch.dtype) -> str:
    return f"{str(dtype).removeprefix('torch.')} {list(shape)}"
