"""Storing and getting records: which nodes are asked, in which order, and what is made of their answers.

In a DHT of fewer nodes than a k-bucket holds, every node knows all others, so the nodes nearest to a key are known
without a search; in a larger one they are searched for, and remembered for a while. Either way the nodes that are asked
to store or to give a record also say which nodes nearer to it they know, and those are asked in turn: what was
remembered only saves time, and need not be right.
"""

from __future__ import annotations

import asyncio
import logging
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass

from shoal.dht.cache import KnownRecord, RecordCache
from shoal.dht.config import DHTConfig
from shoal.dht.ids import id_to_bytes, node_id
from shoal.dht.lookup import Answer, Lookup
from shoal.dht.lookup_core import LookupCore
from shoal.dht.marks import join_marks
from shoal.dht.messages import FIND, STORE, FindRequest, StoredEntry, StoreRequest
from shoal.dht.neighbours import Neighbours
from shoal.dht.storage import Entry, Storage
from shoal.dht.types import ValueWithExpiration
from shoal.p2p.identity import PeerID
from shoal.utils.tasks import TaskSet
from shoal.utils.text import printable

logger = logging.getLogger(__name__)

ROUTE_MAX_AGE = 30.0
MAX_ROUTES = 1024


def _nothing() -> None:
    """Nobody waits for the answers."""


@dataclass(frozen=True)
class _Marked:
    """What a node has named by marks, up to a change of its record."""

    peer: PeerID
    marks: bytes
    sequence: int


class Records:
    """The node as a client of the DHT. Keys, sub-keys and values are serialized here, and values signed."""

    def __init__(
        self,
        neighbours: Neighbours,
        storage: Storage,
        cache: RecordCache,
        config: DHTConfig,
        clock: Callable[[], float],
        tasks: TaskSet,
    ) -> None:
        self._neighbours = neighbours
        self._storage = storage
        self._cache = cache
        self._config = config
        self._clock = clock
        self._tasks = tasks
        self._loop = asyncio.get_running_loop()
        self._own = neighbours.host.peer_id
        # the nodes that were found nearest to a key, and when
        self._routes: OrderedDict[int, tuple[float, list[PeerID]]] = OrderedDict()
        self._is_unheard = False

    async def find_nodes(self, target: int, width: int | None = None) -> list[PeerID]:
        """The nodes nearest to an id, by a search over the network."""
        seeds = [node.peer for node in self._neighbours.table.nearest(target, self._config.bucket_size)]
        core = self._make_core(target, seeds, width or self._config.bucket_size, self._config.parallel_rpc)

        async def ask(peer: PeerID) -> Answer:
            response = await self._neighbours.call(peer, FIND, self._find_request(core))
            # Those that are near enough will be asked, which is a greeting too.
            return None if response is None else self._neighbours.learn(response.nodes, greet=False)

        await Lookup(core, ask).run()
        return core.nearest_answered()

    async def store(self, identifier: int, key: bytes, subkey: bytes, entry: Entry) -> bool:
        """Store an entry at the nearest nodes that answer; whether one of them accepted."""
        reasons: dict[str, str] = {}
        accepted = 0
        seeds = await self._nearest(identifier)
        core = self._make_core(identifier, seeds, self._config.num_replicas, self._config.num_replicas)
        if self._own in self._nearest_of([self._own, *seeds], identifier):
            reason = self._storage.store(key, subkey, entry.value, entry.expiration, self._clock())
            accepted += self._note_outcome(reasons, self._own, reason or "")
        stored = [StoredEntry(subkey, entry.value, entry.expiration)]

        async def ask(peer: PeerID) -> Answer:
            nonlocal accepted
            request = StoreRequest(
                key,
                self._neighbours.listening,
                stored,
                self._known_prefixes(core),
                core.names_wanted,
            )
            response = await self._neighbours.call(peer, STORE, request)
            if response is None:
                return None
            accepted += self._note_outcome(reasons, peer, printable("".join(response.refused[:1])))
            return self._neighbours.learn(response.nodes)

        await Lookup(core, ask, self._tasks).run()
        self._remember_route(identifier, core)
        self._tell_outcome(accepted > 0, reasons)
        return accepted > 0

    def _tell_outcome(self, is_stored: bool, reasons: dict[str, str]) -> None:
        """Every refusal is the caller's to know; that nobody answers is said once, until somebody does."""
        if is_stored or reasons:
            if self._is_unheard:
                logger.info("other nodes answer again")
            self._is_unheard = False
        if reasons and not is_stored:
            refusals = "; ".join(f"{peer}: {reason}" for peer, reason in reasons.items())
            logger.warning("a value was stored nowhere: %s", refusals)
        elif not is_stored:
            level = logging.DEBUG if self._is_unheard else logging.WARNING
            logger.log(level, "a value was stored nowhere: no node answered")
            self._is_unheard = True

    async def get(
        self,
        identifier: int,
        key: bytes,
        *,
        latest: bool,
        replicas: int | None = None,
        when_answered: Callable[[], None] | None = None,
    ) -> ValueWithExpiration | None:
        """The first valid value that is found; or, if ``latest``, the freshest of all nearest nodes, merged.

        :param replicas: of how many of the nearest nodes, this one not counted; None: of all that keep the record
        :param when_answered: called when they have answered, before what some have and others lack is got from them
        """
        known = self._cache.open(identifier, key)
        found = self._merge_own(identifier, known)
        if found and not latest:
            value = known.value(self._clock())
            if value is not None:
                return value
        seeds, settled = self._remembered(identifier)
        width = self._width(identifier, seeds, replicas)
        parallel = width if latest else min(2, self._config.parallel_rpc)
        if not settled:
            parallel = self._config.parallel_rpc
        core = self._make_core(identifier, seeds, width, parallel)
        lacking: list[PeerID] = []
        marked: list[_Marked] = []
        # One node that most probably keeps the record gives what is new; of the others, marks will do.
        marks_only = False

        async def ask(peer: PeerID) -> Answer:
            nonlocal found, marks_only
            request = self._find_request(
                core, want_record=True, after=known.known_of(peer), marks_only=marks_only
            )
            marks_only = latest and settled
            response = await self._neighbours.call(peer, FIND, request)
            if response is None:
                return None
            if response.sequence and request.marks_only:
                marked.append(_Marked(peer, response.marks, response.sequence))
                found = True
            elif response.sequence:
                entries = [(e.subkey, Entry(e.value, e.expiration)) for e in response.entries]
                self._cache.merge(identifier, known, peer, entries, response.sequence)
                found = True
                if not latest and known.value(self._clock()) is not None:
                    lookup.stop()
            else:
                lacking.append(peer)
            return self._neighbours.learn(response.nodes)

        lookup = Lookup(core, ask)
        await lookup.run()
        (when_answered or _nothing)()
        await self._get_marked(identifier, known, marked)
        value = known.value(self._clock()) if found else None
        if core.finished and (replicas is None or not settled):
            self._remember_route(identifier, core)
        if value is not None:
            known.fetched_at = self._loop.time()
            if not latest:
                self._leave_copies(key, known, [peer for peer in core.nearest_answered() if peer in lacking])
        return value

    def _width(self, identifier: int, seeds: list[PeerID], replicas: int | None) -> int:
        """How many of the nearest nodes have to answer, this one included."""
        if replicas is None:
            return self._config.num_replicas
        # What lies here is no answer of another node, which may know more.
        keeps_it = self._own in self._nearest_of([self._own, *seeds], identifier)
        return min(self._config.num_replicas, replicas + keeps_it)

    def cached(self, identifier: int) -> ValueWithExpiration | None:
        """A recent answer, if there is one that is still valid."""
        known = self._cache.get(identifier)
        if known is None or known.fetched_at + self._config.cache_max_age <= self._loop.time():
            return None
        return known.value(self._clock())

    def note_stored(self, identifier: int, subkey: bytes, entry: Entry) -> None:
        """Bring a cached answer up to date by what this node has stored."""
        known = self._cache.get(identifier)
        if known is not None:
            self._cache.merge(identifier, known, self._own, [(subkey, entry)], known.known_of(self._own))

    async def hand_over(self, peer: PeerID, key: bytes, entries: list[StoredEntry]) -> None:
        """Give entries of one record to one node."""
        request = StoreRequest(key, self._neighbours.listening, entries)
        await self._neighbours.call(peer, STORE, request)

    # Helpers.

    def _make_core(self, target: int, seeds: list[PeerID], width: int, parallel: int) -> LookupCore:
        return LookupCore(
            target,
            width=width,
            parallel=parallel,
            stall_timeout=self._config.stall_timeout,
            seeds=seeds,
            answered=[self._own] if self._neighbours.listening else [],
            max_nodes_per_answer=self._config.bucket_size,
        )

    async def _get_marked(self, identifier: int, known: KnownRecord, marked: list[_Marked]) -> None:
        """Get what nodes have named by marks and is not known: each entry from one node, then from all others that
        named it.
        """
        asked: set[tuple[PeerID, bytes]] = set()
        for from_all in (False, True):
            wanted: dict[PeerID, list[bytes]] = {}
            taken: set[bytes] = set()
            for one in marked:
                lacking = [mark for mark in known.lacking(one.marks) if mark not in taken]
                lacking = [mark for mark in lacking if (one.peer, mark) not in asked]
                if lacking:
                    wanted[one.peer] = lacking
                    asked.update((one.peer, mark) for mark in lacking)
                    taken.update(() if from_all else lacking)
            if not wanted:
                break
            await asyncio.gather(
                *(self._get_wanted(identifier, known, peer, marks) for peer, marks in wanted.items())
            )
        for one in marked:
            if not known.lacking(one.marks):
                known.note_known(one.peer, one.sequence)

    async def _get_wanted(
        self, identifier: int, known: KnownRecord, peer: PeerID, marks: list[bytes]
    ) -> None:
        before = known.known_of(peer)
        request = FindRequest(
            id_to_bytes(identifier),
            self._neighbours.listening,
            want_record=True,
            after=before,
            wanted=join_marks(marks),
        )
        response = await self._neighbours.call(peer, FIND, request)
        if response is not None:
            entries = [(e.subkey, Entry(e.value, e.expiration)) for e in response.entries]
            self._cache.merge(identifier, known, peer, entries, before)

    def _find_request(
        self, core: LookupCore, *, want_record: bool = False, after: int = 0, marks_only: bool = False
    ) -> FindRequest:
        return FindRequest(
            id_to_bytes(core.target),
            self._neighbours.listening,
            self._known_prefixes(core),
            core.names_wanted,
            want_record,
            after,
            marks_only,
        )

    def _known_prefixes(self, core: LookupCore) -> bytes:
        return self._neighbours.known_prefixes(core.known(core.names_wanted))

    def _merge_own(self, identifier: int, known: KnownRecord) -> bool:
        """Take in what this node keeps itself; whether it keeps anything."""
        record = self._storage.get(identifier, self._clock())
        if record is None:
            return False
        self._cache.merge(
            identifier, known, self._own, record.changes_since(known.known_of(self._own)), record.sequence
        )
        return True

    async def _nearest(self, identifier: int) -> list[PeerID]:
        """Nodes among which the nearest to a key are, most probably."""
        peers, settled = self._remembered(identifier)
        return peers if settled else await self.find_nodes(identifier, self._config.num_replicas)

    def _remembered(self, identifier: int) -> tuple[list[PeerID], bool]:
        """The nearest nodes that are known, and whether no search is needed to find nearer ones."""
        table = self._neighbours.table
        peers = [node.peer for node in table.nearest(identifier, self._config.bucket_size)]
        if len(table) < self._config.bucket_size:
            return peers, True
        route = self._routes.get(identifier)
        if route is None or route[0] + ROUTE_MAX_AGE <= self._loop.time():
            return peers, False
        return [*route[1], *peers], True

    def _remember_route(self, identifier: int, core: LookupCore) -> None:
        if len(self._neighbours.table) < self._config.bucket_size:
            return
        self._routes[identifier] = (
            self._loop.time(),
            [peer for peer in core.nearest_answered() if peer != self._own],
        )
        self._routes.move_to_end(identifier)
        while len(self._routes) > MAX_ROUTES:
            self._routes.popitem(last=False)

    def _nearest_of(self, peers: list[PeerID], identifier: int) -> list[PeerID]:
        if not self._neighbours.listening:
            peers = [peer for peer in peers if peer != self._own]
        return sorted(peers, key=lambda peer: node_id(peer) ^ identifier)[: self._config.num_replicas]

    def _note_outcome(self, reasons: dict[str, str], peer: PeerID, reason: str) -> bool:
        if reason:
            reasons[str(peer)] = reason
            logger.debug("%s refused an entry: %s", peer, reason)
        return not reason

    def _leave_copies(self, key: bytes, known: KnownRecord, lacking: list[PeerID]) -> None:
        entries = [StoredEntry(subkey, e.value, e.expiration) for subkey, e in known.record.entries.items()]
        for peer in lacking[: self._config.cache_nearest]:
            self._tasks.start(self.hand_over(peer, key, entries), f"dht-copy-to-{peer}")
