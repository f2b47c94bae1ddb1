"""Which peers this node knows, and how it calls them: the asyncio side of the routing table.

Every call of the DHT goes through :meth:`Neighbours.call`, so that a peer that answers enters the table, and one that
does not leaves it. Peers that left are tried again for a while, less and less often: after a partition, or when this
machine slept, they are the way back.
"""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TypeVar

from shoal.dht.config import DHTConfig
from shoal.dht.ids import id_to_bytes, node_id
from shoal.dht.messages import FIND, MAX_KNOWN_BYTES, Contact, FindRequest
from shoal.dht.routing import RoutingTable, id_prefix
from shoal.errors import (
    ConnectionLost,
    DeadlineExceeded,
    InvalidValueError,
    PeerUnreachable,
    ProtocolViolation,
    RemoteError,
)
from shoal.p2p.host import Host
from shoal.p2p.identity import PeerID
from shoal.p2p.multiaddr import Multiaddr
from shoal.p2p.protocol.codes import ResetCode
from shoal.p2p.protocol.violations import Ending, EndKind
from shoal.p2p.rpc import Method
from shoal.utils.tasks import TaskSet

logger = logging.getLogger(__name__)

RequestT = TypeVar("RequestT")
ResponseT = TypeVar("ResponseT")

CALL_ERRORS = (ConnectionLost, DeadlineExceeded, PeerUnreachable, ProtocolViolation, RemoteError)
"""What a call to a peer may raise through no fault of ours."""

MAX_GREETINGS = 32
"""Peers greeted at the same time; who comes in addition will be heard of again."""
MAX_LOST = 64
FIRST_RETRY, LAST_RETRY = 1.0, 20.0
FORGET_AFTER = 1800.0
MAX_ADDRESSES = 8
MAX_OWN_ELSEWHERE = 16
PROBE_AFTER = 15.0
"""A node of a full bucket is called to make sure of it when it was not heard of for this long."""


@dataclass
class _Lost:
    """A peer that left the table: when it is tried again."""

    since: float
    retry_at: float
    delay: float = FIRST_RETRY


class Neighbours:
    """See the module. ``is_presented``: this node has made sure who it is, and how it is reached."""

    def __init__(self, host: Host, config: DHTConfig, tasks: TaskSet, rng: random.Random) -> None:
        self.host = host
        self.config = config
        self.own_id = node_id(host.peer_id)
        self.table = RoutingTable(self.own_id, config.bucket_size, PROBE_AFTER)
        self.is_presented = False
        self.heard_of: dict[PeerID, None] | None = {}
        """While this node does not know yet whether it can be reached: peers that it will call when it knows."""
        self.has_made_sure = False
        """Whether this node need not hear any more where else its identity has been."""
        self.own_elsewhere: dict[Multiaddr, None] = {}
        """Where others say that this node's PeerID has been known."""
        self.on_joined: list[Callable[[PeerID], None]] = []
        self.on_left: list[Callable[[PeerID], None]] = []
        self._tasks = tasks
        self._rng = rng
        self._loop = asyncio.get_running_loop()
        self._greetings: dict[PeerID, asyncio.Task[bool]] = {}
        self._lost: dict[PeerID, _Lost] = {}
        self._unsubscribe = host.on_disconnect(self._disconnected)

    def stop(self) -> None:
        """Stop listening for disconnections."""
        self._unsubscribe()

    # Calls.

    async def call(
        self, peer: PeerID, method: Method[RequestT, ResponseT], request: RequestT
    ) -> ResponseT | None:
        """Call a peer; None if it did not answer. The table learns of it either way."""
        for attempt in (1, 2):
            try:
                response = await self.host.call(peer, method, request, timeout=self.config.wait_timeout)
            except ConnectionLost as error:
                # The connection broke under the call. All calls of the DHT may be repeated: try a new one.
                if attempt == 2:
                    self._failed(peer, error)
            except CALL_ERRORS as error:
                self._failed(peer, error)
                return None
            else:
                self._answered(peer)
                return response
        return None

    def learn(self, contacts: Sequence[Contact], *, greet: bool = True) -> list[PeerID]:
        """Take in the nodes that a peer named; returns those that are worth calling, and greets those that are new.

        Their addresses are remembered for peers to which no connection stands; what cannot be parsed is left out.
        """
        peers = []
        for contact in contacts[: self.config.bucket_size]:
            try:
                peer = PeerID.from_bytes(contact.peer)
                addresses = [Multiaddr.parse(text) for text in contact.addresses[:MAX_ADDRESSES]]
            except InvalidValueError as error:
                logger.debug("a peer named a node that is none: %s", error)
                continue
            if peer == self.host.peer_id and len(self.own_elsewhere) < MAX_OWN_ELSEWHERE:
                self.own_elsewhere |= dict.fromkeys(addresses)
            if peer == self.host.peer_id or self._is_resting(peer):
                continue
            if not self.host.is_connected(peer):
                self.host.add_hearsay(peer, addresses)
            peers.append(peer)
            if greet:
                self.greet_if_new(peer, called=False)
        return peers

    def contacts_near(self, target: int, known: bytes, count: int, asker: PeerID) -> list[Contact]:
        """The nodes nearest to an id for an answer: without the asker and those it knows."""
        if not count:
            return []
        known_prefixes = {known[at : at + 8] for at in range(0, len(known), 8)}
        is_elsewhere = self.host.is_elsewhere(asker)
        return [
            Contact(node.peer.to_bytes(), self._addresses_for(node.peer, is_elsewhere))
            for node in self.table.nearest(target, min(count, self.config.bucket_size))
            if node.prefix not in known_prefixes and node.peer != asker
        ]

    def _addresses_for(self, peer: PeerID, is_elsewhere: bool) -> list[str]:
        """Where ``peer`` can be dialed, for an asker that is or is not on this machine: loopback stays here."""
        addresses = [one for one in self.host.addresses_of(peer) if not (is_elsewhere and one.is_loopback)]
        return [str(address) for address in addresses[:MAX_ADDRESSES]]

    def elsewhere(self, asker: PeerID, known: bytes) -> list[Contact]:
        """Where else a newcomer's identity has been, for one that has not made sure yet that it is the only one."""
        if id_prefix(node_id(asker)) in (known[at : at + 8] for at in range(0, len(known), 8)):
            return []
        addresses = self.host.addresses_elsewhere(asker)[:MAX_ADDRESSES]
        return [Contact(asker.to_bytes(), [str(address) for address in addresses])] if addresses else []

    def known_prefixes(self, peers: Iterable[PeerID]) -> bytes:
        """The ``known`` field of a request: these peers, and those that would not be called anyhow."""
        resting = (peer for peer in self._lost if self._is_resting(peer))
        own = [id_prefix(self.own_id)] if self.has_made_sure else []
        prefixes = own + [id_prefix(node_id(peer)) for group in (peers, resting) for peer in group]
        return b"".join(prefixes)[:MAX_KNOWN_BYTES]

    # Greetings: a first call to a peer, which also asks whom it knows near us.

    @property
    def listening(self) -> bool:
        """What this node says to peers: whether they may put it into their tables."""
        return self.is_presented and self.host.reachability.is_full

    def heard_from(self, peer: PeerID, listening: bool) -> None:
        """A peer called us. If it is a node that we do not know, it is greeted, and enters the table if it answers."""
        if not listening:
            if peer in self.table:
                self._remove(peer)
        elif peer not in self.table:
            self._lost.pop(peer, None)
            self.greet_if_new(peer)

    def greet_if_new(self, peer: PeerID, *, called: bool = True) -> None:
        """Greet a peer in the background unless it is known, was lost a moment ago, or the table has no use for it.

        :param called: the peer has called, and so it lives; others have been named, and get no full bucket's attention
        """
        if self.heard_of is not None:
            self.heard_of[peer] = None
        elif not (
            peer in self.table
            or self._is_resting(peer)
            or len(self._greetings) >= MAX_GREETINGS
            or not (self.table.offer(peer, self._loop.time()) if called else self.table.has_room(peer))
        ):
            self.greet_in_background(peer)

    def greet_in_background(self, peer: PeerID) -> asyncio.Task[bool]:
        """The task that greets this peer: the one under way, or a new one."""
        task = self._greetings.get(peer)
        if task is None:
            task = self._tasks.start(self._greet(peer), f"dht-greet-{peer}")
            self._greetings[peer] = task
            task.add_done_callback(lambda _: self._greetings.pop(peer, None))
        return task

    async def greet(self, peer: PeerID) -> bool:
        """Greet a peer; whether it answered."""
        return await asyncio.shield(self.greet_in_background(peer))

    async def greet_all(self, peers: Sequence[PeerID]) -> int:
        """Greet peers at the same time; how many answered."""
        tasks = [self.greet_in_background(peer) for peer in peers]
        return sum(await asyncio.gather(*(asyncio.shield(task) for task in tasks)))

    async def _greet(self, peer: PeerID) -> bool:
        request = FindRequest(
            target=id_to_bytes(self.own_id),
            listening=self.listening,
            known=self.known_prefixes(node.peer for node in self.table.nearest(self.own_id, 48)),
            count=self.config.bucket_size,
        )
        response = await self.call(peer, FIND, request)
        if response is None:
            return False
        self.learn(response.nodes)
        return True

    # The table's changes.

    def lost_to_retry(self, now: float) -> list[PeerID]:
        """Peers that left the table and are to be tried again now."""
        for peer in [peer for peer, lost in self._lost.items() if lost.since + FORGET_AFTER < now]:
            del self._lost[peer]
        return [peer for peer, lost in self._lost.items() if lost.retry_at <= now]

    def retry_all_soon(self) -> None:
        """The network may be back: lost peers need not rest any longer."""
        for lost in self._lost.values():
            lost.retry_at, lost.delay = self._loop.time(), FIRST_RETRY

    def _is_resting(self, peer: PeerID) -> bool:
        lost = self._lost.get(peer)
        return lost is not None and lost.retry_at > self._loop.time()

    def _answered(self, peer: PeerID) -> None:
        self._lost.pop(peer, None)
        known = peer in self.table
        if not known and not self.host.addresses_of(peer):
            return  # it can be called over its own connection only: others could not reach it
        if not known and len(self.table) and self.host.is_client(peer):
            return  # it keeps no records for others; alone, it is better than nobody
        to_probe = self.table.answered(peer, self._loop.time())
        if to_probe is not None:
            self.greet_in_background(to_probe)
        elif not known and peer in self.table:
            logger.debug("%s joined the routing table, now of %d", peer, len(self.table))
            for callback in self.on_joined:
                callback(peer)

    def _failed(self, peer: PeerID, error: Exception) -> None:
        if isinstance(error, RemoteError) and error.code == ResetCode.BUSY:
            return
        logger.debug("%s did not answer: %s", peer, error)
        now = self._loop.time()
        was_known = peer in self.table
        self._remove(peer)
        lost = self._lost.get(peer)
        if lost is None:
            if not was_known and len(self._lost) >= MAX_LOST:
                return
            lost = self._lost[peer] = _Lost(now, now)
        # Not all who lost a peer at the same moment should try it at the same moment.
        lost.retry_at = now + lost.delay * self._rng.uniform(0.75, 1.25)
        lost.delay = min(2 * lost.delay, LAST_RETRY)
        while len(self._lost) > MAX_LOST:
            del self._lost[next(iter(self._lost))]

    def _remove(self, peer: PeerID) -> None:
        if peer not in self.table:
            return
        self.table.failed(peer)
        logger.debug("%s left the routing table, now of %d", peer, len(self.table))
        for callback in self.on_left:
            callback(peer)

    def _disconnected(self, peer: PeerID, ending: Ending) -> None:
        if peer in self.table:
            logger.debug("the connection to %s ended: %s", peer, ending)
            if ending.kind is EndKind.NO_ROOM:
                return  # it is not lost, and a new connection would only drive out another one
            self.greet_in_background(peer)  # it leaves the table unless it answers on a new connection
