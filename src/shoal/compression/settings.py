"""Whether two codecs are configured alike: equality of attributes that may be tensors, arrays or functions."""

from __future__ import annotations

import functools
from types import FunctionType
from typing import Any

import numpy as np
import torch


def alike(first: Any, second: Any) -> bool:
    """Whether two values mean the same. Tensors and arrays are compared by their elements, functions by what they do as
    far as their code and what they close over tell, and objects without an equality of their own by their attributes.

    Never raises for values that it does not know: they are not alike unless they say so.
    """
    try:
        return _alike(first, second)
    except Exception:  # noqa: BLE001 - attributes of users' codecs: their __eq__ may do anything
        return False


def _alike(first: Any, second: Any) -> bool:
    if first is second:
        return True
    match first, second:
        case torch.Tensor(), torch.Tensor():
            same_kind = (first.dtype, first.shape) == (second.dtype, second.shape)
            return same_kind and torch.equal(first.cpu(), second.cpu())
        case np.ndarray(), np.ndarray():
            return first.dtype == second.dtype and np.array_equal(first, second)
        case dict(), dict():
            return first.keys() == second.keys() and all(_alike(first[key], second[key]) for key in first)
        case (list(), list()) | (tuple(), tuple()):
            return len(first) == len(second) and all(map(_alike, first, second))
        case FunctionType(), FunctionType():
            return _alike(_parts(first), _parts(second))
        case functools.partial(), functools.partial():
            return _alike(
                (first.func, first.args, first.keywords), (second.func, second.args, second.keywords)
            )
    if type(first) is type(second) and getattr(type(first), "__eq__", None) is object.__eq__:
        if hasattr(first, "__dict__"):
            return _alike(vars(first), vars(second))
        return _alike(first.__reduce_ex__(2), second.__reduce_ex__(2))  # as pickle sees it
    return bool(first == second)


def _parts(function: FunctionType) -> tuple[Any, ...]:
    cells = tuple(cell.cell_contents for cell in function.__closure__ or ())
    return function.__code__, function.__defaults__, function.__kwdefaults__, cells
