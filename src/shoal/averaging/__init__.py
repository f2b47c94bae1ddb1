"""Averaging of tensors between peers. Names are loaded when first used, so that the import is free of torch."""

from __future__ import annotations

from typing import TYPE_CHECKING

from shoal.utils.lazy import lazy_names

if TYPE_CHECKING:
    from shoal.averaging.commands import AveragingStage
    from shoal.averaging.group import AveragingMode, GroupInfo
    from shoal.averaging.load_balancing import load_balance_peers
    from shoal.averaging.report import Phases, RoundReport, StepReport
    from shoal.averaging.trainer.averager import DecentralizedAverager
    from shoal.averaging.trainer.control import StepControl
    from shoal.averaging.trainer.shared_buffers import SharedBuffers
    from shoal.errors import AllreduceException, InDoubt, MatchmakingException

__all__ = [
    "DecentralizedAverager",
    "SharedBuffers",
    "StepControl",
    "AveragingStage",
    "AveragingMode",
    "StepReport",
    "RoundReport",
    "Phases",
    "GroupInfo",
    "load_balance_peers",
    "AllreduceException",
    "InDoubt",
    "MatchmakingException",
]

__getattr__, __dir__ = lazy_names(
    __name__,
    {
        "DecentralizedAverager": "shoal.averaging.trainer.averager",
        "SharedBuffers": "shoal.averaging.trainer.shared_buffers",
        "StepControl": "shoal.averaging.trainer.control",
        "AveragingStage": "shoal.averaging.commands",
        "AveragingMode": "shoal.averaging.group",
        "StepReport": "shoal.averaging.report",
        "RoundReport": "shoal.averaging.report",
        "Phases": "shoal.averaging.report",
        "GroupInfo": "shoal.averaging.group",
        "load_balance_peers": "shoal.averaging.load_balancing",
        "AllreduceException": "shoal.errors",
        "InDoubt": "shoal.errors",
        "MatchmakingException": "shoal.errors",
    },
)
