"""Hugging Face's ``Trainer`` as a peer of a swarm: :class:`ShoalCallback` and :class:`SwarmScheduler`."""

from __future__ import annotations

from shoal.frameworks.needed import needed

with needed("transformers", "shoal.frameworks.transformers", "pip install 'shoal[transformers]'"):
    from shoal.frameworks.transformers.callback import ShoalCallback

from shoal.frameworks.transformers.scheduler import SwarmScheduler

__all__ = ["ShoalCallback", "SwarmScheduler"]
