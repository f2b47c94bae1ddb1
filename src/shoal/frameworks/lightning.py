"""Lightning's ``Trainer`` as a peer of a swarm: :class:`ShoalStrategy`, for programs that ``import lightning``."""

from __future__ import annotations

from shoal.frameworks.needed import needed
from shoal.frameworks.strategy.strategy import SwarmStrategy

with needed("lightning", "shoal.frameworks.lightning", "pip install 'shoal[lightning]'"):
    from lightning.pytorch import LightningModule
    from lightning.pytorch.strategies import SingleDeviceStrategy
    from lightning.pytorch.utilities.types import LRSchedulerConfig

__all__ = ["ShoalStrategy"]


class ShoalStrategy(SwarmStrategy, SingleDeviceStrategy):
    __doc__ = SwarmStrategy.__doc__

    _module_class = LightningModule
    _scheduler_config = LRSchedulerConfig
