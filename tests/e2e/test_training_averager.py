"""A trainer's tensors, averaged between peers: what :class:`shoal.TrainingAverager` promises."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch
from real_swarm import STEP_TIMEOUT, Swarm

import shoal
from shoal.errors import InvalidValueError

pytestmark = pytest.mark.xdist_group("averaging")


def training_averager(swarm: Swarm, value: float, **options: Any) -> tuple[Any, torch.nn.Parameter]:
    param = torch.nn.Parameter(torch.full((3,), value))
    param.grad = torch.full((3,), value)
    whole = {"average_parameters": True, "average_gradients": True}
    optimizer = torch.optim.Adam([param], lr=0.1)
    return swarm.start(shoal.TrainingAverager, optimizer, size=2, **whole, **options), param


def test_parameters_and_gradients_are_averaged_in_place(swarm: Swarm):
    peers = [training_averager(swarm, value, extra_tensors=[torch.tensor([value])]) for value in (1.0, 3.0)]
    futures = [a.step(threading.Lock(), wait=False, timeout=STEP_TIMEOUT) for a, _ in peers]
    assert [len(future.result(60)) for future in futures] == [2, 2]
    for averager, param in peers:
        assert param.grad is not None
        for tensor in (param.detach(), param.grad):
            assert torch.equal(tensor, torch.full((3,), 2.0))
        assert averager.extra_tensors[0].item() == 2.0
        assert averager.local_step == 1


def test_a_joiner_has_the_state_and_the_larger_step(swarm: Swarm):
    (donor, _), (joiner, param) = (training_averager(swarm, value) for value in (42.0, 0.0))
    donor.local_step = 7
    donor.opt.step()
    donor.state_sharing_priority = 1
    assert joiner.load_state_from_peers(timeout=30) is not None
    assert joiner.local_step == 7
    torch.testing.assert_close(param.detach(), torch.full((3,), 41.9))
    assert joiner.opt.state[param]["step"] == 1


def test_a_round_in_the_background_needs_the_lock_of_the_data(swarm: Swarm):
    averager, _ = training_averager(swarm, 1.0)
    with pytest.raises(InvalidValueError, match="data_lock must be given with wait=False"):
        averager.step(wait=False)
