"""The scaler for gradients that stay scaled until a global step."""

from __future__ import annotations

import pytest
import torch

from shoal.optim import GradScaler


class Accumulating(torch.optim.SGD):
    """Leaves its parameters alone, as an optimizer between global steps does."""

    scaler: object = None

    def step(self, closure: object = None, *, grad_scaler: object = None) -> None:  # type: ignore[override]
        self.scaler = grad_scaler


def scaled(dtype: torch.dtype = torch.float32) -> tuple[GradScaler, torch.nn.Parameter]:
    scaler = GradScaler("cpu", init_scale=8.0, growth_interval=2)
    param = torch.nn.Parameter(torch.ones(2, dtype=dtype))
    scaler.scale((param * 3).sum()).backward()
    return scaler, param


def test_between_global_steps_gradients_stay_scaled_and_the_optimizer_gets_the_scaler():
    scaler, param = scaled()
    optimizer = Accumulating([param], lr=1.0)
    scaler.unscale_(optimizer)
    scaler.step(optimizer)
    scaler.update()
    assert param.grad is not None
    assert torch.equal(param.grad, torch.full((2,), 24.0))
    assert optimizer.scaler is scaler
    assert scaler.get_scale() == 8.0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_a_global_step_unscales_and_the_scale_grows_by_these_alone(dtype: torch.dtype):
    scaler, param = scaled(dtype)
    optimizer = torch.optim.SGD([param], lr=1.0)
    with scaler.running_global_step():
        scaler.unscale_(optimizer)
        scaler.step(optimizer)
        scaler.update()
        assert torch.equal(param.detach(), torch.full((2,), -2.0, dtype=dtype))
        assert scaler.get_scale() == 8.0
        scaler.unscale_(optimizer)
        scaler.update()
    assert scaler.get_scale() == 16.0


def test_an_overflow_shrinks_the_scale_and_no_step_is_taken(caplog: pytest.LogCaptureFixture):
    scaler, param = scaled()
    optimizer = torch.optim.SGD([param], lr=1.0)
    assert param.grad is not None
    param.grad[0] = float("inf")
    with scaler.running_global_step():
        scaler.unscale_(optimizer)
        scaler.step(optimizer)
    assert torch.equal(param, torch.ones(2))
    assert "no step: gradients have NaN or infinity at a loss scale of 8" in caplog.text
    scaler.update()
    assert scaler.get_scale() == 4.0
