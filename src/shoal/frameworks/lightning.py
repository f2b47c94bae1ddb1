"""Lightning's ``Trainer`` as a peer of a swarm: :class:`ShoalStrategy`, for programs that ``import lightning``."""

from __future__ import annotations

try:
    from lightning.pytorch import LightningModule
    from lightning.pytorch.strategies import SingleDeviceStrategy
    from lightning.pytorch.utilities.types import LRSchedulerConfig
except ModuleNotFoundError as e:
    if (e.name or "").partition(".")[0] != "lightning":
        raise
    raise ModuleNotFoundError(
        "lightning must be installed for shoal.frameworks.lightning: pip install 'shoal[lightning]'",
        name=e.name,
    ) from e

from shoal.frameworks.strategy.strategy import SwarmStrategy

__all__ = ["ShoalStrategy"]


class ShoalStrategy(SwarmStrategy, SingleDeviceStrategy):
    __doc__ = SwarmStrategy.__doc__

    _module_class = LightningModule
    _scheduler_config = LRSchedulerConfig
