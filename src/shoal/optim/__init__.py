"""Optimizers that train one model on many machines: they compose averagers, and reach into none."""

from __future__ import annotations

from shoal.utils.lazy import lazy_names

_MODULE_OF: dict[str, str] = {}

__all__ = [*_MODULE_OF]

__getattr__, __dir__ = lazy_names(__name__, _MODULE_OF)
