"""A node of the DHT: puts its parts together, and is what the rest of Shoal calls.

The parts: :mod:`~shoal.dht.neighbours` knows and calls other nodes, :mod:`~shoal.dht.bootstrap` finds the first of
them, :mod:`~shoal.dht.upkeep` keeps them, :mod:`~shoal.p2p.reach.watch` asks whether
they can dial this node, :mod:`~shoal.dht.server` answers them, :mod:`~shoal.dht.records` stores and
gets.
"""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Sequence
from typing import Any

from shoal.dht.bootstrap import Bootstrap
from shoal.dht.cache import RecordCache
from shoal.dht.config import DHTConfig
from shoal.dht.ids import key_id
from shoal.dht.messages import StoredEntry
from shoal.dht.neighbours import Neighbours
from shoal.dht.records import Records
from shoal.dht.replication import records_after_loss, records_for_newcomer
from shoal.dht.server import NodeServer
from shoal.dht.storage import NO_TIME_AT_ALL, PLAIN, Entry, Record, Storage
from shoal.dht.timekeeping import ASKED, TimeKeeper
from shoal.dht.types import ValueWithExpiration
from shoal.dht.upkeep import Upkeep
from shoal.dht.validation import CompositeValidator, DHTRecord, ProtectedKeyValidator, RecordValidatorBase
from shoal.errors import BootstrapError, IdentityInUse, InvalidStateError, InvalidValueError
from shoal.p2p.host import Host
from shoal.p2p.identity import PeerID
from shoal.p2p.multiaddr import Multiaddr
from shoal.p2p.reach.watch import ReachabilityWatch
from shoal.utils import figures
from shoal.utils.serializer import MSGPackSerializer
from shoal.utils.tasks import TaskSet
from shoal.utils.timed import DHTClock, dht_clock

logger = logging.getLogger(__name__)

MAX_GREETED = 64
"""Neighbours that are told at once when others can dial this node again, or cannot any more."""
TELL_TIMEOUT = 1.0
"""Seconds for which joining waits until the peers found so far have heard where this node can be dialed."""
HAND_OVER_DELAY = 1.0
"""Wait this long before handing records over: who comes or goes seldom does so alone."""
HAND_OVER_BATCH = 256
"""Records for which it is decided in one go who should have them: a node may keep 100,000."""


class DHTNode:
    """Made by :meth:`create`; lives on one event loop. Nothing here is thread-safe."""

    clock: DHTClock
    """The time of the DHT: expirations go by it."""
    host: Host
    peer_id: PeerID

    @classmethod
    async def create(
        cls,
        host: Host,
        config: DHTConfig = DHTConfig(),
        *,
        initial_peers: Sequence[Multiaddr] = (),
        validators: Sequence[RecordValidatorBase] = (),
        clock: DHTClock = dht_clock,
        rng: random.Random | None = None,
    ) -> DHTNode:
        """Join the DHT of the initial peers, or start one if there are none besides this node itself.

        ``host`` must have been started, and stays the caller's. Raises BootstrapError, with each address and why it
        failed, if no initial peer answered within ``config.bootstrap_timeout``, unless
        ``config.ensure_bootstrap_success`` is False: then the node goes on looking for them in the background.
        """
        node = cls(host, config, initial_peers, validators, clock, rng or random.Random())  # noqa: S311
        try:
            await node._join()
        except BaseException:
            await node.shutdown()
            raise
        return node

    def __init__(
        self,
        host: Host,
        config: DHTConfig,
        initial_peers: Sequence[Multiaddr],
        validators: Sequence[RecordValidatorBase],
        clock: DHTClock,
        rng: random.Random,
    ) -> None:
        """Use :meth:`create`."""
        self.host = host
        self.peer_id = host.peer_id
        self.config = config
        self.clock = clock
        self.before_shutdown: list[Callable[[], Awaitable[None]]] = []
        """Awaited by :meth:`shutdown` while the node still works: what others were told is withdrawn there."""
        self._tasks = TaskSet()
        self._closed = False
        self._joined = False
        self._entered = False
        self._checks = config.check_reachability and not config.client_mode
        # Ordered, as sets are not: who joined and who left since records were last handed over.
        self._newcomers: dict[PeerID, None] = {}
        self._leavers: dict[PeerID, None] = {}
        self._handing_over: asyncio.Task[None] | None = None
        self._validator = CompositeValidator([ProtectedKeyValidator(host.identity), *validators])
        self._storage = Storage(config.storage_limits(), first_sequence=1 + rng.getrandbits(60))
        self._neighbours = Neighbours(host, config, self._tasks, rng)
        self._server = NodeServer(self._neighbours, self._storage, self._validator, clock)
        self._cache = RecordCache(config.cache_size, self._validator, config.storage_limits(), clock)
        self._records = Records(self._neighbours, self._storage, self._cache, config, clock, self._tasks)
        self._bootstrap = Bootstrap(
            self._neighbours, initial_peers, self._tasks, rng, self._found_initial_peer
        )
        self._upkeep = Upkeep(self._neighbours, self._bootstrap, self._records.find_nodes, clock.steady, rng)
        self._reachability = ReachabilityWatch(
            host, lambda: list(self._neighbours.table), self._reachability_changed, rng
        )
        self._time = TimeKeeper(host, clock, self._helpers, rng)
        self._gets: dict[tuple[int, bool, int | None], asyncio.Task[ValueWithExpiration | None]] = {}
        self._neighbours.on_joined.append(self._neighbour_joined)
        self._neighbours.on_left.append(self._neighbour_left)

    # What users see.

    @property
    def client_mode(self) -> bool:
        """Whether this node keeps no records and is in nobody's routing table."""
        return not self.host.reachability.is_full

    @property
    def neighbours(self) -> list[PeerID]:
        """The nodes in the routing table."""
        return list(self._neighbours.table)

    @property
    def initial_peers(self) -> list[str]:
        """The addresses of other peers by which this node joined."""
        return self._bootstrap.others

    @property
    def num_records(self) -> int:
        """How many keys this node keeps records of."""
        return len(self._storage)

    async def store(self, key: Any, value: Any, expiration_time: float, subkey: Any = None) -> bool:
        """Store a value (any that MSGPackSerializer takes) until ``expiration_time``, seconds since the epoch.

        With a ``subkey`` the key holds a dictionary, into which the value is merged. True if at least one of the nodes
        nearest to the key accepted it; the reasons of those that did not are in the log. InvalidValueError for
        an expiration further ahead than ``config.max_expiration``, and for what is too long.
        """
        serialized_subkey = None if subkey is None else MSGPackSerializer.dumps(subkey)
        return await self.store_serialized(
            MSGPackSerializer.dumps(key), MSGPackSerializer.dumps(value), expiration_time, serialized_subkey
        )

    async def store_serialized(
        self, key: bytes, value: bytes, expiration_time: float, subkey: bytes | None = None
    ) -> bool:
        """As :meth:`store`, for a key, value and sub-key that were serialized by MSGPackSerializer already."""
        self._check_open()
        if expiration_time > self.clock() + self.config.max_expiration:
            ahead, limit = expiration_time - self.clock(), self.config.max_expiration
            raise InvalidValueError(
                f"expiration_time must be at most {figures.duration(limit)} from now (max_expiration), "
                f"got {figures.duration(ahead)} from now"
            )
        if self.clock() - expiration_time > NO_TIME_AT_ALL:
            raise InvalidValueError(
                f"expiration_time must be a time, as get_dht_time() + 60, got {figures.number(expiration_time)}"
            )
        for name, serialized in (("key", key), ("subkey", subkey or PLAIN)):
            if len(serialized) > self._storage.limits.max_key_size:
                limit = self._storage.limits.max_key_size
                raise InvalidValueError(
                    f"{name} must take at most {limit:,} bytes when serialized, got {len(serialized):,}"
                )
        record = DHTRecord(key, subkey, value, float(expiration_time))
        value = self._validator.sign_value(record)
        if len(value) > self.config.max_value_size:
            limit = self.config.max_value_size
            raise InvalidValueError(
                f"value must take at most {limit:,} bytes when serialized (max_value_size), got {len(value):,}"
            )
        record = DHTRecord(key, subkey, value, record.expiration_time)
        reason = self._validator.explain(record)
        if reason is not None:
            logger.warning("this node's own validators refuse what it should store: %s", reason)
            return False
        identifier, entry = key_id(key), Entry(value, record.expiration_time)
        try:
            stored = await self._records.store(identifier, key, subkey or PLAIN, entry)
        finally:
            # A search that is under way may have asked too early to see this value.
            for place in [place for place in self._gets if place[0] == identifier]:
                del self._gets[place]
        if stored and self.config.cache_on_store:
            self._records.note_stored(identifier, subkey or PLAIN, entry)
        return stored

    async def get(
        self,
        key: Any,
        latest: bool = False,
        *,
        replicas: int | None = None,
        when_answered: Callable[[], None] | None = None,
    ) -> ValueWithExpiration | None:
        """The value stored under a key, or None.

        ``latest=False``: the first valid value that is found, here or elsewhere; it may be a few seconds old.
        ``latest=True``: the freshest of those that the nodes nearest to the key have, dictionaries merged; asking
        the same key again and again costs little. Values are shared between callers: do not change them.

        :param replicas: with ``latest=True``: ask so many of the nodes that keep the record; None: all of them
        :param when_answered: called when the nodes have answered; after that they are only asked for what one of them
            has and others lack
        """
        return await self.get_serialized(
            MSGPackSerializer.dumps(key), latest, replicas=replicas, when_answered=when_answered
        )

    async def get_serialized(
        self,
        key: bytes,
        latest: bool = False,
        *,
        replicas: int | None = None,
        when_answered: Callable[[], None] | None = None,
    ) -> ValueWithExpiration | None:
        """As :meth:`get`, for a key that was serialized by MSGPackSerializer already."""
        self._check_open()
        identifier = key_id(key)
        if not latest and self.config.cache_locally:
            cached = self._records.cached(identifier)
            if cached is not None:
                expires_soon = cached.expiration_time - self.clock() < self.config.cache_refresh_before_expiry
                if expires_soon and self.config.cache_refresh_before_expiry:
                    self._start_get(identifier, key, latest=True)
                return cached
        if when_answered is not None or not self.config.reuse_get_requests:
            return await self._records.get(
                identifier, key, latest=latest, replicas=replicas, when_answered=when_answered
            )
        task = self._start_get(identifier, key, latest, replicas)
        try:
            return await asyncio.shield(task)
        except asyncio.CancelledError:
            if task.cancelled() and self._closed:
                raise InvalidStateError("the DHT node was shut down while it searched") from None
            raise

    def add_validators(self, validators: Iterable[RecordValidatorBase]) -> None:
        """Check records by these too from now on, both what is stored here and what is got."""
        self._validator.extend(validators)
        self._cache.clear()

    async def shutdown(self) -> None:
        """Stop serving, searching and all upkeep. Idempotent. The host lives on."""
        withdrawing, self.before_shutdown = self.before_shutdown, []
        await asyncio.gather(*(withdraw() for withdraw in withdrawing))
        if self._closed:
            return
        self._closed = True
        self._server.stop(self.host)
        self._time.stop()
        self._bootstrap.stop()
        self._neighbours.stop()
        await self._tasks.close()

    # Whether others can dial it.

    def look_again(self, *, in_doubt: bool) -> None:
        """Find out anew whether others can dial this node; ``in_doubt``: until then nobody relies on it."""
        if self._checks:
            self._reachability.look_again(in_doubt=in_doubt)

    async def _reachability_changed(self) -> None:
        """Serve, or leave the others' tables, and tell them.

        A node that others had found goes on answering when nobody can dial it at what it announces: it may be the one
        through which newcomers join, at an address that it does not know.
        """
        if not self.client_mode:
            self._server.start(self.host)
        await self.host.announce()
        await self._neighbours.greet_all(list(self._neighbours.table)[:MAX_GREETED])

    # Joining.

    async def _join(self) -> None:
        if not self.config.client_mode:
            self._server.start(self.host)
        if self._checks:
            self._reachability.begin(in_doubt=bool(self._bootstrap.others))
        found = await self._bootstrap.find_first(self.config.bootstrap_timeout)
        self.host.check_identity()
        if not found and self._bootstrap.others and not self._bootstrap.includes_self:
            if self.config.ensure_bootstrap_success:
                raise self._bootstrap_error()
            logger.warning("%s; going on in the background", self._bootstrap_error())
        elif not found:
            self._time.be_first()
        if found:
            await self._enter()
        else:
            self.host.reach.presume()
            self._present()
        self.host.check_identity()
        self.host.tenancy.settle()
        self._joined = True
        self._upkeep.hurry()
        self._tasks.start(self._upkeep.run(), "dht-upkeep")
        self._tasks.start(self._time.run(), "dht-time")
        if self._checks:
            self._tasks.start(self._reachability.run(), "dht-reachability")

    def _found_initial_peer(self, peer: PeerID) -> None:
        self._upkeep.hurry()
        if self._joined and not self._entered:
            self._tasks.start(self._enter_late(), "dht-enter")

    async def _enter_late(self) -> None:
        try:
            await self._enter()
        except IdentityInUse as error:  # the node's owner has been told
            logger.debug("%s", error)

    async def _enter(self) -> None:
        """The first initial peer has answered: meet the nodes near this one, and become one of them."""
        self._entered = True
        neighbours = self._neighbours
        known = [*self._bootstrap.found.values(), *neighbours.table, *(neighbours.heard_of or ())]
        known = list(dict.fromkeys(known))
        # Before anything is stored, and before users ask what time it is.
        asked = [self._time.ask(known[:ASKED])]
        if self._checks:
            asked.append(self._reachability.check(known))
        await asyncio.gather(*asked)
        if self._checks and self.host.reachability.is_full:
            await self._tell_neighbours()
        if not self.host.reachability.is_full:
            self._server.stop(self.host)
        self._present()
        await self._records.find_nodes(neighbours.own_id)
        # By now the nodes that would know of another peer with this identity have been asked where it was.
        await self.host.ask_rivals(neighbours.own_elsewhere)
        neighbours.has_made_sure = True

    async def _tell_neighbours(self) -> None:
        """Connected peers were told nothing while it was in doubt; one that does not answer holds up nobody."""
        telling = self._tasks.start(self.host.announce(), "dht-announce")
        await asyncio.wait((telling,), timeout=TELL_TIMEOUT)

    def _present(self) -> None:
        """From now on others may know whether to put this node into their tables."""
        heard_of, self._neighbours.heard_of = self._neighbours.heard_of or {}, None
        self._neighbours.is_presented = True
        for peer in heard_of:
            self._neighbours.greet_if_new(peer)

    def _helpers(self) -> list[PeerID]:
        """Who may be asked what time it is."""
        return list(dict.fromkeys([*self._neighbours.table, *self.host.connected_peers()]))

    def _bootstrap_error(self) -> BootstrapError:
        failures = {
            text: self._bootstrap.failures.get(text, "no answer yet") for text in self._bootstrap.others
        }
        listed = "".join(f"\n  {text}: {reason}" for text, reason in failures.items())
        return BootstrapError(
            f"no initial peer answered within {figures.duration(self.config.bootstrap_timeout)}:{listed}",
            failures,
        )

    # Upkeep of records.

    def _neighbour_joined(self, peer: PeerID) -> None:
        self._upkeep.hurry()
        self._newcomers[peer] = None
        self._hand_over_soon()

    def _neighbour_left(self, peer: PeerID) -> None:
        self._newcomers.pop(peer, None)
        self._leavers[peer] = None
        self._hand_over_soon()

    def _hand_over_soon(self) -> None:
        if not len(self._storage):
            self._newcomers.clear()
            self._leavers.clear()
        elif self._handing_over is None:
            self._handing_over = self._tasks.start(self._hand_over(), "dht-hand-over")

    async def _hand_over(self) -> None:
        """Give records to the nodes that now belong to the nearest, one record after the other."""
        try:
            await asyncio.sleep(HAND_OVER_DELAY)
            newcomers, leavers = list(self._newcomers), list(self._leavers)
            self._newcomers.clear()
            self._leavers.clear()
        finally:
            self._handing_over = None
        table, num_replicas = self._neighbours.table, self.config.num_replicas
        for peer in newcomers:
            async for some in self._records_in_batches():
                for record in records_for_newcomer(some, table, self.peer_id, peer, num_replicas):
                    await self._give(peer, record)
        for peer in leavers:
            async for some in self._records_in_batches():
                for successor, record in records_after_loss(some, table, self.peer_id, peer, num_replicas):
                    await self._give(successor, record)

    async def _records_in_batches(self) -> AsyncIterator[list[tuple[int, Record]]]:
        """All records as they are now; others get their turn on the event loop after each batch."""
        records = list(self._storage.records())
        for start in range(0, len(records), HAND_OVER_BATCH):
            yield records[start : start + HAND_OVER_BATCH]
            await asyncio.sleep(0)

    async def _give(self, peer: PeerID, record: Record) -> None:
        now = self.clock()
        entries = [
            StoredEntry(subkey, entry.value, entry.expiration)
            for subkey, entry in record.entries.items()
            if entry.expiration > now
        ]
        if entries and peer in self._neighbours.table:
            await self._records.hand_over(peer, record.key, entries)

    # Helpers.

    def _start_get(
        self, identifier: int, key: bytes, latest: bool, replicas: int | None = None
    ) -> asyncio.Task[ValueWithExpiration | None]:
        """The search for this key that is under way, or a new one."""
        place = (identifier, latest, replicas)
        task = self._gets.get(place)
        if task is None:
            task = self._tasks.start(
                self._records.get(identifier, key, latest=latest, replicas=replicas), "dht-get"
            )
            self._gets[place] = task
            task.add_done_callback(lambda done: self._get_done(place, done))
        return task

    def _get_done(
        self, place: tuple[int, bool, int | None], task: asyncio.Task[ValueWithExpiration | None]
    ) -> None:
        if self._gets.get(place) is task:
            del self._gets[place]

    def _check_open(self) -> None:
        self.host.check_identity()
        if self._closed:
            raise InvalidStateError("the DHT node was shut down")
