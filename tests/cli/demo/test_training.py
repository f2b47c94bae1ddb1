"""The training of the demo, with the averaging of the swarm replaced by a plain mean in this process."""

from __future__ import annotations

import pytest
import torch

from shoal.cli.demo.data import Digits, deal, load_samples
from shoal.cli.demo.settings import Settings
from shoal.cli.demo.training import FOUNDERS_SEED, References, Trainer

ABSENCE = range(20, 32)
"""Rounds in which the last peer is gone, killed; in the round after them its replacement joins."""


def average(trainers: list[Trainer], weights: list[float]) -> None:
    total = sum(weights)
    with torch.no_grad():
        for tensors in zip(*(trainer.tensors for trainer in trainers), strict=True):
            mean = sum(
                (tensor * (weight / total) for tensor, weight in zip(tensors, weights, strict=True)),
                start=torch.zeros_like(tensors[0]),
            )
            for tensor in tensors:
                tensor.copy_(mean)


def train_swarm(digits: Digits, settings: Settings, absence: range = ABSENCE) -> float:
    trainers = {
        index: Trainer(part, settings, model_seed=FOUNDERS_SEED, data_seed=index)
        for index, part in enumerate(digits.parts)
    }
    last = settings.peers - 1
    for round_ in range(settings.rounds):
        weights = {index: float(len(digits.parts[index])) for index in trainers}
        if round_ in absence:
            trainers.pop(last, None)
            weights.pop(last, None)
            if len(trainers) == 1:  # nobody to average with: the survivor waits
                continue
        for index, trainer in trainers.items():
            trainer.train(round_, settings.local_steps)
            del index
        if round_ == absence.stop:
            trainers[last] = Trainer(digits.parts[last], settings, model_seed=77, data_seed=77)
            weights[last] = 1e-6 * len(digits.parts[last])
        average(list(trainers.values()), [weights[index] for index in trainers])
    return trainers[0].accuracy(digits.held_out)


@pytest.mark.parametrize("peers", [2, 4, 8])
def test_swarm_that_loses_a_peer_is_near_central_training(peers: int) -> None:
    settings = Settings(prefix="test", peers=peers)
    digits = deal(load_samples(), peers)
    references = References(digits, settings, digits.parts)
    references.advance(settings.rounds)
    assert references.central() > 0.96
    assert max(references.alone().values()) < 0.6
    assert train_swarm(digits, settings) > references.central() - 0.015
