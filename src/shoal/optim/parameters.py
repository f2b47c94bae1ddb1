"""Which parameters of a model are trained, and so averaged."""

from __future__ import annotations

from collections.abc import Iterable

import torch

from shoal.errors import InvalidTypeError, InvalidValueError


def trained_parameters(parameters: Iterable[torch.nn.Parameter]) -> tuple[torch.nn.Parameter, ...]:
    """Those that require grad, each once.

    :raises InvalidTypeError: something else than tensors; :raises InvalidValueError: none
    """
    found: dict[int, torch.nn.Parameter] = {}
    for parameter in parameters:
        if not isinstance(parameter, torch.Tensor):
            raise InvalidTypeError(f"parameters must be tensors, got {type(parameter).__name__}")
        if parameter.requires_grad:
            found.setdefault(id(parameter), parameter)
    if not found:
        raise InvalidValueError("parameters must have at least one that requires grad, got none")
    return tuple(found.values())
