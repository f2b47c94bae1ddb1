"""Whether two codecs are configured alike: equality of attributes that may be tensors, arrays or functions."""

from __future__ import annotations

import functools
import math
from collections import deque
from collections.abc import Sequence
from types import FunctionType, MethodType
from typing import Any, TypeAlias

import numpy as np
import torch

Pairs: TypeAlias = set[tuple[int, int]]


class Configured:
    """What has settings: its attributes, but for those whose names begin with an underscore, such as tables that are
    made when they are needed. Equal to others of its class that are configured alike.
    """

    def __eq__(self, other: object) -> bool:
        if type(other) is not type(self):
            return NotImplemented
        return alike(settings_of(self), settings_of(other), (self, other))

    def __hash__(self) -> int:
        return hash(type(self))


def settings_of(owner: Configured) -> dict[str, Any]:
    """By name."""
    return {name: value for name, value in vars(owner).items() if not name.startswith("_")}


def alike(first: Any, second: Any, owners: tuple[object, object] = (None, None)) -> bool:
    """Whether two values mean the same. Tensors and arrays are compared by their elements, functions by what they do as
    far as their code and what they close over tell, and objects without an equality of their own, or with one that
    raises, as that of a dataclass with tensors does, by their attributes. NaN equals NaN.

    Never raises for values that it does not know: they are not alike unless they say so.

    :param owners: what refers to the two, and may be referred to by them
    """
    try:
        return _alike(first, second, {(id(owners[0]), id(owners[1]))})
    except Exception:  # noqa: BLE001 - attributes of users' codecs: their __eq__ may do anything
        return False


def _alike(first: Any, second: Any, pairs: Pairs) -> bool:
    """``pairs``: of what is being compared already, somewhere above; they are alike if the rest is."""
    if first is second or (id(first), id(second)) in pairs:
        return True
    match first, second:
        case torch.Tensor(), torch.Tensor():
            same_kind = (first.dtype, first.shape) == (second.dtype, second.shape)
            return same_kind and _same_elements(first.cpu(), second.cpu())
        case np.ndarray(), np.ndarray():
            is_float = first.dtype.kind in "fc"
            return first.dtype == second.dtype and np.array_equal(first, second, equal_nan=is_float)
        case float(), float():
            return first == second or (math.isnan(first) and math.isnan(second))
        case dict(), dict():
            keys = list(first)
            return first.keys() == second.keys() and _all_alike(
                [first[key] for key in keys], [second[key] for key in keys], pairs
            )
        case (list(), list()) | (tuple(), tuple()) | (deque(), deque()):
            return len(first) == len(second) and _all_alike(first, second, pairs)
        case (FunctionType(), FunctionType()) | (MethodType(), MethodType()):
            return _all_alike(_parts(first), _parts(second), pairs)
        case functools.partial(), functools.partial():
            return _all_alike(
                (first.func, first.args, first.keywords), (second.func, second.args, second.keywords), pairs
            )
    return _same_objects(first, second, pairs)


def _same_objects(first: Any, second: Any, pairs: Pairs) -> bool:
    """By their own equality, or by their attributes where they have none or it raises."""
    if type(first) is not type(second):
        return bool(first == second)
    if getattr(type(first), "__eq__", None) is not object.__eq__:
        try:
            return bool(first == second)
        except Exception:
            if not _attributes(first):
                raise  # what it is made of is not to be seen
    return _alike(_attributes(first), _attributes(second), pairs | {(id(first), id(second))})


def _attributes(thing: Any) -> Any:
    if isinstance(thing, Configured):
        return settings_of(thing)
    return vars(thing) if hasattr(thing, "__dict__") else thing.__reduce_ex__(2)  # as pickle sees it


def _same_elements(first: torch.Tensor, second: torch.Tensor) -> bool:
    return torch.equal(first, second) or torch.allclose(first, second, rtol=0, atol=0, equal_nan=True)


def _all_alike(first: Sequence[Any], second: Sequence[Any], pairs: Pairs) -> bool:
    return all(_alike(*both, pairs) for both in zip(first, second, strict=True))


def _parts(function: FunctionType | MethodType) -> tuple[Any, ...]:
    if isinstance(function, MethodType):
        return function.__func__, function.__self__
    cells = tuple(cell.cell_contents for cell in function.__closure__ or ())
    return function.__code__, function.__defaults__, function.__kwdefaults__, cells
