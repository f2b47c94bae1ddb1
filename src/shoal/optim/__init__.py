"""Optimizers that train one model on many machines: they compose averagers, and reach into none."""

from __future__ import annotations

from typing import TYPE_CHECKING

from shoal.utils.lazy import lazy_names

if TYPE_CHECKING:
    from shoal.optim.grad_scaler import GradScaler as GradScaler
    from shoal.optim.gradients import GradientAverager as GradientAverager
    from shoal.optim.gradients import GradientAveragerFactory as GradientAveragerFactory
    from shoal.optim.state.averager import TrainingStateAverager as TrainingStateAverager
    from shoal.optim.training_averager import TrainingAverager as TrainingAverager

_MODULE_OF: dict[str, str] = {
    "GradScaler": "shoal.optim.grad_scaler",
    "GradientAverager": "shoal.optim.gradients",
    "GradientAveragerFactory": "shoal.optim.gradients",
    "TrainingAverager": "shoal.optim.training_averager",
    "TrainingStateAverager": "shoal.optim.state.averager",
}

__all__ = [*_MODULE_OF]

__getattr__, __dir__ = lazy_names(__name__, _MODULE_OF)
