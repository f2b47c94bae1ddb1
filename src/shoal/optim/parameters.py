"""Which parameters of a model are trained, and so averaged; and what their gradients have."""

from __future__ import annotations

from collections.abc import Iterable

import torch

from shoal.averaging.trainer.tensor_checks import is_distributed
from shoal.errors import InvalidTypeError, InvalidValueError


def trained_parameters(parameters: Iterable[torch.nn.Parameter]) -> tuple[torch.nn.Parameter, ...]:
    """Those that require grad, each once.

    :raises InvalidTypeError: something else than tensors, or a DTensor
    :raises InvalidValueError: none
    """
    found: dict[int, torch.nn.Parameter] = {}
    for parameter in parameters:
        if not isinstance(parameter, torch.Tensor):
            raise InvalidTypeError(f"parameters must be tensors, got {type(parameter).__name__}")
        if is_distributed(parameter):
            raise InvalidTypeError(
                f"parameters must be whole, got a DTensor of shape {list(parameter.shape)}: FSDP2 and tensor "
                "parallelism shard a model. Give the optimizer a model that is not sharded, as DDP trains; or average "
                "what each rank holds with a DecentralizedAverager of lambda: [p.to_local() for p in parameters]"
            )
        if parameter.requires_grad:
            found.setdefault(id(parameter), parameter)
    if not found:
        raise InvalidValueError("parameters must have at least one that requires grad, got none")
    return tuple(found.values())


def values_of(gradient: torch.Tensor) -> torch.Tensor:
    """All values of a gradient; of a sparse one, as embeddings have it, those that it has."""
    return gradient.coalesce().values() if gradient.is_sparse else gradient


def are_finite(gradients: Iterable[torch.Tensor]) -> bool:
    """Whether none has NaN or infinity."""
    return all(bool(torch.isfinite(values_of(gradient)).all()) for gradient in gradients)
