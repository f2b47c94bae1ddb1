"""Averaging of tensors between peers. Names are loaded when first used, so that the import is free of torch."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from shoal.averaging.averager import DecentralizedAverager
    from shoal.averaging.control import AveragingStage, StepControl
    from shoal.averaging.group import GroupInfo
    from shoal.averaging.load_balancing import load_balance_peers
    from shoal.averaging.report import Phases, RoundReport
    from shoal.errors import AllreduceException, MatchmakingException

__all__ = [
    "DecentralizedAverager",
    "StepControl",
    "AveragingStage",
    "RoundReport",
    "Phases",
    "GroupInfo",
    "load_balance_peers",
    "AllreduceException",
    "MatchmakingException",
]

_HOMES = {
    "DecentralizedAverager": "shoal.averaging.averager",
    "StepControl": "shoal.averaging.control",
    "AveragingStage": "shoal.averaging.control",
    "RoundReport": "shoal.averaging.report",
    "Phases": "shoal.averaging.report",
    "GroupInfo": "shoal.averaging.group",
    "load_balance_peers": "shoal.averaging.load_balancing",
    "AllreduceException": "shoal.errors",
    "MatchmakingException": "shoal.errors",
}


def __getattr__(name: str) -> Any:
    home = _HOMES.get(name)
    if home is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(home), name)


def __dir__() -> list[str]:
    return sorted(__all__)
