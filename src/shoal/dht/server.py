"""What a node answers to others, and what it keeps for them."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Iterable

from shoal.dht.ids import id_from_bytes, key_id, node_id
from shoal.dht.marks import join_marks, split_marks
from shoal.dht.messages import (
    FIND,
    STORE,
    FindRequest,
    FindResponse,
    StoredEntry,
    StoreRequest,
    StoreResponse,
)
from shoal.dht.neighbours import Neighbours
from shoal.dht.storage import Storage
from shoal.dht.validation import CompositeValidator, DHTRecord
from shoal.p2p.host import Host
from shoal.p2p.identity import PeerID

logger = logging.getLogger(__name__)

PAUSE_AFTER = 16
"""Entries checked in one go: signatures take time, and others wait for the event loop."""
MAX_REASON = 500


class NodeServer:
    """Answers :data:`FIND` and :data:`STORE` from the node's table and storage."""

    def __init__(
        self,
        neighbours: Neighbours,
        storage: Storage,
        validator: CompositeValidator,
        clock: Callable[[], float],
    ) -> None:
        self._neighbours = neighbours
        self._storage = storage
        self._validator = validator
        self._clock = clock
        self._is_serving = False

    def start(self, host: Host) -> None:
        """Serve from now on. Idempotent."""
        if self._is_serving:
            return
        self._is_serving = True
        host.serve(FIND, self._answer_find)
        host.serve(STORE, self._answer_store)

    def stop(self, host: Host) -> None:
        """Serve no more. Idempotent."""
        self._is_serving = False
        host.stop_serving(FIND)
        host.stop_serving(STORE)

    async def _answer_find(self, peer: PeerID, request: FindRequest) -> FindResponse:
        self._neighbours.heard_from(peer, request.listening)
        target = id_from_bytes(request.target)
        nodes = self._neighbours.contacts_near(target, request.known, request.count, peer)
        if request.count and target == node_id(peer):
            nodes = [*self._neighbours.elsewhere(peer, request.known), *nodes][: request.count]
        record = self._storage.get(target, self._clock()) if request.want_record else None
        if record is None:
            return FindResponse(nodes)
        changes = record.changes_since(request.after)
        if request.marks_only:
            marks = join_marks(record.mark(subkey) for subkey, _ in changes)
            return FindResponse(nodes, sequence=record.sequence, marks=marks)
        if request.wanted:
            wanted = set(split_marks(request.wanted))
            changes = [(subkey, entry) for subkey, entry in changes if record.mark(subkey) in wanted]
        entries = [StoredEntry(subkey, entry.value, entry.expiration) for subkey, entry in changes]
        return FindResponse(nodes, entries, record.sequence)

    async def _answer_store(self, peer: PeerID, request: StoreRequest) -> StoreResponse:
        self._neighbours.heard_from(peer, request.listening)
        refused = await self._keep(request.key, request.entries)
        for reason in dict.fromkeys(refused):
            if reason:
                logger.info("refused an entry from %s: %s", peer, reason)
        if not request.count:
            return StoreResponse(refused)
        target = key_id(request.key)
        return StoreResponse(
            refused, self._neighbours.contacts_near(target, request.known, request.count, peer)
        )

    async def _keep(self, key: bytes, entries: Iterable[StoredEntry]) -> list[str]:
        """Check and store; for each entry the reason why it was refused, or ""."""
        refused = []
        for number, entry in enumerate(entries):
            if number % PAUSE_AFTER == PAUSE_AFTER - 1:
                await asyncio.sleep(0)
            reason = self._validator.explain(
                DHTRecord(key, entry.subkey or None, entry.value, entry.expiration)
            )
            if reason is None:
                reason = self._storage.store(key, entry.subkey, entry.value, entry.expiration, self._clock())
            refused.append((reason or "")[:MAX_REASON])
        return refused
