"""The shared memory of an averager as its service sees it: the snapshot and the average."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

import numpy as np

from shoal.averaging.allreduce.exchange import Arena
from shoal.averaging.partition import Layout
from shoal.errors import InvalidStateError
from shoal.runtime.memory import SharedMemory


class SharedArena:
    """The memory that the user process has made for both areas, once it is attached.

    ``is_free`` is cleared while an average waits in it for the user's call: no round may begin then.
    """

    def __init__(self, layout: Layout) -> None:
        self._layout = layout
        self._memory: SharedMemory | None = None
        self._areas: Arena | None = None
        self._populating: asyncio.Future[None] | None = None
        self.is_free = asyncio.Event()
        self.is_free.set()

    def attach(self, nbytes: int, descriptor: int, *, holds_values: bool = False) -> None:
        """Map the memory, and begin to get its pages; owns ``descriptor`` from now on.

        :param holds_values: the user's tensors are the first area, and have their pages
        """
        self._memory = SharedMemory.from_descriptor(descriptor, nbytes)
        self._areas = areas = map_areas(self._memory, self._layout)
        empty = [areas.average] if holds_values else [areas.snapshot, areas.average]
        self._populating = asyncio.ensure_future(asyncio.to_thread(populate, empty))

    @property
    def areas(self) -> Arena:
        """:raises InvalidStateError: no memory is attached"""
        if self._areas is None:
            raise InvalidStateError("no arena is attached")
        return self._areas

    async def populated(self) -> None:
        """Wait until all pages are there. Cancelling the wait does not stop that."""
        if self._populating is not None:
            await asyncio.shield(self._populating)

    async def close(self) -> None:
        """Give the memory back, when its pages are no longer being written."""
        if self._populating is not None:
            await self._populating
        self._areas = None
        if self._memory is not None:
            self._memory.close()


def populate(areas: Sequence[memoryview]) -> None:
    """Have the system give empty areas their pages now: the first round would take ten times as long to get them."""
    for area in areas:
        np.frombuffer(area, np.uint8).fill(0)


def map_areas(memory: SharedMemory, layout: Layout) -> Arena:
    """Both areas of the shared memory: the snapshot, and the average behind it."""
    return Arena(memory.buffer[: layout.nbytes], memory.buffer[layout.nbytes : 2 * layout.nbytes])
