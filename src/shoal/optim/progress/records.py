"""The records of progress in the DHT, stored and read in the DHT's background process.

There they are decoded and weighed, so that the trainer's process gets a few numbers, however many peers there are.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import replace
from weakref import WeakKeyDictionary

from shoal.dht.declaration_kind import DeclarationKind
from shoal.dht.declarations import Declarations
from shoal.dht.node import DHTNode
from shoal.optim.progress.departures import Departures
from shoal.optim.progress.forecast import Forecast, Periods, Sighting, forecast
from shoal.optim.progress.shards import keys_of, levels_to_read, next_level, own_key
from shoal.optim.progress.values import WITHDRAWN, ProgressRecord
from shoal.p2p.identity import PeerID
from shoal.utils.tasks import TaskSet

KIND = DeclarationKind("progress", ProgressRecord.encode, ProgressRecord.decode, WITHDRAWN)
WITHDRAWAL_TIMEOUT = 2.0
"""Seconds for which a tracker that ends waits until its record is withdrawn; it expires by itself, if later."""


class ProgressRecords:
    """The own record of one run, kept alive, and those of others with when they were first seen.

    :param lifetime: seconds until a record that is not renewed expires
    :param clock: steady seconds; None: the node's own
    """

    def __init__(
        self, node: DHTNode, prefix: str, *, lifetime: float, clock: Callable[[], float] | None = None
    ) -> None:
        self._node = node
        self._prefix = prefix
        self._steady = node.clock.steady if clock is None else clock
        self._peer_id = node.peer_id.to_bytes()
        self._tasks = TaskSet()
        self._declarations: Declarations[ProgressRecord] = Declarations(
            node, KIND, self._tasks, node.clock, lifetime=lifetime
        )
        self._period = lifetime / 2
        self._level = 0
        self._kept: set[str] = set()
        self._own: ProgressRecord | None = None
        self._reported_at = 0.0
        self._seen: dict[PeerID, Sighting] = {}
        self._departures = Departures(node.host, self._tasks, lambda peer: peer in self._seen)
        self._num_read: int | None = None

    @property
    def level(self) -> int:
        """That of the own record, see :mod:`.shards`."""
        return self._level

    def tell(self, record: ProgressRecord) -> None:
        """Store the own record, in the background, and keep it alive. Without samples there is nothing to tell."""
        has_samples = record.samples > 0 or record.samples_before > 0
        self._own = record if has_samples else None
        self._reported_at = self._steady() - record.age
        self._store()

    async def look(self, own: ProgressRecord, *, target: int, periods: Periods) -> Forecast:
        """Read the records of all peers.

        :raises ShoalError: the DHT could not be asked
        """
        keys = [
            key
            for level in levels_to_read(self._level, self._num_read)
            for key in keys_of(self._prefix, level)
        ]
        found = await asyncio.gather(*map(self._declarations.read, keys))
        now = self._steady()
        seen: dict[PeerID, Sighting] = {}
        for peer, record in (entry for entries in found for entry in entries):
            if peer != self._node.peer_id:
                seen[peer] = _later(seen.get(peer), self._sighting(peer, record, now))
        self._seen, self._num_read = seen, len(seen) + 1
        level = next_level(self._level, self._num_read)
        if level != self._level:
            self._level = level
            self._store()
        gone = self._departures.gone()
        sightings = [replace(one, is_gone=True) if peer in gone else one for peer, one in seen.items()]
        return forecast(own, sightings, target=target, now=now, periods=periods)

    async def close(self) -> None:
        """Withdraw the own record, and end. Idempotent."""
        self._departures.close()
        await self._declarations.close(WITHDRAWAL_TIMEOUT)
        await self._tasks.close()

    def _sighting(self, peer: PeerID, record: ProgressRecord, now: float) -> Sighting:
        known = self._seen.get(peer)
        if known is not None and known.record == record:
            return known
        self._departures.note_life(peer)
        return Sighting(record, now)

    def _store(self) -> None:
        key = own_key(self._prefix, self._peer_id, self._level)
        if key not in self._kept and self._own is not None:
            self._kept.add(key)
            self._declarations.keep(
                key, lambda: self._describe(key), period=self._period, when_done=lambda *_: None
            )
        for kept in self._kept:
            self._declarations.describe_again(kept)

    def _describe(self, key: str) -> ProgressRecord | None:
        """The own record as it is now; None under the keys of former levels, where it is withdrawn."""
        if self._own is None or key != own_key(self._prefix, self._peer_id, self._level):
            return None
        return replace(self._own, age=self._steady() - self._reported_at)


def _later(one: Sighting | None, other: Sighting) -> Sighting:
    """Of two records of a peer that goes to another level, that which tells of more."""
    if one is None:
        return other
    return max(one, other, key=lambda sighting: (sighting.record.epoch, sighting.record.samples))


_open: WeakKeyDictionary[DHTNode, dict[tuple[str, str], ProgressRecords]] = WeakKeyDictionary()


def records_of(node: DHTNode) -> dict[tuple[str, str], ProgressRecords]:
    """The records of each tracker whose DHT this is, by the tracker's prefix and name."""
    return _open.setdefault(node, {})
