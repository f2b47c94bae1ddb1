"""Reading at the rate that the host may receive."""

from __future__ import annotations

import asyncio
import math

from shoal.p2p.protocol.rate_limit import RateLimit

LATELY = 5.0
"""Seconds for which a connection counts as slow after it has waited: it waits again after its next step."""


class ReadingPace:
    """Pauses one connection while all of the host have read more than they may. What is not read stays with its
    sender: TCP tells it so.
    """

    def __init__(self, limit: RateLimit) -> None:
        self._limit = limit
        self._loop = asyncio.get_running_loop()
        self._transport: asyncio.Transport | None = None
        self._is_paused = False
        self._waited_at = -math.inf

    def connect(self, transport: asyncio.Transport) -> None:
        """Read from ``transport`` from now on."""
        self._transport = transport

    @property
    def quantum(self) -> int | None:
        """The most that is to be read at once; None without a limit."""
        return self._limit.quantum

    @property
    def is_slow(self) -> bool:
        """Whether reading has waited for the rate lately."""
        return self._is_paused or self._loop.time() - self._waited_at < LATELY

    def note(self, nbytes: int) -> None:
        """So much was read."""
        if not self._limit.is_limited:
            return
        now = self._loop.time()
        self._limit.spend(nbytes, now)
        wait = self._limit.wait(now)
        if wait > 0 and not self._is_paused and self._transport is not None:
            self._is_paused = True
            self._transport.pause_reading()
            self._loop.call_later(wait, self._read_again)

    def _read_again(self) -> None:
        if self._transport is None or self._transport.is_closing():
            return
        wait = self._limit.wait(self._loop.time())  # other connections have read meanwhile
        if wait > 0:
            self._loop.call_later(wait, self._read_again)
            return
        self._is_paused, self._waited_at = False, self._loop.time()
        self._transport.resume_reading()
