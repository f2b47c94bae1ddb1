"""Who is declared under a group key: stores this peer's declarations in the DHT and reads everybody's."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable

from shoal.averaging.matchmaking.messages import Declaration, decode_declaration, encode_declaration
from shoal.averaging.matchmaking.states import DECLARATION_PERIOD
from shoal.dht.node import DHTNode
from shoal.dht.validation import protected_key
from shoal.errors import InvalidValueError, ShoalError
from shoal.p2p.identity import PeerID
from shoal.utils.tasks import TaskSet

logger = logging.getLogger(__name__)

DECLARATION_LIFETIME = 3 * DECLARATION_PERIOD
"""Seconds until a declaration that is not renewed expires: what a peer that died leaves behind."""

WhenDeclared = Callable[[float, str | None], None]
"""Called with the seconds that it took, and the reason if it failed."""


class Declarations:
    """This peer's declarations, one store per key at a time: a newer one waits for the one in progress."""

    def __init__(self, node: DHTNode, tasks: TaskSet, clock: Callable[[], float]) -> None:
        self._node = node
        self._tasks = tasks
        self._clock = clock
        self._subkey = node.peer_id.to_bytes()
        self._waiting: dict[str, tuple[Declaration, WhenDeclared]] = {}
        self._storing: dict[str, asyncio.Task[None]] = {}
        self._last_expiration = 0.0

    def declare(self, key: str, declaration: Declaration, when_done: WhenDeclared) -> None:
        """Store ``declaration`` in the background; one that still waits for its turn is dropped."""
        self._waiting[key] = (declaration, when_done)
        if key not in self._storing:
            self._storing[key] = self._tasks.start(self._store_waiting(key), f"declare under {key}")

    async def read(self, key: str) -> tuple[tuple[PeerID, Declaration], ...]:
        """The latest declarations under ``key``; unreadable ones are left out.

        :raises ShoalError: the DHT could not be asked
        """
        found = await self._node.get(protected_key(key), latest=True)
        if found is None or not isinstance(found.value, dict):
            return ()
        peers = []
        for subkey, record in found.value.items():
            try:
                peers.append((PeerID.from_bytes(subkey), decode_declaration(record.value)))
            except (InvalidValueError, TypeError) as e:
                logger.debug("an unreadable declaration under %s: %s", key, e)
        return tuple(peers)

    async def flush(self, timeout: float) -> None:
        """Wait for what is being stored, ``timeout`` seconds at most."""
        if self._storing:
            await asyncio.wait(list(self._storing.values()), timeout=timeout)

    async def _store_waiting(self, key: str) -> None:
        loop = asyncio.get_running_loop()
        try:
            while key in self._waiting:
                declaration, when_done = self._waiting.pop(key)
                began = loop.time()
                reason = await self._store(key, declaration)
                when_done(loop.time() - began, reason)
        finally:
            del self._storing[key]

    async def _store(self, key: str, declaration: Declaration) -> str | None:
        # Of two records of one sub-key the DHT keeps the one that expires later: each must outlast the one
        # before.
        expiration = max(self._clock() + DECLARATION_LIFETIME, self._last_expiration + 0.001)
        self._last_expiration = expiration
        try:
            stored = await self._node.store(
                protected_key(key), encode_declaration(declaration), expiration, subkey=self._subkey
            )
        except ShoalError as e:
            return str(e)
        return None if stored else "no node of the DHT accepted it"
