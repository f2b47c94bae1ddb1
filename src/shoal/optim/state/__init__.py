"""Parameters and optimizer state, averaged and shared: :class:`TrainingStateAverager` and its parts."""

from __future__ import annotations

from shoal.utils.lazy import lazy_names

_MODULE_OF = {"TrainingStateAverager": "shoal.optim.state.averager"}

__all__ = [*_MODULE_OF]

__getattr__, __dir__ = lazy_names(__name__, _MODULE_OF)
