"""Faults at named phases of a step, in real processes.

A fault is planted in the background process of a peer, and happens when a core there comes to a phase::

    dht.run_coroutine(partial(plant, phase="decided", action="kill"))

Phases are turns of cores (:mod:`shoal.sansio.trace`), and so need no hook in the code. Each happens before or after the
effects of its turn are carried out: a leader that is killed *before* the effects of "decided" has told nobody of its
decision, and one that is killed after them has told every member with an open stream.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Mapping
from typing import Any, Literal

from shoal.averaging.allreduce import effects, events
from shoal.averaging.allreduce.messages import Ready
from shoal.averaging.matchmaking import events as matchmaking
from shoal.errors import InvalidValueError
from shoal.sansio import trace
from shoal.sansio.trace import Turn

__all__ = ["PHASES", "Action", "plant"]

Action = Literal["kill", "stop"]
"""What happens to the background process: SIGKILL, or SIGSTOP until somebody continues it."""

_SIGNALS: Mapping[str, signal.Signals] = {"kill": signal.SIGKILL, "stop": signal.SIGSTOP}


def _heard(core: str, *kinds: type) -> Callable[[Turn], bool]:
    return lambda turn: turn.core == core and isinstance(turn.event, kinds)


def _asked(core: str, *kinds: type) -> Callable[[Turn], bool]:
    return lambda turn: turn.core == core and any(isinstance(effect, kinds) for effect in turn.effects)


def _reports_ready(turn: Turn) -> bool:
    tells = (effect for effect in turn.effects if isinstance(effect, effects.TellLeader))
    return turn.core == "allreduce" and any(isinstance(tell.report, Ready) for tell in tells)


PHASES: Mapping[str, Callable[[Turn], bool]] = {
    "searching": _heard("matchmaking", matchmaking.SearchStarted),
    "asking": _asked("matchmaking", matchmaking.AskToJoin),
    "leading": _asked("matchmaking", matchmaking.BeginGroup),
    "grouped": _asked("matchmaking", matchmaking.BeginGroup, matchmaking.FinishWithGroup),
    "snapshot": _heard("allreduce", events.SnapshotTaken),
    "scatter": _heard("allreduce", events.PartSent),
    "gather": _heard("allreduce", events.AverageReceived),
    "averaged": _heard("allreduce", events.PartAveraged),
    "ready": _reports_ready,
    "decided": _asked("allreduce", effects.AnnounceOutcome),
    "finished": _asked("allreduce", effects.Finish),
}
"""Name -> the turns that are this phase. A follower *reports ready*; the leader *decides*, and is ready before that
without a report."""


async def plant(
    _dht: object, _node: object, *, phase: str, action: Action, count: int = 1, after: bool = False
) -> None:
    """Have ``action`` happen to this process when a core comes to ``phase``; for ``dht.run_coroutine``.

    :param phase: one of :data:`PHASES`
    :param count: how many times the core comes to it before the action
    :param after: once the effects of that turn are carried out, instead of before
    :raises InvalidValueError: there is no such phase or action
    """
    if phase not in PHASES:
        raise InvalidValueError(f"phase must be one of {', '.join(PHASES)}, got {phase!r}")
    if action not in _SIGNALS:
        raise InvalidValueError(f"action must be 'kill' or 'stop', got {action!r}")
    left = count

    def blow() -> None:
        os.kill(os.getpid(), _SIGNALS[action])

    def watch(turn: Turn) -> Any:
        nonlocal left
        if not PHASES[phase](turn):
            return None
        left -= 1
        if left:
            return None
        remove()
        if after:
            return blow
        blow()
        return None

    remove = trace.add_watcher(watch)
