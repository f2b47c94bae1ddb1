"""How long a caller waits for a round: until it is over, its time is up, or nobody can come to it any more."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import wait

from shoal.averaging.commands import AveragingStage
from shoal.averaging.trainer.control import StepControl
from shoal.utils.timed import steady_time

GLANCE = 0.1
"""Seconds between two looks at whether a round still makes sense."""
WITHOUT_A_GROUP = (AveragingStage.IDLE, AveragingStage.LOOKING_FOR_GROUP)


def cancelled_in_vain(control: StepControl, deadline: float, is_vain: Callable[[], bool]) -> bool:
    """Wait until the step is over, or nearly until the deadline. True: it was cancelled, since it looked for a group in
    vain. A group that stands is waited for.

    :param deadline: steady time
    """
    while not control.done() and steady_time() < deadline - GLANCE:
        wait([control], GLANCE)
        if is_vain() and control.stage in WITHOUT_A_GROUP and control.cancel():
            return True
    return False
