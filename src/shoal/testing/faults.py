"""Faults at named phases of a step, in real processes.

A fault is planted in the background process of a peer, and happens when the peer comes to a phase::

    dht.run_coroutine(partial(plant, phase="deciding", action="kill", record="/tmp/fault.json"))

Phases are turns of cores, and calls to the user's process (:mod:`shoal.sansio.trace`), and so need no hook in the code.
Each happens before or after the effects of its turn are carried out: a leader that is killed *before* the effects of
"deciding" has told nobody of its decision, and one that is killed after them has told every member with an open stream.

The record tells a test that the fault happened, in which phase and role, also when the process is gone. It is a claim,
too: of several processes with faults of one record only the first that comes to its phase acts. So a test can have
"the leader" killed before it is known who leads.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import socket
import time
from collections.abc import Callable, Mapping
from functools import partial
from typing import Literal, TypeAlias, get_args

from shoal.averaging import commands
from shoal.averaging.allreduce import effects, events
from shoal.averaging.allreduce.messages import Ready
from shoal.averaging.matchmaking import events as matchmaking
from shoal.averaging.state import choice as download
from shoal.averaging.state import queue as uploads
from shoal.errors import InvalidValueError
from shoal.sansio import trace
from shoal.sansio.trace import Turn
from shoal.utils.checks import check_choice

__all__ = ["PHASES", "Action", "Role", "Whom", "plant"]

Action: TypeAlias = Literal["kill", "term", "stop", "close"]
"""SIGKILL; SIGTERM; SIGSTOP, until somebody continues the process; or the background process finds all its TCP
connections closed."""
Whom: TypeAlias = Literal["background", "user", "both"]
"""Which process the signal is for: the background process, the user's process that started it, or both."""
Role: TypeAlias = Literal["leader", "follower"]
"""What the peer is in its latest group, as it was formed."""

HANDED_OVER = 0.003
"""Seconds that the tasks of a shell take to hand the effects of a turn to the network."""
_SIGNALS: Mapping[str, signal.Signals] = {
    "kill": signal.SIGKILL,
    "term": signal.SIGTERM,
    "stop": signal.SIGSTOP,
}


def _heard(core: str, *kinds: type) -> Callable[[Turn], bool]:
    return lambda turn: turn.core == core and isinstance(turn.event, kinds)


def _asked(core: str, *kinds: type) -> Callable[[Turn], bool]:
    return lambda turn: turn.core == core and any(isinstance(effect, kinds) for effect in turn.effects)


def _either(*phases: Callable[[Turn], bool]) -> Callable[[Turn], bool]:
    return lambda turn: any(matches(turn) for matches in phases)


def _reports_ready(turn: Turn) -> bool:
    tells = (effect for effect in turn.effects if isinstance(effect, effects.TellLeader))
    return turn.core == "allreduce" and any(isinstance(tell.report, Ready) for tell in tells)


def _waits_for_trigger(turn: Turn) -> bool:
    command = turn.event
    return (
        isinstance(command, commands.ReachStage) and command.stage is commands.AveragingStage.AWAITING_TRIGGER
    )


_begins_group = _asked("matchmaking", matchmaking.BeginGroup)
_enters_group = _asked("matchmaking", matchmaking.FinishWithGroup)

PHASES: Mapping[str, Callable[[Turn], bool]] = {
    "searching": _heard("matchmaking", matchmaking.SearchStarted),
    "asking": _asked("matchmaking", matchmaking.AskToJoin),
    "forming": _either(_begins_group, _enters_group),
    "waiting": _waits_for_trigger,
    "copying": _heard("user", commands.TakeSnapshot),
    "scattering": _heard("allreduce", events.PartSent),
    "reducing": _heard("allreduce", events.PartAveraged),
    "gathering": _heard("allreduce", events.AverageReceived),
    "ready": _reports_ready,
    "voting": _either(
        _asked("allreduce", effects.AskForAcceptance), _heard("allreduce", events.AcceptanceAsked)
    ),
    "deciding": _asked("allreduce", effects.AnnounceOutcome),
    "announcing": _either(
        _asked("allreduce", effects.AnnounceOutcome), _heard("allreduce", events.OutcomeReceived)
    ),
    "applying": _heard("user", commands.ApplyAverage),
    "sharing": _asked("uploads", uploads.Serve),
    "loading": _heard("download", download.OfferReceived),
}
"""Name -> the turns that are this phase. *Waiting* is for the user's trigger. A follower *reports ready*, and the
leader is ready without a report. *Voting*: the leader proposes, a follower is asked to accept. The leader *decides*.
*Announcing*: the leader announces the decision, a follower hears it. A donor *shares* its state, a joiner *loads* it.
"""


async def plant(
    _dht: object,
    _node: object,
    *,
    phase: str,
    action: Action | Callable[[], object],
    whom: Whom = "background",
    count: int = 1,
    after: bool = False,
    role: Role | None = None,
    record: str | None = None,
) -> None:
    """Have ``action`` happen to this peer when it comes to ``phase``; for ``dht.run_coroutine``.

    :param phase: one of :data:`PHASES`
    :param action: what happens; a callable is called in the background process, whose event loop it may block
    :param whom: to which process, if the action is a signal
    :param count: how many times the peer comes to the phase before the action
    :param after: once the effects of that turn are carried out and handed to the network, instead of before
    :param role: only if the peer is this in its group; None: whatever it is
    :param record: the path of a file that is made, with JSON, just before the action. If it is there already, the
      action does not happen: another process was first.
    :raises InvalidValueError: there is no such phase, action, process or role
    """
    if phase not in PHASES:
        raise InvalidValueError(f"phase must be one of {', '.join(PHASES)}, got {phase!r}")
    if not callable(action):
        check_choice("action", action, get_args(Action))
    check_choice("whom", whom, get_args(Whom))
    if role is not None:
        check_choice("role", role, get_args(Role))
    Fault(phase, _deed(action, whom), count, after, role, record)


class Fault:
    """A fault that watches the turns of this process until it happens."""

    def __init__(
        self,
        phase: str,
        deed: Callable[[], object],
        count: int,
        after: bool,
        role: Role | None,
        record: str | None,
    ) -> None:
        self._phase = phase
        self._deed = deed
        self._left = count
        self._after = after
        self._wanted = role
        self._role: Role | None = None
        self._record = record
        self._loop = asyncio.get_running_loop()
        self._user = os.getppid()  # it is another one's number when the user's process has ended
        self._remove = trace.add_watcher(self._watch)

    def _watch(self, turn: Turn) -> Callable[[], None] | None:
        self._learn_role(turn)
        if not PHASES[self._phase](turn) or self._wanted not in (None, self._role):
            return None
        self._left -= 1
        if self._left > 0:
            return None
        self._remove()
        if self._after:
            return self._happen_later
        self._happen()
        return None

    def _learn_role(self, turn: Turn) -> None:
        if _begins_group(turn):
            self._role = "leader"
        elif _enters_group(turn):
            self._role = "follower"

    def _happen_later(self) -> None:
        self._loop.call_later(HANDED_OVER, self._happen)

    def _happen(self) -> None:
        if self._record is not None and not self._claim(self._record):
            return
        self._deed()

    def _claim(self, record: str) -> bool:
        """Make the record, with all that is in it at once; false: it is there already."""
        told = {
            "phase": self._phase,
            "role": self._role,
            "background": os.getpid(),
            "user": self._user,
            "time": time.monotonic(),
        }
        draft = f"{record}.{os.getpid()}"
        with open(draft, "w") as file:
            json.dump(told, file)
        try:
            os.link(draft, record)
        except FileExistsError:
            return False
        finally:
            os.unlink(draft)
        return True


def _deed(action: Action | Callable[[], object], whom: Whom) -> Callable[[], object]:
    if callable(action):
        return action
    if action == "close":
        return close_connections
    user, own = os.getppid(), os.getpid()
    pids = {"background": [own], "user": [user], "both": [user, own]}[whom]
    return partial(_send, _SIGNALS[action], pids)


def _send(number: signal.Signals, pids: list[int]) -> None:
    for pid in pids:
        os.kill(pid, number)


def close_connections() -> None:
    """Shut down all TCP connections of this process, without a word to the code that uses them."""
    for name in os.listdir("/dev/fd"):
        with contextlib.suppress(OSError), _socket_at(int(name)) as connection:
            if connection.family in (socket.AF_INET, socket.AF_INET6):
                connection.getpeername()  # raises for a listener, which shutdown() would end
                connection.shutdown(socket.SHUT_RDWR)


def _socket_at(descriptor: int) -> socket.socket:
    """Another descriptor of the socket that this one is of.

    :raises OSError: it is of something else
    """
    copy = os.dup(descriptor)
    try:
        return socket.socket(fileno=copy)
    except OSError:
        os.close(copy)
        raise
