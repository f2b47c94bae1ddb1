"""As :mod:`shoal.frameworks.lightning`, for programs that ``import pytorch_lightning``: its classes are others."""

from __future__ import annotations

from shoal.frameworks.needed import needed
from shoal.frameworks.strategy.strategy import SwarmStrategy

with needed(
    "pytorch_lightning",
    "shoal.frameworks.pytorch_lightning",
    "pip install pytorch-lightning, or import lightning and shoal.frameworks.lightning",
):
    from pytorch_lightning import LightningModule
    from pytorch_lightning.strategies import SingleDeviceStrategy
    from pytorch_lightning.utilities.types import LRSchedulerConfig

__all__ = ["ShoalStrategy"]


class ShoalStrategy(SwarmStrategy, SingleDeviceStrategy):  # type: ignore[misc] # typed for lightning's classes
    __doc__ = SwarmStrategy.__doc__

    _module_class = LightningModule
    _scheduler_config = LRSchedulerConfig
