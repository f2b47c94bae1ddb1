"""The shared memory of an averager as its service maps it."""

from __future__ import annotations

import asyncio
import os

import pytest
import torch

from shoal.averaging.background.arena import SharedArena
from shoal.averaging.partition import Layout
from shoal.runtime.memory import SharedMemory


@pytest.mark.parametrize("holds_values", [False, True])
def test_only_empty_areas_are_filled_with_pages(holds_values: bool):
    """The first one may hold the user's tensors, who may write to them at this moment."""
    layout = Layout.from_tensors([torch.empty(100_000)])
    memory = SharedMemory.create(2 * layout.nbytes)
    areas = torch.frombuffer(memory.buffer, dtype=torch.uint8).view(2, -1)
    areas.fill_(7)

    async def attach() -> None:
        arena = SharedArena(layout)
        arena.attach(memory.nbytes, os.dup(memory.fd), holds_values=holds_values)
        await arena.populated()
        await arena.close()

    asyncio.run(attach())
    assert areas[0].unique().tolist() == [7 if holds_values else 0]
    assert areas[1].unique().tolist() == [0]
