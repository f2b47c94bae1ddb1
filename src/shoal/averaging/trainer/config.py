"""The options of an averager that only the user's process has to know."""

from __future__ import annotations

import threading
from dataclasses import dataclass
from typing import Annotated

from shoal.averaging.trainer.pending import APPLY_WHEN, ApplyWhen
from shoal.utils.checks import Choice, Number
from shoal.utils.options import check_options

MAX_ALPHA = 2.0
"""A round leaves ``abs(1 - alpha)`` of a peer's distance to the average: with more than this, peers would drift further
apart in every round, and at last to infinity.
"""


@dataclass(frozen=True)
class TrainerConfig:
    """As in :class:`~shoal.averaging.config.AveragerConfig`, what each means is said to users."""

    start: bool
    daemon: bool = True
    averaging_alpha: Annotated[float, Number(above=0, maximum=MAX_ALPHA)] = 1.0
    shutdown_timeout: Annotated[float, Number(minimum=0, maximum=threading.TIMEOUT_MAX, unit="s")] = 5
    apply_when: Annotated[ApplyWhen, Choice(APPLY_WHEN)] = "ready"
    detect_lost_updates: bool = False

    def __post_init__(self) -> None:
        check_options(self)
