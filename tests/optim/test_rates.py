"""A scheduler that follows epochs, also from another thread than the one to which the model's groups belong."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.optim import lr_scheduler as schedulers

from shoal.errors import InvalidTypeError
from shoal.optim.ranks.parts import RankState
from shoal.optim.state.holder import OptimizerHolder
from shoal.optim.state.rates import Rates


def offloaded() -> OptimizerHolder:
    parameters = list(torch.nn.Linear(2, 1).parameters())
    return OptimizerHolder(lambda groups: torch.optim.SGD(groups, lr=1.0), parameters, True, None)


def halves(optimizer: torch.optim.Optimizer) -> schedulers.StepLR:
    return schedulers.StepLR(optimizer, 1, 0.5)


def chained(optimizer: torch.optim.Optimizer) -> Any:
    return schedulers.ChainedScheduler([halves(optimizer)])


def rates_of(holder: OptimizerHolder) -> tuple[float, float]:
    """Of the inner optimizer, and of the model's groups."""
    return holder.optimizer.param_groups[0]["lr"], holder.param_groups[0]["lr"]


@pytest.mark.parametrize("scheduler", [halves, chained])
def test_the_models_groups_get_a_rate_when_they_are_told(scheduler: Callable[[Any], Any]):
    holder = offloaded()
    rates = Rates(holder, scheduler)
    assert rates_of(holder) == (1.0, 1.0)
    rates.follow(2)
    rates.follow(2)
    assert rates_of(holder) == (0.25, 1.0)
    rates.publish()
    assert rates_of(holder) == (0.25, 0.25)


def test_a_rate_that_the_user_sets_stays_while_the_scheduler_stands():
    holder = offloaded()
    rates = Rates(holder, halves)
    holder.param_groups[0]["lr"] = 3.0
    rates.follow(0)
    rates.publish()
    assert holder.param_groups[0]["lr"] == 3.0


def test_a_rate_that_was_loaded_has_its_steps_in_it():
    holder = offloaded()
    rates = Rates(holder, halves)
    holder.optimizer.param_groups[0]["lr"] = 0.125
    rates.count_to(3)
    assert rates_of(holder) == (0.125, 0.125)
    rates.follow(4)
    assert rates_of(holder)[0] == pytest.approx(0.0625)


def test_without_a_scheduler_nothing_moves_and_something_else_is_named():
    holder = offloaded()
    rates = Rates(holder, None)
    rates.follow(5)
    assert rates.scheduler is None
    with pytest.raises(InvalidTypeError, match="scheduler must be a torch scheduler or a callable, got int"):
        Rates(holder, 3)  # type: ignore[arg-type]


@pytest.mark.parametrize("scheduler", [halves, chained])
def test_another_rank_takes_the_state_of_the_scheduler_of_rank_zero(scheduler: Callable[[Any], Any]):
    spoken = Rates(offloaded(), scheduler)
    spoken.follow(2)
    listening = RankState(offloaded(), scheduler, (), local_updates=True, reused_gradients=False)
    assert spoken.scheduler is not None
    listening.scheduler.load_state_dict(spoken.scheduler.state_dict())
    assert listening.scheduler.last_epoch == 2
