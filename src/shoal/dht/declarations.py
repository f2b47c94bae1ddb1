"""What this peer declares of itself in the DHT, stored, renewed and withdrawn; and what all peers declare, read.

Of two values for one sub-key the DHT keeps the one that expires later. So each declaration outlasts the one before it,
whichever of them reaches a node first. The DHT cannot forget: a declaration is withdrawn by another one in its place.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

from shoal.dht.declaration_kind import DeclarationKind
from shoal.dht.node import DHTNode
from shoal.dht.validation import protected_key
from shoal.errors import ShoalError
from shoal.p2p.identity import PeerID
from shoal.utils.tasks import TaskSet

T = TypeVar("T")

RETRY_PERIOD = 5.0
"""Seconds after which a declaration that the DHT did not take is tried again, if it is not renewed before."""
MAX_SLACK = 30.0
"""Seconds by which a declaration outlives the period at the end of which it is renewed, at most."""
STEP = 0.001
"""Seconds by which a declaration outlasts the one before it at least."""

WhenDeclared = Callable[[float, str | None], None]
"""Called with the seconds that it took, and the reason if it failed."""


@dataclass
class _Renewal(Generic[T]):
    """A declaration that is kept alive."""

    describe: Callable[[], T | None]
    when_done: WhenDeclared
    changed: asyncio.Event = field(default_factory=asyncio.Event)
    may_stand: bool = False
    """Whether a node of the DHT may have it."""


class Declarations(Generic[T]):
    """The declarations of one kind. This peer's are signed by its identity, and stored by tasks of ``tasks``.

    :meth:`declare` stores a declaration once, for callers that renew it themselves. :meth:`keep` renews it.

    :param clock: the time of the DHT
    :param lifetime: seconds until one that is not renewed expires: what a peer that died leaves behind
    """

    def __init__(
        self,
        node: DHTNode,
        kind: DeclarationKind[T],
        tasks: TaskSet,
        clock: Callable[[], float],
        *,
        lifetime: float,
    ) -> None:
        self._node = node
        self._kind = kind
        self._tasks = tasks
        self._clock = clock
        self._lifetime = lifetime
        self._subkey = node.peer_id.to_bytes()
        self._waiting: dict[str, tuple[T, WhenDeclared]] = {}
        self._storing: dict[str, asyncio.Task[None]] = {}
        self._renewals: dict[str, _Renewal[T]] = {}
        self._renewing: list[asyncio.Task[None]] = []
        self._last_expiration = 0.0

    def declare(self, name: str, declaration: T, when_done: WhenDeclared) -> None:
        """Store a declaration under the protected key ``name``, in the background.

        One store per key is under way at a time. A declaration that waits for its turn is dropped for a newer one.
        """
        self._waiting[name] = (declaration, when_done)
        if name not in self._storing:
            self._storing[name] = self._tasks.start(self._store_waiting(name), f"declare under {name}")

    def keep(
        self,
        name: str,
        describe: Callable[[], T | None],
        *,
        period: float,
        when_done: WhenDeclared,
    ) -> None:
        """Declare what ``describe()`` returns, now and every ``period`` seconds, until :meth:`close`.

        :param describe: returns what is true now; None: nothing is to be declared, and what was is withdrawn
        """
        renewal = self._renewals[name] = _Renewal(describe, when_done)
        self._renewing.append(self._tasks.start(self._renew(name, renewal, period), f"renew under {name}"))

    def describe_again(self, name: str) -> None:
        """What is kept under ``name`` has changed: declare it at once. Nothing happens if none is kept there."""
        if name in self._renewals:
            self._renewals[name].changed.set()

    async def read(
        self, name: str, *, replicas: int | None = None, when_answered: Callable[[], None] | None = None
    ) -> tuple[tuple[PeerID, T], ...]:
        """The latest declarations of all peers under ``name``; unreadable ones are left out.

        :param replicas: ask so many of the nodes that keep the record, since it is read often; None: all of them
        :param when_answered: as of :meth:`.DHTNode.get`
        :raises ShoalError: the DHT could not be asked
        """
        found = await self._node.get(
            protected_key(name), latest=True, replicas=replicas, when_answered=when_answered
        )
        return self._kind.all_in(found)

    async def close(self, timeout: float) -> None:
        """Renew nothing any more, and withdraw what was kept. Idempotent.

        Waits for that, and for what is being stored, for ``timeout`` seconds at most. What is open then ends with
        ``tasks``, which are the caller's to close.
        """
        for task in self._renewing:
            task.cancel()
        pending: list[asyncio.Task[Any]] = list(self._storing.values())
        for name, renewal in self._renewals.items():
            if renewal.may_stand:
                pending.append(self._tasks.start(self._withdraw(name, renewal), f"withdraw from {name}"))
        if pending:
            await asyncio.wait(pending, timeout=timeout)

    async def _store_waiting(self, name: str) -> None:
        try:
            while name in self._waiting:
                declaration, when_done = self._waiting.pop(name)
                await self._store(name, declaration, self._lifetime, when_done)
        finally:
            del self._storing[name]

    async def _renew(self, name: str, renewal: _Renewal[T], period: float) -> None:
        while True:
            renewal.changed.clear()
            declaration, is_done = renewal.describe(), True
            if declaration is not None:
                renewal.may_stand = True
                is_done = await self._store(name, declaration, self._lifetime, renewal.when_done)
            elif renewal.may_stand:
                is_done = await self._withdraw(name, renewal)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(period if is_done else min(period, RETRY_PERIOD)):
                    await renewal.changed.wait()

    async def _withdraw(self, name: str, renewal: _Renewal[T]) -> bool:
        assert self._kind.withdrawn is not None, "what is kept is of a kind that can be withdrawn"
        is_done = await self._store(name, self._kind.withdrawn, 0.0, renewal.when_done)
        if is_done:
            renewal.may_stand = False
        return is_done

    async def _store(self, name: str, declaration: T, lifetime: float, when_done: WhenDeclared) -> bool:
        loop = asyncio.get_running_loop()
        began = loop.time()
        expiration = max(self._clock() + lifetime, self._last_expiration + STEP)
        self._last_expiration = expiration
        value = self._kind.encode(declaration)
        failure: str | None = None
        try:
            if not await self._node.store(protected_key(name), value, expiration, subkey=self._subkey):
                failure = "no node of the DHT accepted it"
        except ShoalError as error:
            failure = str(error)
        when_done(loop.time() - began, failure)
        return failure is None


def lifetime_for(period: float) -> float:
    """How long a declaration lives that is renewed every ``period`` seconds: a renewal may take its time, and fail."""
    return period + min(period, MAX_SLACK)
