"""The training of the demo, with the averaging of the swarm replaced by a plain mean in this process."""

from __future__ import annotations

import pytest
import torch
from tests.swept import rest_swept

from shoal.cli.demo.data import Digits, deal, load_samples
from shoal.cli.demo.protocol import Part
from shoal.cli.demo.settings import Settings
from shoal.cli.demo.training import FOUNDERS_SEED, References, Trainer, load_references

ABSENCE = range(35, 45)
"""Rounds in which the last peer is gone, killed; in the round after them its replacement joins."""


def average(trainers: list[Trainer], weights: list[float]) -> None:
    total = sum(weights)
    with torch.no_grad():
        for tensors in zip(*(trainer.tensors for trainer in trainers), strict=True):
            mean = torch.stack([t * (w / total) for t, w in zip(tensors, weights, strict=True)]).sum(0)
            for tensor in tensors:
                tensor.copy_(mean)


def train_swarm(digits: Digits, settings: Settings) -> float:
    """The accuracy of a swarm whose last peer is killed, and replaced later by one that knows nothing."""
    trainers = [
        Trainer(part, settings, model_seed=FOUNDERS_SEED, data_seed=index)
        for index, part in enumerate(digits.parts)
    ]
    weights = [float(len(part)) for part in digits.parts]
    for round_ in range(settings.rounds):
        if round_ == ABSENCE.start:
            trainers.pop()
        if len(trainers) > 1:  # else the survivor waits for somebody to average with
            for trainer in trainers:
                trainer.train(round_, settings.local_steps)
        if round_ == ABSENCE.stop:
            trainers.append(Trainer(digits.parts[-1], settings, model_seed=77, data_seed=77))
            average(trainers, [*weights[:-1], weights[-1] * 1e-6])
        else:
            average(trainers, weights[: len(trainers)])
    return trainers[0].accuracy(digits.held_out)


@pytest.mark.parametrize("peers", rest_swept((2, 4, 8)))
def test_swarm_that_loses_a_peer_is_near_central_training(peers: int) -> None:
    settings = Settings(prefix="test", peers=peers)
    digits = deal(load_samples(), peers)
    references = References(digits, settings, digits.parts)
    references.advance(settings.rounds)
    assert references.central() > 0.96
    assert max(references.alone().values()) < 0.6
    assert train_swarm(digits, settings) > references.central() - 0.012


def test_tensors_are_updated_in_place_and_restored() -> None:
    settings = Settings(prefix="test")
    digits = deal(load_samples(), 4)
    trainer = Trainer(digits.parts[0], settings, model_seed=1, data_seed=1)
    parameters = list(trainer.model.parameters())
    assert trainer.tensors[: len(parameters)] == parameters
    saved = trainer.copy_tensors()
    before = trainer.accuracy(digits.held_out)
    assert trainer.train(0, steps=20) > 0
    assert all(not torch.equal(a, b) for a, b in zip(trainer.tensors, saved, strict=True))
    assert trainer.accuracy(digits.held_out) != before
    trainer.restore_tensors(saved)
    assert all(torch.equal(a, b) for a, b in zip(trainer.tensors, saved, strict=True))
    assert trainer.accuracy(digits.held_out) == before


def test_momentum_is_among_the_averaged_tensors() -> None:
    """Two trainers of the same data and tensors stay the same, which they would not without their momenta."""
    settings = Settings(prefix="test")
    digits = deal(load_samples(), 4)
    first, second = (Trainer(digits.parts[0], settings, model_seed=seed, data_seed=5) for seed in (1, 2))
    first.train(0, steps=10)
    second.train(0, steps=10)
    second.restore_tensors(first.copy_tensors())
    first.train(0, steps=10)
    second.train(0, steps=10)
    assert all(torch.equal(a, b) for a, b in zip(first.tensors, second.tensors, strict=True))


def test_references_advance_by_rounds() -> None:
    settings = Settings(prefix="test", rounds=40)
    references = load_references(settings, [Part(1), Part(2, reserve=True)])
    untrained = references.central()
    references.advance(3)
    references.advance(2)
    assert references.rounds == 3
    assert references.central() > untrained
    assert list(references.alone()) == ["alone: digits 1 5 9", "alone: digits 2 5 8"]
    references.advance(1000)
    assert references.rounds == 40


def test_learning_rate_decays_to_zero() -> None:
    settings = Settings(prefix="test", rounds=100)
    rates = [settings.learning_rate_at(round_) for round_ in range(101)]
    assert set(rates[:60]) == {settings.learning_rate}
    assert rates[61:] == sorted(rates[61:], reverse=True)
    assert rates[80] == pytest.approx(settings.learning_rate / 2)
    assert rates[100] == 0
