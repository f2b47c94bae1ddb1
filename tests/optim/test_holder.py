"""An optimizer and its model: what passes between their groups, and what is left alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from shoal.optim.parameters import are_finite
from shoal.optim.ranks.messages import prints
from shoal.optim.state.holder import OptimizerHolder
from shoal.optim.state.rates import Rates


class Counting(torch.optim.SGD):
    """Keeps a count in its groups, as Prodigy and schedule-free optimizers do."""

    def step(self, closure: Any = None) -> Any:
        for group in self.param_groups:
            group["count"] = group.get("count", 0) + 1
        return super().step(closure)


def update(holder: OptimizerHolder, rates: Rates) -> None:
    holder.hyperparameters_from_model()
    holder.load_gradients(custom=False)
    holder.optimizer.step()
    rates.publish()
    holder.parameters_to_model()


@pytest.mark.parametrize("offload", [False, True])
def test_what_an_optimizer_counts_in_its_groups_goes_on(offload: bool):
    """Beside a rate that the user sets; and the state of a first step leaves no count."""
    model = torch.nn.Linear(2, 1)
    holder = OptimizerHolder(lambda groups: Counting(groups, lr=1.0), model.parameters(), offload, None)
    assert "count" not in holder.optimizer.param_groups[0]
    rates = Rates(holder, None)
    for steps in (1, 2, 3):
        holder.param_groups[0]["lr"] = 0.5**steps
        update(holder, rates)
        assert holder.optimizer.param_groups[0]["count"] == holder.param_groups[0]["count"] == steps
        assert holder.optimizer.param_groups[0]["lr"] == 0.5**steps


def test_a_parameter_that_was_frozen_since_is_left_alone():
    """As torch leaves it, which has no gradient for it: neither weight decay nor momentum moves it."""
    model = torch.nn.Linear(2, 1)
    holder = OptimizerHolder(
        lambda groups: torch.optim.SGD(groups, lr=0.1, weight_decay=0.5), model.parameters(), True, None
    )
    before = [parameter.detach().clone() for parameter in model.parameters()]
    model.bias.requires_grad_(False)
    model.weight.grad = torch.ones(1, 2)
    update(holder, Rates(holder, None))
    assert torch.equal(model.bias, before[1])
    assert not torch.equal(model.weight, before[0])


def test_sparse_gradients_are_looked_through():
    model = torch.nn.Embedding(5, 2, sparse=True)
    model(torch.tensor([1, 1, 3])).sum().backward()
    assert are_finite([model.weight.grad])
    assert prints([model.weight])[1:] == pytest.approx((6.0, (4 + 4 + 1 + 1) ** 0.5))
    model(torch.tensor([2])).mul(float("inf")).sum().backward()
    assert not are_finite([model.weight.grad])
