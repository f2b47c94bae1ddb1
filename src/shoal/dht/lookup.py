"""Runs one search for the nodes nearest to an id: asks peers, and tells :mod:`.lookup_core` what they say."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Sequence

from shoal.dht.lookup_core import (
    AskNode,
    Event,
    LookupBegan,
    LookupCore,
    LookupStopped,
    NodeAnswered,
    NodeFailed,
)
from shoal.p2p.identity import PeerID
from shoal.sansio.driver import Driver
from shoal.utils.tasks import TaskSet

Answer = Sequence[PeerID] | None
Ask = Callable[[PeerID], Coroutine[None, None, Answer]]
"""Asks one peer; returns the nodes it named, or None if it did not answer."""


class Lookup:
    """One run of a core, until it is over.

    Calls still open at the end are handed to ``leftovers`` if that is given (they go on to their own end), and
    cancelled otherwise.
    """

    def __init__(self, core: LookupCore, ask: Ask, leftovers: TaskSet | None = None) -> None:
        self._core = core
        self._ask = ask
        self._leftovers = leftovers
        self._loop = asyncio.get_running_loop()
        self._asked: dict[asyncio.Task[Answer], PeerID] = {}
        self._failure: BaseException | None = None
        self._over: asyncio.Future[None] = self._loop.create_future()
        self._driver: Driver[Event, AskNode] = Driver(
            core, self._carry_out, on_turn=self._check_over, name="lookup"
        )

    async def run(self) -> None:
        """Search. Raises what :data:`Ask` raises: that is a bug."""
        self._driver.tell(LookupBegan())
        try:
            if not self._over.done():
                await self._over
        finally:
            self._end()
        if self._failure is not None:
            raise self._failure

    def stop(self) -> None:
        """Enough was found."""
        self._driver.tell(LookupStopped())

    def _carry_out(self, effect: AskNode) -> None:
        task = self._loop.create_task(self._ask(effect.peer))
        self._asked[task] = effect.peer
        task.add_done_callback(self._answered)

    def _answered(self, task: asyncio.Task[Answer]) -> None:
        peer = self._asked.pop(task, None)
        if peer is None:
            return
        nodes: Answer = None
        if not task.cancelled():
            self._failure = task.exception()
            nodes = task.result() if self._failure is None else None
        if not self._over.done():
            self._driver.tell(NodeFailed(peer) if nodes is None else NodeAnswered(peer, nodes))

    def _check_over(self) -> None:
        if not self._over.done() and (self._failure or self._core.is_over):
            self._over.set_result(None)

    def _end(self) -> None:
        """The search is over, or was cancelled: its open calls get another owner, or end."""
        if not self._over.done():
            self._over.cancel()
        self._driver.close()
        for task in list(self._asked):
            if self._leftovers is not None:
                task.remove_done_callback(self._answered)
                self._leftovers.adopt(task)
            else:
                task.cancel()
        self._asked.clear()
