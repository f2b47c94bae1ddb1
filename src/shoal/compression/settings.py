"""Whether two codecs are configured alike: equality of attributes that may be tensors, arrays or functions."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from types import FunctionType, MethodType
from typing import Any, TypeAlias

import numpy as np
import torch

Pairs: TypeAlias = set[tuple[int, int]]


def alike(first: Any, second: Any, owners: tuple[object, object] = (None, None)) -> bool:
    """Whether two values mean the same. Tensors and arrays are compared by their elements, functions by what they do as
    far as their code and what they close over tell, and objects without an equality of their own by their attributes.
    NaN equals NaN.

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
        case (list(), list()) | (tuple(), tuple()):
            return len(first) == len(second) and _all_alike(first, second, pairs)
        case (FunctionType(), FunctionType()) | (MethodType(), MethodType()):
            return _all_alike(_parts(first), _parts(second), pairs)
        case functools.partial(), functools.partial():
            return _all_alike(
                (first.func, first.args, first.keywords), (second.func, second.args, second.keywords), pairs
            )
    if type(first) is type(second) and getattr(type(first), "__eq__", None) is object.__eq__:
        pairs = pairs | {(id(first), id(second))}
        if hasattr(first, "__dict__"):
            return _alike(vars(first), vars(second), pairs)
        return _alike(first.__reduce_ex__(2), second.__reduce_ex__(2), pairs)  # as pickle sees it
    return bool(first == second)


def _same_elements(first: torch.Tensor, second: torch.Tensor) -> bool:
    return torch.equal(first, second) or torch.allclose(first, second, rtol=0, atol=0, equal_nan=True)


def _all_alike(first: Sequence[Any], second: Sequence[Any], pairs: Pairs) -> bool:
    return all(_alike(*both, pairs) for both in zip(first, second, strict=True))


def _parts(function: FunctionType | MethodType) -> tuple[Any, ...]:
    if isinstance(function, MethodType):
        return function.__func__, function.__self__
    cells = tuple(cell.cell_contents for cell in function.__closure__ or ())
    return function.__code__, function.__defaults__, function.__kwdefaults__, cells
