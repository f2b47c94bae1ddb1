"""How peers find each other and agree on groups: searches, plans, group bits."""

from __future__ import annotations

from typing import TYPE_CHECKING

from shoal.utils.lazy import lazy_names

if TYPE_CHECKING:
    from shoal.errors import MatchmakingException

__all__ = ["MatchmakingException"]

__getattr__, __dir__ = lazy_names(__name__, {"MatchmakingException": "shoal.errors"})
