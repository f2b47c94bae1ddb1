"""A payload that arrives in pieces, over several connections, in any order and some of them twice. Pure.

Each place is written once. A piece that comes again is not written, so that what was verified stays as it is, whatever
another connection brings.
"""

from __future__ import annotations

from shoal.errors import ProtocolViolation
from shoal.p2p.protocol.frames import CHUNK_BYTES, Piece


class Assembly:
    """One payload, in ``memory``; ``is_placed``: whether its receiver has chosen that, and it stays there."""

    __slots__ = ("_is_written", "_missing", "is_placed", "memory", "tag")

    def __init__(self, tag: int, memory: memoryview, *, is_placed: bool = True) -> None:
        self.tag = tag
        self.memory = memory
        self.is_placed = is_placed
        self._missing = -(-len(memory) // CHUNK_BYTES)
        self._is_written = bytearray(self._missing)

    @property
    def is_complete(self) -> bool:
        """Whether every byte has arrived and was verified."""
        return self._missing == 0

    def check(self, tag: int, total: int) -> None:
        """:class:`ProtocolViolation` if the peer has said something else of this payload before."""
        if tag != self.tag or total != len(self.memory):
            raise ProtocolViolation(
                f"a payload with tag {self.tag} and {len(self.memory)} bytes goes on with tag {tag} and {total} bytes"
            )

    def place(self, piece: Piece) -> memoryview | None:
        """Where a piece belongs; None if it has arrived before."""
        if self._is_written[piece.offset // CHUNK_BYTES]:
            return None
        return self.memory[piece.offset : piece.offset + piece.size]

    def move_to(self, memory: memoryview) -> None:
        """Its receiver wants it here instead: what has come of it is copied, the rest goes here."""
        memory[:] = self.memory
        self.memory, self.is_placed = memory, True

    def note_written(self, piece: Piece) -> bool:
        """The piece was verified, and is in its place. Returns whether the payload is complete now."""
        index = piece.offset // CHUNK_BYTES
        if not self._is_written[index]:
            self._is_written[index] = 1
            self._missing -= 1
        return self.is_complete


class Numbers:
    """A set of numbers that are used up roughly in order, from 0: takes the memory of those that are out of order."""

    __slots__ = ("_all_below", "_beyond")

    def __init__(self) -> None:
        self._all_below = 0
        self._beyond: set[int] = set()

    def add(self, number: int) -> None:
        """This one is used up."""
        self._beyond.add(number)
        while self._all_below in self._beyond:
            self._beyond.remove(self._all_below)
            self._all_below += 1

    def __contains__(self, number: int) -> bool:
        return number < self._all_below or number in self._beyond
