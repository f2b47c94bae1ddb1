"""The life of an averager, from its start to its end: which state follows which, and what calls may be made in which.
Pure: the calls that take it from state to state are :mod:`.link`'s.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from enum import Enum

from shoal.errors import InvalidStateError
from shoal.sansio.machine import Machine


class LifeState(Enum):
    """Values are read as "the averager is ..."."""

    NEW = "not started"
    WAITING_FOR_DHT = "waiting for its DHT"
    CREATING = "having its service made"
    ATTACHING = "having its arena attached"
    RUNNING = "running"
    FAILED = "failed at its start"
    ENDED = "shut down"


TRANSITIONS: Mapping[LifeState, Collection[LifeState]] = {
    LifeState.NEW: (LifeState.WAITING_FOR_DHT,),
    LifeState.WAITING_FOR_DHT: (LifeState.CREATING, LifeState.FAILED, LifeState.ENDED),
    LifeState.CREATING: (LifeState.ATTACHING, LifeState.FAILED, LifeState.ENDED),
    LifeState.ATTACHING: (LifeState.RUNNING, LifeState.FAILED, LifeState.ENDED),
    LifeState.RUNNING: (LifeState.ENDED,),
    LifeState.FAILED: (LifeState.ENDED,),
}


class Life:
    """Which state an averager is in. ``now`` is of one steady clock, for the history of an error."""

    def __init__(self) -> None:
        self._machine = Machine(LifeState.NEW, TRANSITIONS)

    @property
    def state(self) -> LifeState:
        return self._machine.state

    def enter(self, state: LifeState, now: float) -> bool:
        """Go on to ``state``; False: it has ended meanwhile, which is for good, and the start may still have news.

        :raises InvalidStateError: of a start: it was started before
        :raises IllegalTransition: a bug in Shoal
        """
        if state is LifeState.WAITING_FOR_DHT:
            self.check_new()
        elif self.state is LifeState.ENDED:
            return False
        self._machine.note(state, now)
        self._machine.move(state)
        return True

    def end(self, now: float) -> bool:
        """It is shut down; False: there is nothing to end, as before the start or after the end."""
        return self.state is not LifeState.NEW and self.enter(LifeState.ENDED, now)

    def check_new(self) -> None:
        """:raises InvalidStateError: it was started before"""
        if self.was_started:
            raise InvalidStateError("this averager was started already")

    def check_started(self) -> None:
        """:raises InvalidStateError: it was never started"""
        if not self.was_started:
            raise InvalidStateError("this averager is not started; call run_in_background() first")

    def check_running(self) -> None:
        """:raises InvalidStateError: it was never started, or is shut down"""
        self.check_started()
        if self.state is LifeState.ENDED:
            raise InvalidStateError("this averager was shut down")

    @property
    def was_started(self) -> bool:
        """Whether it was, whatever became of it since."""
        return self.state is not LifeState.NEW

    @property
    def is_alive(self) -> bool:
        """Whether it runs, or may still come to that."""
        return self.state not in (LifeState.NEW, LifeState.FAILED, LifeState.ENDED)
