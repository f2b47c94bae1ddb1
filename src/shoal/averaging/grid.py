"""What a peer knows of the grid into which a large swarm arranges itself, as it says it to others. Pure.

More peers than one group holds average in a grid: so many groups in each round, and after each one its members are
dealt to the groups of the next (:mod:`.matchmaking.seats`). All of that follows from what the members of a group said
of themselves here, so that each computes it alone and all come to the same.
"""

from __future__ import annotations

import math

from shoal.utils.structs import CompactStruct

UNKNOWN_ROUND = 0
"""That of a peer that has a seat in a grid, and has not met anybody there yet."""
MAX_GROUPS = 1 << 20
MAX_ROUND = 1 << 48
MAX_SWARM = 1e9


class Layout(CompactStruct, frozen=True):
    """``groups`` in each round, whose members are dealt to places for ``size`` members each."""

    groups: int = 1
    size: int = 0

    @property
    def places(self) -> int:
        return self.groups * self.size


ONE_GROUP = Layout()


class Grid(CompactStruct, frozen=True):
    """What a peer carries from group to group. Before its first one, and where one group holds all, nothing."""

    layout: Layout = ONE_GROUP
    round: int = UNKNOWN_ROUND
    """Rounds since the layout began to be used, by the middle one of its last group's members."""
    swarm: float = 0.0
    """How many peers there are in all, as estimated from group to group; 0: not known."""
    next_layout: Layout = ONE_GROUP
    next_round: int = 0
    """From that round on ``next_layout`` is used; 0: no change is planned."""


NO_GRID = Grid()


def grid_problem(grid: Grid) -> str | None:
    """What is wrong with what another peer says here, if anything."""
    for layout in (grid.layout, grid.next_layout):
        if not (1 <= layout.groups <= MAX_GROUPS and 0 <= layout.size <= MAX_GROUPS):
            return f"grid of {layout.groups} groups with {layout.size} places"
    if not (0 <= grid.round <= MAX_ROUND and 0 <= grid.next_round <= MAX_ROUND):
        return f"grid in round {grid.round}, {grid.next_round}"
    if not (math.isfinite(grid.swarm) and 0 <= grid.swarm <= MAX_SWARM):
        return f"grid of {grid.swarm} peers"
    if grid.layout.groups > 1 and grid.swarm < 1:
        return f"grid of {grid.layout.groups} groups for {grid.swarm} peers"
    return None
