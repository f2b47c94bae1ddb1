"""Gradients of several batches, averaged between peers: what :class:`shoal.optim.GradientAverager` promises."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from real_swarm import STEP_TIMEOUT, Swarm

from shoal.errors import InvalidStateError, InvalidValueError
from shoal.optim import GradientAverager

pytestmark = pytest.mark.xdist_group("averaging")


def gradient_averager(swarm: Swarm, parameters: Any, size: int = 2, **options: Any) -> GradientAverager:
    return swarm.start(GradientAverager, parameters, size=size, **options)


def parameter(size: int = 3, dtype: torch.dtype = torch.float32) -> torch.nn.Parameter:
    return torch.nn.Parameter(torch.zeros(size, dtype=dtype))


def accumulate(averager: GradientAverager, value: float, batch_size: int) -> bool:
    for param in averager.parameters:
        param.grad = torch.full_like(param, value)
    return averager.accumulate_grads_(batch_size)


def test_the_average_counts_each_sample_once_however_batches_are_cut(swarm: Swarm):
    params = [parameter(), parameter()]
    first, second = (gradient_averager(swarm, [param]) for param in params)
    for value, size in [(1.0, 1), (2.0, 5), (4.0, 2)]:  # 8 samples, 19 in all
        accumulate(first, value, size)
    for value, size in [(3.0, 3), (5.0, 3), (1.0, 12)]:  # 18 samples, 36 in all
        accumulate(second, value, size)
    assert (first.local_samples_accumulated, second.local_samples_accumulated) == (8, 18)
    assert first.local_times_accumulated == 3
    searches = [averager.schedule_step(timeout=STEP_TIMEOUT) for averager in (first, second)]
    controls = [a.step(control=c, wait=False) for a, c in zip((first, second), searches, strict=True)]
    assert [len(control.result(60)) for control in controls] == [2, 2]  # type: ignore[union-attr]
    assert first.local_samples_accumulated == 0
    for averager, param in zip((first, second), params, strict=True):
        before = param.grad
        with averager.use_averaged_gradients() as grads:
            assert param.grad is grads[0]
            torch.testing.assert_close(grads[0], torch.full((3,), 55 / 26))
        assert param.grad is before


def test_a_failed_round_leaves_the_own_mean_which_can_be_averaged_again(swarm: Swarm):
    params = [parameter(), parameter()]
    first, second = (gradient_averager(swarm, [param]) for param in params)
    accumulate(first, 2.0, 1)
    accumulate(first, 4.0, 3)
    assert first.step(timeout=0.3) is None  # nobody is there
    with first.use_averaged_gradients() as (grad,):
        assert torch.equal(grad, torch.full((3,), 3.5))
    accumulate(first, 100.0, 1)  # of the next epoch
    accumulate(second, 7.5, 4)
    controls = [
        first.step(again=True, wait=False, timeout=STEP_TIMEOUT),
        second.step(wait=False, timeout=STEP_TIMEOUT),
    ]
    for control in controls:
        control.result(60)  # type: ignore[union-attr]
    with first.use_averaged_gradients() as (grad,):
        assert torch.equal(grad, torch.full((3,), 5.5))
    assert first.local_samples_accumulated == 1


def test_a_batch_with_nan_is_left_out_and_said(swarm: Swarm, caplog: pytest.LogCaptureFixture):
    averager = gradient_averager(swarm, [parameter()], start=False)
    assert accumulate(averager, 1.0, 2)
    assert not accumulate(averager, float("nan"), 4)
    assert averager.local_samples_accumulated == 2
    assert "4 samples are left out" in caplog.text
    averager.load_accumulators_into_averager_()
    with averager.use_averaged_gradients() as (grad,):
        assert torch.equal(grad, torch.ones(3))


def test_half_precision_is_summed_in_float32_and_given_back_as_it_was(swarm: Swarm):
    averager = gradient_averager(swarm, [parameter(dtype=torch.bfloat16)], start=False)
    for _ in range(1000):
        accumulate(averager, 1.0, 1)  # in bfloat16 the sum would end at 256
    averager.load_accumulators_into_averager_()
    with averager.get_tensors() as (average,):
        assert average.dtype is torch.float32
        assert torch.equal(average, torch.ones(3))
    with averager.use_averaged_gradients() as (grad,):
        assert grad.dtype is torch.bfloat16


def test_frozen_parameters_are_left_out_and_tied_ones_count_once(swarm: Swarm):
    frozen, tied = parameter().requires_grad_(False), parameter()
    averager = gradient_averager(swarm, [frozen, tied, tied], start=False)
    assert averager.parameters == (tied,)
    assert averager.total_size == 3


def test_reused_buffers_survive_a_gradient_that_was_set_to_none(swarm: Swarm):
    param = parameter()
    averager = gradient_averager(swarm, [param], start=False, reuse_grad_buffers=True)
    (param * 2).sum().backward()
    averager.accumulate_grads_(4)
    (param * 4).sum().backward()
    averager.accumulate_grads_(4)
    averager.load_accumulators_into_averager_()
    with averager.use_averaged_gradients() as (grad,):
        assert torch.equal(grad, torch.full((3,), 3.0))
    param.grad = None
    averager.reset_accumulated_grads_()
    assert param.grad is not None
    assert not param.grad.any()


def test_a_late_average_is_dropped_before_other_gradients_come(swarm: Swarm, monkeypatch: pytest.MonkeyPatch):
    averaged = torch.zeros(3)
    averager = gradient_averager(swarm, [parameter()], start=False, averaged_grads=[averaged])
    found: list[float] = []
    monkeypatch.setattr(averager, "drop_late_average", lambda: found.append(averaged[0].item()))
    accumulate(averager, 2.0, 3)
    averager.load_accumulators_into_averager_()
    assert found == [0.0]
    assert torch.equal(averaged, torch.full((3,), 2.0))


def test_wrong_arguments_are_named(swarm: Swarm):
    dht = swarm.dht()
    with pytest.raises(
        InvalidValueError, match=r"averaged_grads must have the parameters' shapes \[\(3,\)\]"
    ):
        GradientAverager([parameter()], dht=dht, prefix="x", averaged_grads=[torch.zeros(2)], start=False)
    with pytest.raises(InvalidValueError, match="parameters must have at least one that requires grad"):
        GradientAverager([parameter().requires_grad_(False)], dht=dht, prefix="x", start=False)
    averager = gradient_averager(swarm, [parameter()])
    with pytest.raises(InvalidValueError, match=r"weight must not be given to schedule_step\(\)"):
        averager.schedule_step(weight=3)
    with pytest.raises(InvalidValueError, match="batch_size must be"):
        averager.accumulate_grads_(0)
    control = averager.step(wait=False, timeout=STEP_TIMEOUT)
    with pytest.raises(InvalidStateError, match="a step must have ended before"):
        averager.step(wait=False)
    assert control.cancel()  # type: ignore[union-attr]
    with pytest.raises(InvalidStateError, match="control must be one that no step has used"):
        averager.step(control=control)  # type: ignore[arg-type]
