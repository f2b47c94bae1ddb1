"""Runs one :class:`~shoal.dht.lookup.Lookup`: asks peers, times those that stall, and feeds back what they say."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Sequence

from shoal.dht.lookup import Answered, Event, Failed, Lookup, Stalled
from shoal.dht.tasks import TaskSet
from shoal.p2p.identity import PeerID

Answer = Sequence[PeerID] | None
Ask = Callable[[PeerID], Coroutine[None, None, Answer]]
"""Asks one peer; returns the nodes it named, or None if it did not answer."""


class Search:
    """One run of a lookup, until it is finished or :meth:`stop` was called.

    Calls still open at the end are handed to ``leftovers`` if that is given (they go on to their own end), and
    cancelled otherwise.
    """

    def __init__(
        self, lookup: Lookup, ask: Ask, stall_timeout: float, leftovers: TaskSet | None = None
    ) -> None:
        self.lookup = lookup
        self._ask = ask
        self._stall_timeout = stall_timeout
        self._leftovers = leftovers
        self._loop = asyncio.get_running_loop()
        self._asked: dict[asyncio.Task[Answer], PeerID] = {}
        self._failure: BaseException | None = None
        self._timers: list[asyncio.TimerHandle] = []
        self._stopped = False
        self._over: asyncio.Future[None] = self._loop.create_future()

    async def run(self) -> None:
        """Search. Raises what :data:`Ask` raises: that is a bug."""
        self._ask_all(self.lookup.start())
        try:
            if not self._over.done():
                await self._over
        finally:
            self._end()
        if self._failure is not None:
            raise self._failure

    def stop(self) -> None:
        """Enough was found."""
        self._stopped = True
        self._check_over()

    def _ask_all(self, peers: Sequence[PeerID]) -> None:
        tasks = [self._loop.create_task(self._ask(peer)) for peer in peers]
        for task, peer in zip(tasks, peers, strict=True):
            self._asked[task] = peer
            task.add_done_callback(self._answered)
        if tasks:
            self._timers.append(self._loop.call_later(self._stall_timeout, self._stalled, tasks))
        self._check_over()

    def _answered(self, task: asyncio.Task[Answer]) -> None:
        peer = self._asked.pop(task, None)
        if peer is None:
            return
        nodes: Answer = None
        if not task.cancelled():
            self._failure = task.exception()
            nodes = task.result() if self._failure is None else None
        event: Event = Failed(peer) if nodes is None else Answered(peer, nodes)
        if not self._over.done():
            self._ask_all(self.lookup.handle(event))

    def _stalled(self, tasks: list[asyncio.Task[Answer]]) -> None:
        for task in tasks:
            if task in self._asked and not self._over.done():
                self._ask_all(self.lookup.handle(Stalled(self._asked[task])))

    def _check_over(self) -> None:
        if not self._over.done() and (self._stopped or self._failure or self.lookup.finished):
            self._over.set_result(None)

    def _end(self) -> None:
        """The search is over, or was cancelled: its open calls get another owner, or end."""
        if not self._over.done():
            self._over.cancel()
        for timer in self._timers:
            timer.cancel()
        for task in list(self._asked):
            if self._leftovers is not None:
                task.remove_done_callback(self._answered)
                self._leftovers.adopt(task)
            else:
                task.cancel()
        self._asked.clear()
