"""What ranks tell each other at a step, and what follows from it. Pure."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from shoal.errors import InvalidStateError, InvalidValueError, RankError
from shoal.optim.parameters import values_of
from shoal.optim.report import EpochReport

PRINTED = 4096
"""Elements of a gradient that its print is made of."""
TOLERANCE = 1e-3
"""By which prints of equal gradients may differ: clipping on devices of different kinds rounds differently."""


@dataclass(frozen=True)
class Batch:
    """What one rank, or all ranks together, processed before a step.

    :param samples: how many
    :param loss: its mean, if a closure gave one
    :param prints: a few numbers that are equal for equal gradients; none if there is no gradient
    """

    samples: int
    loss: float | None = None
    prints: tuple[float, ...] = ()


@dataclass(frozen=True)
class Arrival:
    """A rank has come to a call, and brings ``content``."""

    call: str
    content: Any = None


@dataclass(frozen=True)
class Failure:
    """A rank failed in a call."""

    call: str
    reason: str


@dataclass(frozen=True)
class Hold:
    """Rank 0 is not done yet."""


@dataclass(frozen=True)
class Done:
    """Rank 0 is done.

    :param result: of the call
    :param changes: what the other ranks take over, apart from tensors; None: nothing has changed
    """

    result: Any = None
    changes: Any = None


@dataclass(frozen=True)
class Outcome:
    """How a step ended at rank 0.

    :param updated: with local updates, whether the inner optimizer took a step
    :param cleared: whether accumulated gradients were cleared
    :param report: of the epoch that the step ended, if it did
    """

    updated: bool = False
    cleared: bool = False
    report: EpochReport | None = None


def contents(told: Sequence[Any], own_rank: int) -> list[Any]:
    """What the ranks brought to a call.

    :raises RankError: another rank failed
    :raises InvalidStateError: the ranks are in different calls
    """
    for rank, one in enumerate(told):
        if isinstance(one, Failure) and rank != own_rank:
            raise RankError(f"rank {rank} failed in {one.call}: {one.reason}")
    calls = [one.call for one in told]
    for rank, call in enumerate(calls):
        if call != calls[0]:
            raise InvalidStateError(
                f"all ranks of a peer must make the same calls: rank 0 is in {calls[0]}, rank {rank} in {call}"
            )
    return [one.content for one in told]


def together(batches: Sequence[Batch]) -> Batch:
    """The batch of a peer: the samples of all its ranks, with equal gradients, so that it counts at all or at none.

    :raises InvalidStateError: the ranks have different gradients
    """
    for rank, batch in enumerate(batches):
        if not _alike(batches[0].prints, batch.prints):
            raise InvalidStateError(
                f"gradients must be the same at all ranks of a peer, and rank {rank} has others than rank 0: wrap the "
                "model in DistributedDataParallel, and leave no_sync() for the last backward() before step()"
            )
    samples = sum(batch.samples for batch in batches)
    weighted = [(batch.loss, batch.samples) for batch in batches if batch.loss is not None]
    loss = sum(loss * weight for loss, weight in weighted) / sum(w for _, w in weighted) if weighted else None
    return Batch(samples, loss, batches[0].prints)


def prints(parameters: Sequence[torch.Tensor]) -> tuple[float, ...]:
    """Which parameter is the last one that has a gradient; sum and norm of the beginning of that gradient."""
    for index in range(len(parameters) - 1, -1, -1):
        grad = parameters[index].grad
        if grad is not None:
            begin = values_of(grad.detach()).reshape(-1)[:PRINTED].double()
            return (float(index), *torch.stack([begin.sum(), begin.norm()]).tolist())
    return ()


def _alike(one: Sequence[float], other: Sequence[float]) -> bool:
    if len(one) != len(other) or one[:1] != other[:1]:
        return False
    scale = max(map(abs, (*one[1:], *other[1:])), default=0.0)
    return all(
        math.isclose(a, b, rel_tol=TOLERANCE, abs_tol=TOLERANCE * scale)
        or not (math.isfinite(a) or math.isfinite(b))
        for a, b in zip(one[1:], other[1:], strict=True)
    )


def check_facts(facts: Sequence[dict[str, Any]]) -> None:
    """All ranks must have been made alike.

    :param facts: of each rank, by the parameter that decides them
    :raises InvalidValueError: a rank was made otherwise than rank 0
    """
    for rank, of_rank in enumerate(facts):
        for name, value in of_rank.items():
            if value != facts[0][name]:
                raise InvalidValueError(
                    f"{name} must be the same at all ranks, got {facts[0][name]} at rank 0 and {value} at rank {rank}"
                )


def reason_of(error: BaseException) -> str:
    """An error in one line, for the other ranks."""
    return f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
