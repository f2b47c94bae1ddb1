"""How much is copied and computed at a time, in the user's process.

Each call on a chunk lets go of the interpreter's lock. A thread of the trainer that runs nothing but Python gives it
back after 5 ms (:func:`sys.getswitchinterval`), however short the call was. So chunks are as large as the cache allows,
and grow where the lock is contended: there the waits cost more than the cache saves.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator

READ_NBYTES = 1 << 20
"""Where tensors are read: what follows on a look at a chunk finds it in the cache."""
WRITE_NBYTES = 1 << 18
"""Where they are written: what the trainer writes to a chunk, without the lock, between reading and writing is lost."""
MOST_NBYTES = 1 << 24
HELD_UP = 0.004
"""Seconds for one chunk from which on the next one is larger."""


class ChunkSize:
    """Of one pass over tensors, from ``nbytes`` on; ``clock`` gives seconds."""

    def __init__(self, nbytes: int, clock: Callable[[], float] = time.perf_counter) -> None:
        self._clock = clock
        self._nbytes = nbytes
        self._last = clock()

    def next(self) -> int:
        """The size of the next chunk, in bytes. The one before is done."""
        now = self._clock()
        if now - self._last > HELD_UP:
            self._nbytes = min(2 * self._nbytes, MOST_NBYTES)
        self._last = now
        return self._nbytes

    def slices(self, count: int, itemsize: int) -> Iterator[slice]:
        """Chunks of so many elements."""
        start = 0
        while start < count:
            stop = min(count, start + self.next() // itemsize)
            yield slice(start, stop)
            start = stop
