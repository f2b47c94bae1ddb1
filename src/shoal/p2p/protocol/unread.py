"""How much a peer may make this side hold. Pure."""

from __future__ import annotations


class UnreadBytes:
    """What the streams that a peer opened on one connection make this side hold, and how much that may be."""

    __slots__ = ("_limit", "_used")

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._used = 0

    def take(self, count: int) -> bool:
        """Note ``count`` more bytes, or nothing and False if they are too many."""
        if self._used + count > self._limit:
            return False
        self._used += count
        return True

    def give_back(self, count: int) -> None:
        """``count`` bytes are held no more."""
        self._used -= count

    @property
    def refusal(self) -> str:
        """Why nothing more is taken."""
        return f"more than {self._limit} bytes of messages on this connection wait to be read"
