"""The outer optimizer of DiLoCo (Douillard et al. 2023, arXiv:2311.08105, algorithm 1): no I/O, no averaging,
only arithmetic.

Each peer starts a round from the same parameters, the *base*, and takes local steps. How far it has come,
base minus local parameters, is its *outer gradient*. Averaged over the peers, it is given to SGD with
Nesterov momentum, which moves the base.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import torch


class OuterOptimizer:
    """Nesterov's accelerated gradient as ``torch.optim.SGD(nesterov=True)`` computes it, on the averaged
    outer gradient.

    Peers whose base, momentum and averaged gradients are equal stay equal. ``base`` and ``momentum`` are the
    tensors of which a peer that joins later needs a copy.

    :param parameters: where the base begins; they are copied
    :param learning_rate: the paper's best is 0.7
    :param momentum: the paper's best is 0.9
    """

    def __init__(
        self, parameters: Iterable[torch.Tensor], *, learning_rate: float = 0.7, momentum: float = 0.9
    ) -> None:
        self._learning_rate = learning_rate
        self._decay = momentum
        self.base = [parameter.detach().clone() for parameter in parameters]
        self.momentum = [torch.zeros_like(tensor) for tensor in self.base]

    @torch.no_grad()
    def write_gradient(self, parameters: Iterable[torch.Tensor], out: Sequence[torch.Tensor]) -> None:
        """Write the outer gradient of a peer whose local steps have come to ``parameters`` into the tensors
        ``out``.
        """
        for base, parameter, gradient in zip(self.base, parameters, out, strict=True):
            torch.sub(base, parameter, out=gradient)

    @torch.no_grad()
    def step(self, gradients: Sequence[torch.Tensor]) -> None:
        """Move the base by the averaged outer gradient; ``gradients`` stay as they are."""
        for base, momentum, gradient in zip(self.base, self.momentum, gradients, strict=True):
            momentum.mul_(self._decay).add_(gradient)
            base.sub_(self._learning_rate * (gradient + self._decay * momentum))

    @torch.no_grad()
    def rebase(self, parameters: Iterable[torch.Tensor], given: Iterable[torch.Tensor]) -> None:
        """Begin a round whose first local steps were taken while the outer gradients were averaged: they are kept.

        :param parameters: start from the base now, plus what they have changed since they were ``given``
        :param given: the parameters whose gradient was averaged
        """
        for base, parameter, old in zip(self.base, parameters, given, strict=True):
            parameter.add_(base - old)

    @torch.no_grad()
    def copy_base_to(self, parameters: Iterable[torch.Tensor]) -> None:
        """Begin a round: local steps start from the base."""
        for base, parameter in zip(self.base, parameters, strict=True):
            parameter.copy_(base)

    @property
    def state(self) -> list[torch.Tensor]:
        """The tensors themselves: all of the base, then all of the momentum."""
        return [*self.base, *self.momentum]

    @property
    def norm(self) -> float:
        """Euclidean norm of the base: tells at a glance whether peers have the same."""
        return math.sqrt(sum(float(tensor.square().sum()) for tensor in self.base))

    @torch.no_grad()
    def load_state(self, state: Sequence[torch.Tensor]) -> None:
        """Take over what :attr:`state` was at another peer.

        :raises ValueError: it is of another model; nothing has changed then
        """
        own = self.state
        if [tensor.shape for tensor in state] != [tensor.shape for tensor in own]:
            raise ValueError(f"the state is of another model: {len(state)} tensors; this one has {len(own)}")
        for mine, theirs in zip(own, state, strict=True):
            mine.copy_(theirs)
