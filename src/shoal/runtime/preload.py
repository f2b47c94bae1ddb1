"""Importing modules ahead of need, on a thread of the background process."""

from __future__ import annotations

import asyncio
import importlib
import linecache
import logging
import threading

logger = logging.getLogger(__name__)


class Preload:
    """Imports ``names``, once; whatever fails is imported again by the code that needs it, which then says why."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self.names: tuple[str, ...] = ()
        self._loop = loop
        self._done: asyncio.Future[None] | None = None

    def start(self) -> None:
        """Begin, unless it has begun or there is nothing to import."""
        if self._done is None and self.names:
            self._done = self._loop.create_future()
            threading.Thread(target=self._run, args=(self._done,), name="shoal-preload", daemon=True).start()

    async def finished(self) -> None:
        """Wait until all is imported; begins with that if need be."""
        self.start()
        if self._done is not None:
            await asyncio.shield(self._done)

    def _run(self, done: asyncio.Future[None]) -> None:
        for name in self.names:
            try:
                importlib.import_module(name)
            except Exception:  # what needs the module will raise it again
                logger.exception("could not import %s ahead of need", name)
            linecache.clearcache()  # torch looks at its own sources, which then stay in memory: 2 MB
        self._loop.call_soon_threadsafe(done.set_result, None)
