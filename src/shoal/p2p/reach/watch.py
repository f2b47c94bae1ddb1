"""When to find out anew whether others can dial this host, and which peers are asked.

* A host that joins asks before others may rely on it, and again soon while nobody could tell.
* The first host of a DHT, which had nobody to ask, asks the first peer that comes.
* A host asks again when a peer comes that may see it from farther away than those that it has asked, when its own
  addresses have changed, when a round failed because it could not be dialed, and every :data:`RECHECK`.
"""

from __future__ import annotations

import asyncio
import math
import random
from collections.abc import Awaitable, Callable, Sequence
from typing import Protocol

from shoal.p2p.identity import PeerID
from shoal.p2p.multiaddr import Multiaddr
from shoal.p2p.reach.helper import PER_PEER_PAUSE
from shoal.p2p.reach.inquiry import Reach
from shoal.p2p.reach.reachability import Findings, Reachability
from shoal.p2p.reach.vantage import Vantage

HELPERS = 2
"""How many peers are asked to dial back; as many more if they do not agree."""
RECHECK = 180.0
LOOK_EVERY = 5.0
PAUSE = PER_PEER_PAUSE + 0.5
"""Between two checks at least: helpers do not answer the same peer more often."""
FIRST_RETRY, LAST_RETRY = PAUSE, 30.0
"""Between two checks while nobody could tell."""


class WatchedHost(Protocol):
    """What the watch needs of its host."""

    reach: Reach

    @property
    def reachability(self) -> Reachability:
        """How others reach the host now."""

    @property
    def candidate_addresses(self) -> list[Multiaddr]:
        """Where it may be that others can dial the host."""

    def connected_peers(self) -> list[PeerID]:
        """Everybody to whom a connection stands."""

    async def check_reachability(self, helpers: Sequence[PeerID], *, more: Sequence[PeerID] = ()) -> Findings:
        """Ask these peers, and draw the conclusions."""


class ReachabilityWatch:
    """See the module. ``on_change`` is awaited when the answer has changed, or what is announced."""

    def __init__(
        self,
        host: WatchedHost,
        others: Callable[[], Sequence[PeerID]],
        on_change: Callable[[], Awaitable[None]],
        rng: random.Random,
    ) -> None:
        """``others``: peers that may be asked where no connected one is left."""
        self._host = host
        self._others = others
        self._on_change = on_change
        self._rng = rng
        self._loop = asyncio.get_running_loop()
        self._news = asyncio.Event()
        self._turn = asyncio.Lock()
        self._asked: set[PeerID] = set()
        self._checked: frozenset[Multiaddr] | None = None
        self._last = self._next = -math.inf
        self._retry = FIRST_RETRY

    def begin(self, *, in_doubt: bool) -> None:
        """Take the host under watch; ``in_doubt``: nobody may rely on it before somebody was asked."""
        self._host.reach.on_news = self._news.set
        if in_doubt:
            self._host.reach.doubt()

    def look_again(self, *, in_doubt: bool) -> None:
        """Ask soon; ``in_doubt``: nobody may rely on dialing this host until then."""
        if in_doubt:
            self._host.reach.doubt()
        self._news.set()

    async def check(self, first: Sequence[PeerID] = ()) -> None:
        """Ask now, these peers before others; what came of it is the host's to know."""
        async with self._turn:
            self._news.clear()
            self._last = self._loop.time()
            self._checked = frozenset(self._host.candidate_addresses)
            helpers = list(dict.fromkeys([*first, *self._by_vantage()]))
            self._asked = set(helpers[:HELPERS])
            result = await self._host.check_reachability(
                helpers[:HELPERS], more=helpers[HELPERS : 2 * HELPERS]
            )
            self._last = self._loop.time()
        reach = self._host.reach
        if not reach.reachability.is_in_doubt and reach.has_heard_of_widest(self._host.connected_peers()):
            self._news.clear()
        if result.reachable is None:
            self._next = self._last + self._retry
            self._retry = min(2 * self._retry, LAST_RETRY)
        else:
            self._next = self._last + RECHECK * self._rng.uniform(0.75, 1.25)
            self._retry = FIRST_RETRY

    async def run(self) -> None:
        """For ever."""
        reach = self._host.reach
        before = reach.reachability
        while True:
            await self._wait()
            if self._is_due():
                await self.check()
            now = reach.reachability
            if (now.is_full, now.addresses) != (before.is_full, before.addresses):
                before = now
                await self._on_change()

    async def _wait(self) -> None:
        """Until there is news, or it is time to look."""
        try:
            async with asyncio.timeout(self._pause()):
                await self._news.wait()
        except TimeoutError:
            return
        best = self._by_vantage()[:1]
        if not best:
            self._news.clear()  # the next connection is news again
        elif set(best) <= self._asked:
            await asyncio.sleep(max(self._last + PAUSE - self._loop.time(), 0.0))

    def _pause(self) -> float:
        is_waiting = self._host.reachability.is_in_doubt and self._by_vantage()
        return max(min(self._next - self._loop.time(), LOOK_EVERY), 0.0) if is_waiting else LOOK_EVERY

    def _is_due(self) -> bool:
        host, now = self._host, self._loop.time()
        if host.reachability.is_intended or not self._by_vantage():
            return False
        if self._news.is_set():
            return True
        if self._checked is None:
            return host.reachability.is_in_doubt
        has_moved = self._checked != frozenset(host.candidate_addresses)
        return now >= self._next or (has_moved and now >= self._last + PAUSE)

    def _by_vantage(self) -> list[PeerID]:
        """Whom to ask: those that see this host from farthest away first, and others than the last time."""
        reach = self._host.reach
        connected = self._host.connected_peers()
        self._rng.shuffle(connected)
        connected.sort(key=lambda peer: (-(reach.vantage(peer) or Vantage.MACHINE), peer in self._asked))
        return list(dict.fromkeys([*connected, *self._others()]))
