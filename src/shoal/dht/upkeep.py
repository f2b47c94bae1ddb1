"""What a node does by itself all the time: exchange with neighbours, refresh, retries, coming back after a sleep."""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import Awaitable, Callable

from shoal.dht.bootstrap import Bootstrap
from shoal.dht.ids import id_in_bucket
from shoal.dht.neighbours import Neighbours
from shoal.utils import figures

logger = logging.getLogger(__name__)

FIRST_EXCHANGE = 1.0
LONGEST_PAUSE = 5.0
"""Seconds between two rounds of upkeep at most; bounds how late a sleep of the machine is noticed."""
SLEEP_NOTICED = 10.0
"""A jump of the time by more than this means that the machine, or this process, was asleep."""
EXCHANGE_WITH = 2
MAX_PROBES = 8


class Upkeep:
    """See the module. ``search`` looks for an id, which refreshes the part of the table around it. ``steady`` is time
    that goes on while the machine sleeps, as the event loop's does not.
    """

    def __init__(
        self,
        neighbours: Neighbours,
        bootstrap: Bootstrap,
        search: Callable[[int], Awaitable[object]],
        steady: Callable[[], float],
        rng: random.Random,
    ) -> None:
        self._neighbours = neighbours
        self._bootstrap = bootstrap
        self._search = search
        self._steady = steady
        self._rng = rng
        self._loop = asyncio.get_running_loop()
        self._interval = FIRST_EXCHANGE
        self._next_exchange = self._loop.time() + FIRST_EXCHANGE

    def hurry(self) -> None:
        """The neighbourhood has changed: exchange sooner again."""
        self._interval = FIRST_EXCHANGE
        self._next_exchange = min(self._next_exchange, self._loop.time() + FIRST_EXCHANGE)

    async def run(self) -> None:
        """For ever."""
        while True:
            before, steady_before = self._loop.time(), self._steady()
            pause = min(max(self._next_exchange - before, FIRST_EXCHANGE), LONGEST_PAUSE)
            await asyncio.sleep(pause)
            late = self._loop.time() - before - pause
            jumped = self._steady() - steady_before - pause
            if max(late, jumped) > SLEEP_NOTICED:
                await self._come_back(max(late, jumped))
            await self._round()

    async def _round(self) -> None:
        neighbours, now = self._neighbours, self._loop.time()
        if not len(neighbours.table):
            neighbours.retry_all_soon()
            self._bootstrap.retry_soon()
        stale = neighbours.table.not_seen_since(now - neighbours.config.refresh_timeout)
        for peer in [*neighbours.lost_to_retry(now), *stale][:MAX_PROBES]:
            neighbours.greet_in_background(peer)
        if now >= self._next_exchange:
            await self._exchange()
        await self._refresh_one_bucket()

    async def _exchange(self) -> None:
        """Ask some neighbours whom they know, and tell them of this node."""
        config, peers = self._neighbours.config, list(self._neighbours.table)
        size = len(peers)
        await self._neighbours.greet_all(self._rng.sample(peers, min(EXCHANGE_WITH, size)))
        if len(self._neighbours.table) == size:
            self._interval = min(2 * self._interval, config.exchange_interval)
        self._next_exchange = self._loop.time() + self._interval * self._rng.uniform(0.75, 1.25)

    async def _refresh_one_bucket(self) -> None:
        """Look into one part of the table into which nobody has looked for long.

        While fewer nodes than a bucket holds are known the exchange covers all of them.
        """
        table, config = self._neighbours.table, self._neighbours.config
        if len(table) < config.bucket_size:
            return
        due = table.buckets_to_refresh(self._loop.time(), config.refresh_timeout)
        if due:
            target = id_in_bucket(table.own_id, self._rng.choice(due), self._rng.getrandbits(160))
            table.refreshed(target, self._loop.time())
            await self._search(target)

    async def _come_back(self, seconds: float) -> None:
        """Connections may have died unnoticed, and neighbours may have gone: call everybody."""
        logger.info("this machine was asleep for about %s: calling all neighbours", figures.duration(seconds))
        self._neighbours.retry_all_soon()
        self._bootstrap.retry_soon()
        self.hurry()
        await self._neighbours.greet_all(list(self._neighbours.table)[:64])
