"""Where others look for groups, for a peer without bits given: what it reads of that in the DHT, and where it goes.

It arrives, is left over, is one of too many, or has been away. Beside searches it looks now and then whether there is a
grid of which it knows nothing. :mod:`.group_keys` says under which key it looks next.
"""

from __future__ import annotations

import asyncio
import logging
import math
from collections.abc import Callable

from shoal.averaging.grid import Grid
from shoal.averaging.group import GroupInfo, seat_key
from shoal.averaging.matchmaking.census import Census
from shoal.averaging.matchmaking.group_bits import LONELY_BELOW, SPLIT_ABOVE
from shoal.averaging.matchmaking.group_keys import GroupKeys
from shoal.averaging.matchmaking.missed import Missed
from shoal.averaging.matchmaking.peer import LocalPeer
from shoal.averaging.matchmaking.search import Search
from shoal.averaging.matchmaking.signposts import (
    Signposts,
    are_there,
    choose_signpost,
    find_other_grid,
    leaves_signpost,
)
from shoal.errors import ShoalError
from shoal.utils import figures

logger = logging.getLogger(__name__)

EXPLORE_AFTER = 1.0
"""Seconds after which a new peer that has no group yet looks whether the swarm is under other keys, or makes a grid by
now."""
LOOK_EVERY = 20.0
"""Seconds between looks whether others make a grid, of a peer that has no seat in one."""
LOOK_SEATED_EVERY = 120.0
"""Seconds, up to half of them more or less, between looks of one with a seat whether there is another grid, too."""
COUNT_EVERY = 10.0
"""Seconds between looks at the keys with a bit more and a bit less."""


class Scout:
    """Of one matchmaker.

    :param keys: where the peer looks; changed here
    :param move: lets a search begin anew under the key of now, at a start time in DHT time
    """

    def __init__(self, peer: LocalPeer, keys: GroupKeys, move: Callable[[Search, float], None]) -> None:
        self._peer, self._keys, self._bits = peer, keys, keys.bits
        self._move = move
        self._search: Search | None = None
        self._is_new = True
        """Whether the search began without anything known of others."""
        self._census = Census(peer, keys.bits)
        self._next_count = -math.inf
        self._signposts = Signposts(peer)
        self._next_look = -math.inf
        self._next_seated_look = math.inf
        self._left_grid_at = -math.inf
        """When this peer gave up a grid."""
        self._grid_of_others: Grid | None = None
        """One of which this peer has learnt between two searches."""

    # searches and rounds

    def take_seat(self) -> None:
        """Before a search: join the grid of which this peer has learnt since the last one."""
        grid, self._grid_of_others = self._grid_of_others, None
        if grid is not None and not self._keys.has_seat:
            self._join(grid, self._peer.rng.getrandbits(32))

    def search_began(self, search: Search, *, is_new: bool) -> None:
        """:param is_new: nothing is known of others"""
        self._search, self._is_new = search, is_new
        if is_new:
            if not (self._bits.are_given or self._keys.has_seat):
                self._peer.tasks.start(self._arrive(search), "arrive")
            self._peer.tasks.start(self._explore(search, EXPLORE_AFTER), "explore")
        if self._may_look_for_other_grid():
            self._peer.tasks.start(self._look_for_other_grid(search), "look for another grid")

    def found_too_few(self, seen: int) -> None:
        """The start time of the search has come without enough peers."""
        search = self._search
        if search is None or search.is_over or self._bits.are_given:
            return
        moves = self._keys.found_too_few(seen)
        if moves:
            self._restart(search)
        if self._keys.has_seat or (seen == 1 and not moves):
            self._peer.tasks.start(self._explore(search, 0.0), "explore")

    def found_too_many(self, seen: int, rank: int) -> None:
        """So many look at the same time under the key of all, where this peer has that rank."""
        if self._search is not None:
            self._peer.tasks.start(self._spread(self._search, seen, rank), "spread")

    def missed_rounds(self, missed: Missed) -> None:
        """Those at this peer's seat have gone on without it."""
        search = self._search
        if search is None or search.is_over:
            return
        if not self._keys.catch_up(missed, self._peer.rng.getrandbits(32)):
            return
        logger.info(
            "%s: the others have gone on to round %d of the grid: looks where they left a place",
            self._peer.prefix,
            missed.round,
        )
        self._restart(search)

    def search_ended(self, search: Search) -> None:
        """Beside a search, looks would keep the DHT busy that it needs, and a newcomer has to alone."""
        self._count_neighbours(search)
        self._keys.search_ended()
        is_elsewhere = self._bits.are_given or self._keys.has_seat
        if not is_elsewhere and self._peer.clock() >= self._next_look:
            self._peer.tasks.start(self._look_for_grid(), "look for a grid")

    def round_committed(self, group: GroupInfo) -> None:
        """Where to look next, and what newcomers are to know of it."""
        config = self._peer.config
        self._keys.round_committed(group, config.target_group_size, config.min_group_size)
        news = self._keys.news
        if news is None:
            return
        self._grid_of_others = None  # it is older than these news
        if not self._keys.has_seat:
            self._left_grid_at = self._peer.clock()
        if leaves_signpost(group, self._peer.peer_id):
            self._signposts.leave(news)

    # looks

    async def _arrive(self, search: Search) -> None:
        """A new peer joins the grid that there is at once: after :data:`EXPLORE_AFTER` its groups stand."""
        grid = await self._read_signposts()
        if grid is not None and not self._keys.has_seat:
            await self._go_where_others_are(search, grid)

    async def _explore(self, search: Search, delay: float) -> None:
        """Look where others are, unless the search is over after ``delay`` seconds."""
        is_alone = self._is_new or delay == 0
        await asyncio.sleep(delay)
        if search.is_over or self._bits.are_given:
            return
        if self._keys.is_seated or await self._join_grid(search):
            return
        may_move = is_alone and not self._keys.has_seat
        if may_move and await self._census.explore() and not search.is_over:
            self._restart(search)

    async def _spread(self, search: Search, seen: int, rank: int) -> None:
        """Take part in the grid that there is, or make one with all the others that know of none."""
        if await self._join_grid(search) or search.is_over:
            return
        config = self._peer.config
        if self._keys.spread(seen, rank, config.target_group_size, config.min_group_size):
            self._restart(search)

    async def _look_for_grid(self) -> None:
        self._grid_of_others = await self._read_signposts()

    def _may_look_for_other_grid(self) -> bool:
        """Whether it is time to look if the swarm has come apart into two grids; at different times for each peer."""
        if not self._keys.has_seat:
            self._next_seated_look = math.inf
            return False
        now, is_due = self._peer.clock(), self._peer.clock() >= self._next_seated_look
        if is_due or self._next_seated_look == math.inf:
            self._next_seated_look = now + LOOK_SEATED_EVERY * (0.5 * is_due + self._peer.rng.random())
        return is_due

    async def _look_for_other_grid(self, search: Search) -> None:
        signposts, target = await self._signposts.read(), self._peer.config.target_group_size
        grid = find_other_grid(self._keys.grid, signposts, self._peer.clock(), target)
        if grid is not None and self._keys.has_seat:
            await self._go_where_others_are(search, grid)

    def _count_neighbours(self, search: Search) -> None:
        """Choose the number of bits for the next search, by what this one has seen; at a leisurely pace."""
        now = self._peer.clock()
        if self._bits.are_given or not self._bits.is_at_home or now < self._next_count:
            return
        if self._keys.has_seat:
            return
        own = search.count_seen
        self._next_count = now if own > SPLIT_ABOVE else now + COUNT_EVERY * (3 if own < LONELY_BELOW else 1)
        work = self._census.count_neighbours(own, self._peer.after_search(search.place.order_time))
        self._peer.tasks.start(work, "count neighbours")

    async def _read_signposts(self) -> Grid | None:
        self._next_look = self._peer.clock() + LOOK_EVERY
        signposts = await self._signposts.read()
        return choose_signpost(signposts.values(), self._peer.clock(), after=self._left_grid_at)

    # moves

    async def _join_grid(self, search: Search) -> bool:
        """Whether others make a grid, and this search moves to a seat there."""
        grid = await self._read_signposts()
        if grid is None or search.is_over or self._keys.is_seated:
            return False
        if not self._join(grid, self._peer.rng.getrandbits(32)):
            return False
        self._restart(search)
        return True

    async def _go_where_others_are(self, search: Search, grid: Grid) -> None:
        """Move to a seat of that grid, if others are there."""
        draw, layout, before = self._peer.rng.getrandbits(32), grid.layout, self._keys.grid
        key = seat_key(self._peer.prefix, layout.groups, draw % layout.groups)
        try:
            declared = await self._peer.declarations.read(key)
        except ShoalError:
            return
        if not are_there((one for _, one in declared), layout.size) or search.is_over:
            return
        if self._keys.grid == before and not self._bits.are_given and self._join(grid, draw):
            self._restart(search)

    def _join(self, grid: Grid, draw: int) -> bool:
        """Whether this peer has a seat there now that it did not have before."""
        if not self._keys.join_grid(grid, draw):
            return False
        groups = figures.count(grid.layout.groups, "group")
        logger.info(
            "%s: joins about %.0f peers that make %s in a round", self._peer.prefix, grid.swarm, groups
        )
        return True

    def _restart(self, search: Search) -> None:
        start_time = search.now() + self._peer.config.min_matchmaking_time
        self._move(search, max(start_time, search.place.start_time))
