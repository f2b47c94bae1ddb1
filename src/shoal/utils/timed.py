"""The clocks of Shoal: steady time, by which durations are measured, and DHT time, on which peers agree.

Steady time never jumps, goes on while the machine sleeps, and is the same in all processes of a machine. DHT time is
steady time and an offset. The offset is the wall clock's when the program starts; a node that joins a DHT takes over
that of its peers (:mod:`shoal.dht.timekeeping`). So a wall clock that is wrong, or is set later, changes nothing.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TypeAlias

__all__ = ["DHTExpiration", "get_dht_time"]

DHTExpiration: TypeAlias = float
"""When a value expires: seconds as :func:`get_dht_time` counts them."""


_STEADY = getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC)
"""On Linux CLOCK_MONOTONIC stands still while the machine sleeps; on macOS it goes on."""


def steady_time() -> float:
    """Seconds of a clock that nobody sets, the same in all processes of this machine."""
    return time.clock_gettime(_STEADY)


class DHTClock:
    """DHT time: call it for the time now. Only :meth:`move` and :meth:`set_offset` make it jump."""

    def __init__(self, offset: float, steady: Callable[[], float] = steady_time) -> None:
        self.steady = steady
        """The time underneath, which never jumps: for durations."""
        self.moves = 0
        """How often it was moved: of two readings, that with more moves is the later one."""
        self.on_move: list[Callable[[], None]] = []
        self._offset = offset

    def __call__(self) -> float:
        return self.steady() + self._offset

    @property
    def offset(self) -> float:
        """DHT time minus steady time."""
        return self._offset

    def to_steady(self, time: float) -> float:
        """The steady time at which this clock shows ``time``."""
        return time - self._offset

    def from_steady(self, steady: float) -> float:
        """What this clock shows at a steady time."""
        return steady + self._offset

    def frozen(self) -> Callable[[], float]:
        """This clock as it is now, which later moves leave alone: for what compares times with durations."""
        steady, offset = self.steady, self._offset
        return lambda: steady() + offset

    def move(self, seconds: float) -> None:
        """Set it forward, or back, because peers agree on another time."""
        self._offset += seconds
        self.moves += 1
        for callback in self.on_move:
            callback()

    def set_offset(self, offset: float) -> None:
        """Go by another process's reading of DHT time on this machine."""
        self._offset = offset


dht_clock = DHTClock(time.time() - steady_time())
"""The clock of this process. In a user's process it follows that of the background process of its DHT."""


def get_dht_time() -> float:
    """Seconds since the Unix epoch, as the peers of this program's DHT count them.

    Without a DHT, and where the clocks of peers agree, it is the wall clock's time when the program started and the
    seconds since then. Of several DHTs in one program, the one that was told another time last counts.
    """
    return dht_clock()
