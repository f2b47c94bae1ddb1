"""A ``state_dict`` as plain values and a list of tensors, and back. Pure.

Dictionaries become lists of pairs, since their keys may be numbers. What is no plain value, such as a function, stays
at home: the receiver keeps its own.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

MAX_DEPTH = 16
"""Deeper nesting is refused: no optimizer has it, and a hostile donor could exhaust the stack."""

_PLAIN = (bool, int, float, str, type(None))


def pack(value: Any, tensors: list[torch.Tensor]) -> list[Any]:
    """``value`` in lists and plain values; its tensors are appended to ``tensors``."""
    if isinstance(value, torch.Tensor):
        tensors.append(value)
        return ["tensor", len(tensors) - 1]
    if isinstance(value, Mapping):
        return ["dict", [[key, pack(item, tensors)] for key, item in value.items()]]
    if isinstance(value, list | tuple):
        kind = "list" if isinstance(value, list) else "tuple"
        return [kind, [pack(item, tensors) for item in value]]
    return ["value", value] if isinstance(value, _PLAIN) else ["absent"]


def unpack(packed: Any, tensors: Sequence[torch.Tensor], own: Any = None, depth: int = 0) -> Any:
    """What :func:`pack` was given; what stayed at home is taken from ``own``, at the same place.

    :raises ValueError: not made by :func:`pack`
    """
    if depth > MAX_DEPTH or not isinstance(packed, list | tuple) or not packed:
        raise ValueError("no packed value")
    match list(packed):
        case ["tensor", int(index)] if 0 <= index < len(tensors):
            return tensors[index]
        case ["value", value] if isinstance(value, _PLAIN):
            return value
        case ["absent"]:
            return own
        case ["dict", [*pairs]]:
            owns = own if isinstance(own, Mapping) else {}
            return {key: unpack(item, tensors, owns.get(key), depth + 1) for key, item in map(_pair, pairs)}
        case ["list" | "tuple" as kind, [*items]]:
            mine = (
                list(own) if isinstance(own, list | tuple) and len(own) == len(items) else [None] * len(items)
            )
            made = [unpack(item, tensors, one, depth + 1) for item, one in zip(items, mine, strict=True)]
            return made if kind == "list" else tuple(made)
    raise ValueError(f"no packed value: {packed[0]!r}")


def _pair(pair: Any) -> tuple[Any, Any]:
    if not isinstance(pair, list | tuple) or len(pair) != 2 or not isinstance(pair[0], _PLAIN):
        raise ValueError("no pair of a key and a value")
    return pair[0], pair[1]
