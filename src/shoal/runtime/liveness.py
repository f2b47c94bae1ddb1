"""Whether the other one of two processes lives: how long it has been silent, and what that means. Pure.

The background process sends a PING every :data:`BEAT` seconds, and the user's process answers it on its receiving
thread. So each hears from the other once a second, however long a call takes.

A process that the system reports as stopped counts as absent after :data:`STOPPED_SECONDS`. Silence alone proves
little: a C extension may hold the GIL of the user's process for as long as it computes, and nothing in it can answer.
Hence :data:`SILENT_SECONDS`, which is much longer.
"""

from __future__ import annotations

from dataclasses import dataclass

BEAT = 1.0
"""Seconds between two signs of life."""
SUSPICIOUS_SECONDS = 1.5
"""After so long a silence it is worth asking the system whether the process is stopped."""
STOPPED_SECONDS = 3.0
"""A process that is stopped counts as absent after so long: a debugger or a profiler may stop it for less."""
SILENT_SECONDS = 60.0
"""A process that is not stopped, and does not answer, counts as absent after so long."""
LATE = 0.5
"""A look that comes later than this was late itself: this process was stopped or busy, so the other is not blamed."""


@dataclass(frozen=True)
class Silence:
    """For how long a process has not answered, and whether the system says that it is stopped."""

    pid: int
    seconds: float
    is_stopped: bool

    @property
    def is_absence(self) -> bool:
        """Whether nobody should wait for this process any more."""
        return self.seconds >= (STOPPED_SECONDS if self.is_stopped else SILENT_SECONDS)

    def describe(self, stopped_by: str, remedy: str = "") -> str:
        """For people, as what a process is or has done.

        :param stopped_by: what may have stopped it
        :param remedy: what lets it go on, besides the signal
        """
        if self.is_stopped:
            return (
                f"is stopped ({stopped_by}) and has not answered for {self.seconds:.0f} s; "
                f"{remedy}'kill -CONT {self.pid}' lets it go on"
            )
        return f"has not answered for {self.seconds:.0f} s: it is busy in a call that holds the GIL, or swapped out"


class Liveness:
    """What one process knows of the other's life; ``now`` is of any steady clock."""

    def __init__(self, pid: int, now: float) -> None:
        self._pid = pid
        self._heard_at = now
        self._looked_at = now

    def hear(self, now: float) -> None:
        """Something came from the other process."""
        self._heard_at = now

    def look(self, now: float) -> float:
        """The seconds of silence by now; to be called every :data:`BEAT`."""
        late = now - self._looked_at - BEAT
        if late > LATE:
            self._heard_at = min(now, self._heard_at + late)
        self._looked_at = now
        return now - self._heard_at

    def silence(self, now: float, *, is_stopped: bool) -> Silence:
        """What is known by now."""
        return Silence(self._pid, now - self._heard_at, is_stopped)
