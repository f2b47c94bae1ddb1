"""What the user's process last heard of its node. Refers to no DHT, whose last reference ends it."""

from __future__ import annotations

import threading
from concurrent.futures import Future

from shoal.dht.commands import ClockReading, NodeDescription
from shoal.utils.timed import dht_clock


class LastDescription:
    """Keeps a node's last description, and makes DHT time in this process follow the node's.

    Descriptions and readings of the clock may come on any thread.
    """

    def __init__(self) -> None:
        self.description: NodeDescription | None = None
        self._lock = threading.Lock()
        self._moves = 0

    def hear(self, description: NodeDescription) -> NodeDescription:
        """Keep a description, and return it."""
        self.description = description
        self.set_time(description.clock)
        return description

    def note_answer(self, call: Future[NodeDescription]) -> None:
        """As :meth:`hear`, for a call that has ended, by whichever way."""
        if not call.cancelled() and call.exception() is None:
            self.hear(call.result())

    def set_time(self, reading: ClockReading) -> None:
        """Readings may come in any order: that after more moves of the node's clock is the later one."""
        with self._lock:
            if reading.moves > self._moves:
                self._moves = reading.moves
                dht_clock.set_offset(reading.offset)
