"""Whether the user's process is there for what services ask of it, as they see it on their event loop."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable, Iterator
from typing import TypeVar

from shoal.errors import ShoalError

T = TypeVar("T")


class UserProcessAbsent(ShoalError):
    """The user's process is stopped, or has not answered for long; the message names it and says what to do."""


class Presence:
    """The user's process is *absent* while it is stopped or does not answer. Lives on one event loop."""

    def __init__(self) -> None:
        self._absence: str | None = None
        self._changed = asyncio.Event()
        self._leavers: list[Callable[[], None]] = []

    @property
    def absence(self) -> str | None:
        """Why the user's process is absent; None: it is there."""
        return self._absence

    def update(self, absence: str | None) -> None:
        """The user's process has become absent, for this reason, or (None) is there again."""
        if absence == self._absence:
            return
        self._absence = absence
        self._changed.set()
        self._changed = asyncio.Event()
        if absence is not None:
            for leave in list(self._leavers):
                leave()

    @contextlib.contextmanager
    def when_absent(self, leave: Callable[[], None]) -> Iterator[None]:
        """Inside, ``leave`` is called as soon as the user's process is absent."""
        self._leavers.append(leave)
        try:
            if self._absence is not None:
                leave()
            yield
        finally:
            self._leavers.remove(leave)

    async def absent(self) -> str:
        """Wait until the user's process is absent; why."""
        while self._absence is None:
            await self._changed.wait()
        return self._absence

    async def present(self) -> None:
        """Wait until the user's process is there."""
        while self._absence is not None:
            await self._changed.wait()

    async def unless_absent(self, work: Awaitable[T]) -> T:
        """The outcome of ``work``, which is cancelled when the user's process becomes absent.

        :raises UserProcessAbsent: it is absent, and ``work`` ended by being cancelled
        """
        running = asyncio.ensure_future(work)
        leaving = asyncio.ensure_future(self.absent())
        try:
            await asyncio.wait({running, leaving}, return_when=asyncio.FIRST_COMPLETED)
            if not running.done():
                running.cancel()
                await asyncio.wait({running})
            if running.cancelled() and leaving.done():
                raise UserProcessAbsent(leaving.result())
            return running.result()
        finally:
            for task in (running, leaving):
                task.cancel()
            await asyncio.gather(running, leaving, return_exceptions=True)
