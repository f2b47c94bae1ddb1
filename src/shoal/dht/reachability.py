"""Whether others can dial this node: looked into again when that may have changed, not only when it joins.

* A node that nobody could dial, or of which nobody could tell, asks again every :data:`RECHECK`.
* The first node of a DHT, which had nobody to ask, does when its first :data:`HELPERS` peers have come.
* A node whose own addresses have changed asks again, because what it knew is about others.
"""

from __future__ import annotations

import asyncio
import math
import random
from collections.abc import Awaitable, Callable, Sequence

from shoal.p2p.host import Host
from shoal.p2p.identity import PeerID
from shoal.p2p.multiaddr import Multiaddr

HELPERS = 2
"""How many peers are asked to dial back."""
RECHECK = 600.0
LOOK_EVERY = 5.0
PAUSE = 30.0
"""Between two checks at least, however often the addresses change."""


class ReachabilityWatch:
    """See the module. ``on_change`` is awaited when the answer has changed, or the addresses that it is about."""

    def __init__(
        self,
        host: Host,
        helpers: Callable[[], Sequence[PeerID]],
        on_change: Callable[[], Awaitable[None]],
        rng: random.Random,
    ) -> None:
        self._host = host
        self._helpers = helpers
        self._on_change = on_change
        self._rng = rng
        self._loop = asyncio.get_running_loop()
        self._checked: frozenset[Multiaddr] | None = None
        self._last = self._next = -math.inf

    async def check(self, helpers: Sequence[PeerID]) -> None:
        """Ask these peers now; what came of it is the host's to know."""
        self._checked = frozenset(self._host.candidate_addresses)
        result = await self._host.check_reachability(helpers)
        self._last = self._loop.time()
        self._next = math.inf if result.reachable else self._last + RECHECK

    async def run(self) -> None:
        """For ever."""
        while True:
            await asyncio.sleep(LOOK_EVERY)
            helpers = list(self._helpers())
            if not self._is_due(len(helpers)):
                continue
            before, addresses = self._host.can_be_dialed, self._checked
            await self.check(self._rng.sample(helpers, min(HELPERS, len(helpers))))
            moved = addresses is not None and addresses != self._checked
            if moved or before != self._host.can_be_dialed:
                await self._on_change()

    def _is_due(self, helpers: int) -> bool:
        addresses = frozenset(self._host.candidate_addresses)
        if not addresses or not helpers:
            return False
        if self._checked is None:
            return helpers >= HELPERS
        now = self._loop.time()
        return now >= self._next or (addresses != self._checked and now >= self._last + PAUSE)
