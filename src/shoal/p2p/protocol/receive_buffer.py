"""The memory into which a connection's bytes are received: small while it is quiet, large under load. Pure."""

from __future__ import annotations

from typing import Final

_LEAST_BYTES: Final = 4 * 2**10
_GROWTH: Final = 8
# So many small reads in a row, and a large buffer is given back.
_QUIET_READS: Final = 64


class ReceiveBuffer:
    """A buffer with bytes that were received and not yet consumed, in one piece, and free space behind them.

    A read that fills all the free space makes the buffer grow, up to ``max_capacity``. A peer with many idle
    connections holds little; one under load makes few system calls.
    """

    def __init__(self, max_capacity: int) -> None:
        self._max_capacity = max_capacity
        self._memory = memoryview(bytearray(min(_LEAST_BYTES, max_capacity)))
        self._begin = 0
        self._end = 0
        self._wanted = self.capacity
        self._quiet_reads = 0

    @property
    def capacity(self) -> int:
        """Bytes of memory taken."""
        return len(self._memory)

    @property
    def size(self) -> int:
        """Bytes that wait to be consumed."""
        return self._end - self._begin

    def reserve(self, total: int) -> None:
        """What waits is part of an element of ``total`` bytes: the next free space must reach to its end."""
        self._wanted = max(self._wanted, total)
        if self._begin + total > self.capacity:
            self._make_room()

    def free_space(self) -> memoryview:
        """Where to put the next bytes: never empty, if what waits was consumed or reserved for."""
        if self._begin == self._end:
            self._begin = self._end = 0
            if self._wanted != self.capacity:
                self._memory = memoryview(bytearray(self._wanted))
        elif self._end == self.capacity:
            self._make_room()
        return self._memory[self._end :]

    def clear(self) -> None:
        """Drop what waits."""
        self._begin = self._end = 0

    def release(self) -> None:
        """Drop what waits, and the memory: there will be none any more, unless free space is asked for."""
        self.clear()
        self._memory = memoryview(bytearray())

    def filled(self, count: int) -> None:
        """``count`` bytes were put into the free space."""
        free = self.capacity - self._end
        assert 0 <= count <= free
        self._end += count
        if count == free:
            self._wanted = min(max(self._wanted, self.capacity * _GROWTH), self._max_capacity)
        if count > _LEAST_BYTES // 2:
            self._quiet_reads = 0
        else:
            self._quiet_reads += 1
            if self._quiet_reads >= _QUIET_READS:
                self._quiet_reads = 0
                self._wanted = min(_LEAST_BYTES, self._max_capacity)

    def content(self) -> memoryview:
        """What waits; valid until the next call of another method."""
        return self._memory[self._begin : self._end]

    def consume(self, count: int) -> None:
        """The first ``count`` bytes of the content are done with."""
        self._begin += count

    def _make_room(self) -> None:
        """Move what waits to the start, into larger memory if that is wanted."""
        waiting = self._memory[self._begin : self._end]
        if self._wanted > self.capacity:
            self._memory = memoryview(bytearray(self._wanted))
        self._memory[: len(waiting)] = waiting
        self._begin, self._end = 0, len(waiting)
