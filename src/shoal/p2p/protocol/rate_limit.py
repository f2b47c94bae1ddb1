"""A bound on bytes a second. Pure: the time is an argument.

A token bucket that may be overdrawn: what is spent is never refused, and who wants to spend more waits until the bucket
is full enough again. So the rate holds over any time much longer than :data:`BURST_SECONDS`, whatever the sizes are.
"""

from __future__ import annotations

BURST_SECONDS = 0.05
"""What may be spent at once after a pause, in seconds of the rate."""

LEAST_QUANTUM = 1 << 10
"""Bytes. At a low rate, larger steps of many connections would keep each one silent for long."""


class RateLimit:
    """``rate``: bytes a second; None: no limit."""

    def __init__(self, rate: float | None) -> None:
        self._rate = rate
        self._free_at = 0.0
        """When everything that was spent has been paid for."""

    @property
    def is_limited(self) -> bool:
        """Whether there is a limit."""
        return self._rate is not None

    @property
    def quantum(self) -> int | None:
        """Bytes that are a good step between two looks; None without a limit."""
        return None if self._rate is None else max(LEAST_QUANTUM, int(self._rate * BURST_SECONDS))

    def spend(self, nbytes: int, now: float) -> None:
        """So many bytes were moved."""
        if self._rate is not None:
            self._free_at = max(self._free_at, now - BURST_SECONDS) + nbytes / self._rate

    def wait(self, now: float) -> float:
        """Seconds until more may be moved; 0: now."""
        return 0.0 if self._rate is None else max(0.0, self._free_at - now)
