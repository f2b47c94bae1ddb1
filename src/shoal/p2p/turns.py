"""Whose turn it is to send, where a host sends no more than so many bytes a second: one after the other.

All connections share the limit. Were all woken when there is room, always the same ones would take it.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable

from shoal.p2p.protocol.frames import CHUNK_BYTES
from shoal.p2p.protocol.rate_limit import RateLimit

STEP_SECONDS = 3.0
"""Within so much time each payload under way has a turn: its connection sends nothing else meanwhile, no sign of life
either, and the peer would take it for dead."""


class SendingTurns:
    """Of one host. Without a limit, nobody waits."""

    def __init__(self, rate: float | None) -> None:
        """:param rate: bytes a second; None: no limit"""
        self._limit = RateLimit(rate)
        self._waiting: deque[Callable[[], None]] = deque()
        self._timer: asyncio.TimerHandle | None = None
        most = 1 if rate is None else max(1, int(rate * STEP_SECONDS / CHUNK_BYTES))
        self._payloads = asyncio.Semaphore(most)

    @property
    def is_limited(self) -> bool:
        """Whether there is a limit."""
        return self._limit.is_limited

    @property
    def quantum(self) -> int | None:
        """Bytes that are a good step; None without a limit."""
        return self._limit.quantum

    @property
    def is_free(self) -> bool:
        """Whether something may be sent now, and nobody waits for that."""
        return not self._waiting and self._limit.wait(self._now()) == 0

    def spend(self, nbytes: int) -> None:
        """So many bytes were sent; negative: so many were paid for, and not sent."""
        self._limit.spend(nbytes, self._now())

    def ask(self, on_turn: Callable[[], None]) -> None:
        """Call ``on_turn`` once, when it is its turn: it sends one step, and spends that at once."""
        self._waiting.append(on_turn)
        if self._timer is None:
            loop = asyncio.get_running_loop()
            self._timer = loop.call_later(self._limit.wait(loop.time()), self._serve)

    async def wait(self, nbytes: int) -> None:
        """Wait for a turn to send so many bytes, which are paid for then."""
        if self.is_free:
            self.spend(nbytes)
            return
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()

        def take() -> None:
            if not turn.done():
                self.spend(nbytes)
                turn.set_result(None)

        self.ask(take)
        try:
            await turn
        except asyncio.CancelledError:
            if turn.done() and not turn.cancelled():
                self.spend(-nbytes)
            raise

    async def enter(self) -> None:
        """Before a payload that is sent in steps. With a limit only so many are under way as have turns soon."""
        if self.is_limited:
            await self._payloads.acquire()

    def leave(self) -> None:
        """After :meth:`enter`, once."""
        if self.is_limited:
            self._payloads.release()

    def _serve(self) -> None:
        self._timer = None
        try:
            while self._waiting and self._limit.wait(self._now()) == 0:
                self._waiting.popleft()()
        finally:
            if self._waiting and self._timer is None:
                self._timer = asyncio.get_running_loop().call_later(
                    self._limit.wait(self._now()), self._serve
                )

    @staticmethod
    def _now() -> float:
        return asyncio.get_running_loop().time()
