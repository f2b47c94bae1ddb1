"""The shared memory of an averager as its service sees it: the snapshot and the average."""

from __future__ import annotations

import torch

from shoal.averaging.allreduce.exchange import Arena
from shoal.averaging.partition import Layout
from shoal.runtime.memory import SharedMemory


def populate(arena: Arena) -> None:
    """Have the system give the arena its pages now: the first round would take ten times as long to get them."""
    arena.snapshot.zero_()
    arena.average.zero_()


def map_arena(memory: SharedMemory, layout: Layout) -> Arena:
    """Both areas of the shared memory: the snapshot, and the average behind it."""
    both = torch.frombuffer(memory.buffer, dtype=torch.uint8)
    return Arena(both[: layout.nbytes], both[layout.nbytes : 2 * layout.nbytes])
