"""The demo's model and its training: SGD with momentum on one process's own images."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from shoal.cli.demo.data import CLASSES, PIXELS, Digits, Samples, deal, load_samples
from shoal.cli.demo.protocol import Part
from shoal.cli.demo.settings import Settings

HIDDEN = 64
FOUNDERS_SEED = 1
"""Founders begin with the same weights; a later worker begins with others, and catches up by averaging."""


class Trainer:
    """A 64-64-10 perceptron, its optimizer and the images that it learns from.

    ``tensors`` are the trainer's own parameters and momentum buffers, which training updates in place: averaging
    both of them (and not the parameters alone) lets peers with different classes take larger local steps.
    """

    def __init__(self, samples: Samples, settings: Settings, *, model_seed: int, data_seed: int) -> None:
        self._images = torch.from_numpy(samples.images)
        self._labels = torch.from_numpy(samples.labels)
        self._settings = settings
        self._rng = torch.Generator().manual_seed(data_seed)
        self.model = _make_model(model_seed)
        self._optimizer = torch.optim.SGD(
            self.model.parameters(), lr=settings.learning_rate, momentum=settings.momentum
        )
        momenta = []
        for parameter in self.model.parameters():
            momentum = torch.zeros_like(parameter)
            self._optimizer.state[parameter]["momentum_buffer"] = momentum
            momenta.append(momentum)
        self.tensors: list[torch.Tensor] = [*self.model.parameters(), *momenta]

    def train(self, round_: int, steps: int) -> float:
        """Do ``steps`` steps at the learning rate of this round.

        :returns: the mean loss over them
        """
        for group in self._optimizer.param_groups:
            group["lr"] = self._settings.learning_rate_at(round_)
        total = 0.0
        for _ in range(steps):
            batch = torch.randint(len(self._labels), (self._settings.batch_size,), generator=self._rng)
            loss = nn.functional.cross_entropy(self.model(self._images[batch]), self._labels[batch])
            self._optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            self._optimizer.step()
            total += float(loss.detach())
        return total / steps

    @torch.no_grad()
    def accuracy(self, samples: Samples) -> float:
        """The fraction of ``samples`` that the model names rightly."""
        predicted = self.model(torch.from_numpy(samples.images)).argmax(dim=1)
        return float((predicted == torch.from_numpy(samples.labels)).float().mean())

    def copy_tensors(self) -> list[torch.Tensor]:
        return [tensor.detach().clone() for tensor in self.tensors]

    @torch.no_grad()
    def restore_tensors(self, tensors: list[torch.Tensor]) -> None:
        for mine, saved in zip(self.tensors, tensors, strict=True):
            mine.copy_(saved)


def _make_model(seed: int) -> nn.Sequential:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(PIXELS, HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, CLASSES))


class References:
    """What the swarm is measured against: each of ``parts`` trained alone, and all images trained centrally.

    A model trained alone does as many steps a round as a peer of the swarm; the central one as many as all founders
    together, so that it sees as many images.
    """

    def __init__(self, digits: Digits, settings: Settings, parts: Sequence[Samples]) -> None:
        self._held_out = digits.held_out
        self._settings = settings
        self._alone = {
            f"alone: digits {' '.join(map(str, part.classes))}": Trainer(
                part, settings, model_seed=FOUNDERS_SEED, data_seed=index
            )
            for index, part in enumerate(parts)
        }
        self._central = Trainer(digits.training, settings, model_seed=FOUNDERS_SEED, data_seed=settings.peers)
        self.rounds = 0

    def advance(self, rounds: int) -> None:
        """Train until ``rounds`` rounds are done, at most those of the settings."""
        steps = self._settings.local_steps
        for round_ in range(self.rounds, min(rounds, self._settings.rounds)):
            for trainer in self._alone.values():
                trainer.train(round_, steps)
            self._central.train(round_, steps * self._settings.peers)
            self.rounds = round_ + 1

    def alone(self) -> dict[str, float]:
        """The held-out accuracy of each part trained alone, so far."""
        return {name: trainer.accuracy(self._held_out) for name, trainer in self._alone.items()}

    def central(self) -> float:
        return self._central.accuracy(self._held_out)


def load_references(settings: Settings, parts: Sequence[Part]) -> References:
    """Load the images and make the models that these parts of them are compared with."""
    set_threads()
    digits = deal(load_samples(), settings.peers)
    return References(digits, settings, [digits.part(part.index, reserve=part.reserve) for part in parts])


def set_threads() -> None:
    """One thread a process: the models are small, and all peers share this machine."""
    torch.set_num_threads(1)
