"""Optimizers that train one model on many machines: they compose averagers, and reach into none."""

from __future__ import annotations

from typing import TYPE_CHECKING

from shoal.utils.lazy import lazy_names

if TYPE_CHECKING:
    from shoal.optim.epoch import AfterFailedRound as AfterFailedRound
    from shoal.optim.grad_scaler import GradScaler as GradScaler
    from shoal.optim.gradients import GradientAverager as GradientAverager
    from shoal.optim.gradients import GradientAveragerFactory as GradientAveragerFactory
    from shoal.optim.optimizer import Optimizer as Optimizer
    from shoal.optim.performance_ema import PerformanceEMA as PerformanceEMA
    from shoal.optim.progress.tracker import ProgressTracker as ProgressTracker
    from shoal.optim.progress.values import GlobalTrainingProgress as GlobalTrainingProgress
    from shoal.optim.progress.values import LocalTrainingProgress as LocalTrainingProgress
    from shoal.optim.report import EpochReport as EpochReport
    from shoal.optim.state.averager import TrainingStateAverager as TrainingStateAverager
    from shoal.optim.training_averager import TrainingAverager as TrainingAverager

_MODULE_OF: dict[str, str] = {
    "AfterFailedRound": "shoal.optim.epoch",
    "EpochReport": "shoal.optim.report",
    "GlobalTrainingProgress": "shoal.optim.progress.values",
    "GradientAverager": "shoal.optim.gradients",
    "GradientAveragerFactory": "shoal.optim.gradients",
    "GradScaler": "shoal.optim.grad_scaler",
    "LocalTrainingProgress": "shoal.optim.progress.values",
    "Optimizer": "shoal.optim.optimizer",
    "PerformanceEMA": "shoal.optim.performance_ema",
    "ProgressTracker": "shoal.optim.progress.tracker",
    "TrainingAverager": "shoal.optim.training_averager",
    "TrainingStateAverager": "shoal.optim.state.averager",
}

__all__ = [*_MODULE_OF]

__getattr__, __dir__ = lazy_names(__name__, _MODULE_OF)
