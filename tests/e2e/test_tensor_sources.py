"""Averagers of modules and functions, through real background processes and sockets."""

from __future__ import annotations

import logging

import pytest
import torch
from real_swarm import STEP_TIMEOUT, Swarm, step_all

import shoal
from shoal.errors import AllreduceException

pytestmark = pytest.mark.xdist_group("averaging")  # one worker, so that the background processes are shared


def models_of(value: float) -> list[torch.nn.Module]:
    models = [torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.BatchNorm1d(3)) for _ in range(2)]
    for number, model in enumerate(models):
        fill(model, number * value)
    return models


def fill(model: torch.nn.Module, value: float) -> None:
    state = {name: torch.full_like(one, value) for name, one in model.state_dict().items()}
    model.load_state_dict(state, assign=True)


def means(model: torch.nn.Module) -> set[float]:
    return {parameter.detach().mean().item() for parameter in model.parameters()}


def test_a_module_whose_parameters_were_replaced_is_averaged_and_its_buffers_are_not(swarm: Swarm):
    models = models_of(1)
    averagers = [swarm.peer(model, size=2, prefix="Qwen2.5-0.5B") for model in models]
    step_all(averagers)
    assert [means(model) for model in models] == [{0.5}, {0.5}]
    for number, model in enumerate(models):
        fill(model, 4.0 * number)
    step_all(averagers)
    assert [means(model) for model in models] == [{2.0}, {2.0}]
    assert [model[1].running_mean.mean().item() for model in models] == [0, 4]


def test_a_list_of_parameters_that_were_replaced_is_a_warning_at_the_next_step(
    swarm: Swarm, caplog: pytest.LogCaptureFixture
):
    models = models_of(1)
    averagers = [swarm.peer(list(model.parameters()), size=2) for model in models]
    step_all(averagers)
    assert "no longer used" not in caplog.text
    fill(models[0], 7)
    with caplog.at_level(logging.WARNING):
        step_all(averagers)
    (line,) = [record.message for record in caplog.records if "no longer used" in record.message]
    assert "averaged_tensors[0] was the parameter 'weight' of a Linear, which is another tensor now" in line
    assert means(models[0]) == {7}


def test_gradients_of_each_round_by_a_function(swarm: Swarm):
    models = [torch.nn.Linear(2, 1, bias=False) for _ in range(2)]
    for model in models:
        model.weight.grad = torch.zeros(1, 2)
    averagers = [swarm.peer(lambda model=model: [model.weight.grad], size=2) for model in models]
    for scale in (1, 3):
        for number, model in enumerate(models):
            model.zero_grad()
            model(torch.full((1, 2), float(number * scale))).sum().backward()
        step_all(averagers, weight=scale)
        assert [model.weight.grad.tolist() for model in models] == [[[scale / 2] * 2]] * 2


def test_a_gradient_that_is_not_there_fails_the_own_step_by_name(swarm: Swarm):
    model = torch.nn.Linear(2, 1)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)

    def gradients() -> list[tuple[str, torch.Tensor | None]]:
        return [(name, parameter.grad) for name, parameter in model.named_parameters()]

    tensors = [torch.zeros(1, 2), torch.zeros(1)]
    averagers = [swarm.peer(gradients, size=2), swarm.peer(tensors, size=2)]
    model.bias.grad = None
    steps = [averager.step(wait=False, timeout=STEP_TIMEOUT, allow_retries=False) for averager in averagers]
    with pytest.raises(AllreduceException, match=r"averaged_tensors\['bias'\] must be .* got NoneType"):
        steps[0].result(60)
    steps[1].cancel()


def test_a_joiner_downloads_what_the_module_has_then(swarm: Swarm):
    donor, joiner = models_of(1)
    averager = swarm.peer(donor, size=2)
    fill(donor, 9)
    state = swarm.peer(joiner, size=2).load_state_from_peers(timeout=STEP_TIMEOUT)
    assert state is not None
    assert {tensor.mean().item() for tensor in state[1]} == {9}
    assert isinstance(averager, shoal.DecentralizedAverager)
