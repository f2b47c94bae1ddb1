"""Hugging Face's ``Trainer`` as a peer of a swarm: :class:`ShoalCallback` and :class:`SwarmScheduler`."""

from __future__ import annotations

try:
    from shoal.frameworks.transformers.callback import ShoalCallback
except ModuleNotFoundError as e:
    if e.name != "transformers":
        raise
    raise ModuleNotFoundError(
        "transformers must be installed for shoal.frameworks.transformers: pip install 'shoal[transformers]'",
        name=e.name,
    ) from e

from shoal.frameworks.transformers.scheduler import SwarmScheduler

__all__ = ["ShoalCallback", "SwarmScheduler"]
