"""How a group averages: rounds of all-reduce that commit at every member or at none."""

from __future__ import annotations

from typing import TYPE_CHECKING

from shoal.utils.lazy import lazy_names

if TYPE_CHECKING:
    from shoal.averaging.group import AveragingMode
    from shoal.errors import AllreduceException

__all__ = ["AveragingMode", "AllreduceException"]

__getattr__, __dir__ = lazy_names(
    __name__, {"AveragingMode": "shoal.averaging.group", "AllreduceException": "shoal.errors"}
)
