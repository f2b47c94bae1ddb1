"""As :mod:`shoal.frameworks.lightning`, for programs that ``import pytorch_lightning``: its classes are others."""

from __future__ import annotations

try:
    from pytorch_lightning import LightningModule
    from pytorch_lightning.strategies import SingleDeviceStrategy
    from pytorch_lightning.utilities.types import LRSchedulerConfig
except ModuleNotFoundError as e:
    if (e.name or "").partition(".")[0] != "pytorch_lightning":
        raise
    raise ModuleNotFoundError(
        "pytorch_lightning must be installed for shoal.frameworks.pytorch_lightning: "
        "pip install pytorch-lightning, or import lightning and shoal.frameworks.lightning",
        name=e.name,
    ) from e

from shoal.frameworks.strategy.strategy import SwarmStrategy

__all__ = ["ShoalStrategy"]


class ShoalStrategy(SwarmStrategy, SingleDeviceStrategy):  # type: ignore[misc] # typed for lightning's classes
    __doc__ = SwarmStrategy.__doc__

    _module_class = LightningModule
    _scheduler_config = LRSchedulerConfig
