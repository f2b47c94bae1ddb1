"""What an averager holds to find groups: one search after the other, and the group bits between them."""

from __future__ import annotations

import asyncio
import logging
import math
import random
from collections.abc import Collection, Iterable
from dataclasses import replace

from shoal.averaging.agreement import Agreement
from shoal.averaging.group import (
    MAX_GATHER_BYTES,
    SCHEMA_HASH_BYTES,
    GroupInfo,
    PeerMode,
    group_key,
    verify_member,
)
from shoal.averaging.lineage import NO_LINEAGE, after_round
from shoal.averaging.matchmaking.apart import spared_routes
from shoal.averaging.matchmaking.candidate import candidate_of
from shoal.averaging.matchmaking.events import Cancelled, Place
from shoal.averaging.matchmaking.followers import WhenMemberGone
from shoal.averaging.matchmaking.group_keys import GroupKeys
from shoal.averaging.matchmaking.memory import HELD_ITS_FOLLOWER, FailureMemory, Fault
from shoal.averaging.matchmaking.messages import JOIN, JoinRequest, Rejected, RejectReason
from shoal.averaging.matchmaking.peer import LocalPeer
from shoal.averaging.matchmaking.schemas import OtherSchemas
from shoal.averaging.matchmaking.scout import Scout
from shoal.averaging.matchmaking.search import Search
from shoal.averaging.matchmaking.view import NOTHING_KNOWN
from shoal.averaging.matchmaking_config import MatchmakingConfig
from shoal.averaging.router import Router
from shoal.dht.node import DHTNode
from shoal.errors import InvalidStateError, InvalidValueError, ProtocolViolation
from shoal.p2p.identity import PeerID
from shoal.p2p.rpc import Stream
from shoal.utils.checks import check_number
from shoal.utils.timed import DHTClock, dht_clock

logger = logging.getLogger(__name__)

WITHDRAWAL_TIMEOUT = 1.0
"""Seconds that :meth:`Matchmaker.close` gives the DHT to learn that this peer looks for no group any more."""
REGROUP = 2.0
"""Seconds for which a search that has left a leader for holding it waits for the others that it held, at most. They
leave at about the same time, and each would begin with the first one that comes: the start time of all is over."""


class Matchmaker:
    """Finds groups for one averager, one search at a time; the next waits for the one before."""

    def __init__(
        self,
        node: DHTNode,
        router: Router,
        *,
        prefix: str,
        schema_hash: bytes,
        config: MatchmakingConfig,
        mode: PeerMode = PeerMode.FULL,
        bandwidth: float | None = None,
        initial_bits: str = "",
        agreement: Agreement | None = None,
        clock: DHTClock = dht_clock,
        rng: random.Random | None = None,
    ) -> None:
        """
        :param agreement: what ``schema_hash`` is the hash of; None: peers that differ are not told in what
        :raises InvalidValueError: the prefix is in use on this host, or a value is out of range
        """
        group_key(prefix)
        if len(schema_hash) != SCHEMA_HASH_BYTES:
            raise InvalidValueError(f"schema_hash must be {SCHEMA_HASH_BYTES} bytes, got {schema_hash!r}")
        if bandwidth is not None:
            check_number("bandwidth", bandwidth, minimum=0)
        router.register(JOIN, prefix, self._serve_join)
        rng = random.SystemRandom() if rng is None else rng
        others = OtherSchemas(node, router, prefix, agreement)
        self._peer = LocalPeer(node, prefix, schema_hash, config, mode, bandwidth, clock, rng, others)
        self._keys = GroupKeys(node.peer_id, initial_bits)
        self._bits = self._keys.bits
        self._scout = Scout(self._peer, self._keys, self._move)
        self._lineage = NO_LINEAGE
        self._router = router
        self._turn = asyncio.Lock()
        self._search: Search | None = None
        self._last_order_time = -math.inf
        self._known = NOTHING_KNOWN
        """Who was declared at the end of the last search, with the start time of its own."""
        self._last_group: tuple[PeerID, ...] = ()
        """The other members of the group that was found last, if they are likely to look under the same key next."""
        self._memory = FailureMemory(node.host.is_connected, node.host.incarnation)
        self._is_closed = False

    @property
    def mode(self) -> PeerMode:
        """What this peer does in groups now: one whom nobody can dial is a client."""
        return self._peer.mode

    @property
    def bits(self) -> str:
        """The group bits of the next search, or of the one that goes on; without the prefix."""
        return self._bits.bits

    def set_bits(self, bits: str) -> None:
        """Look for groups under these bits, which change with every committed round; "": choose them automatically.

        A search that goes on begins anew under the new key.

        :raises InvalidValueError: no string of bits, or too long
        """
        self._keys.set_bits(bits)
        if self._search is not None and not self._search.is_over:
            self._move(self._search, self._search.place.start_time)

    def reschedule(self, start_time: float) -> None:
        """The search that goes on, if any, shall begin at ``start_time`` instead: it begins anew, at its new place.

        :raises InvalidValueError: not finite
        """
        check_number("start_time", start_time)
        search = self._search
        if search is not None and not search.is_over:
            # The search may have begun by another time than the clock shows now.
            self._move(search, start_time - self._peer.clock() + search.now())

    def round_committed(self, group: GroupInfo, without: Collection[PeerID] = ()) -> None:
        """A round of ``group``, which this peer found, has been committed: choose the bits of the next one.

        :param without: members that it went on without, or that this peer could not reach in it
        :raises InvalidValueError: this peer is no member of it
        """
        if self._peer.peer_id not in group.peer_ids:
            raise InvalidValueError(f"group {group.group_id.hex()}: this peer is no member of it")
        proven = set(group.peer_ids) - set(without) - self._untried(group)
        self._memory.forgive(proven, self._peer.clock())
        self._scout.round_committed(group)
        if self._bits.are_given or self._bits.depth > 0 or self._keys.has_seat:
            self._last_group = ()  # they look under different keys now
        averaged = [
            (member.peer_id, member.lineage)
            for member in group.members
            if member.mode is not PeerMode.AUXILIARY and member.weight > 0
        ]
        if averaged:
            self._lineage = after_round(group.group_id, averaged)

    def _untried(self, group: GroupInfo) -> set[PeerID]:
        """Members that this peer had nothing to do with in a round of ``group``: it shows nothing of the route."""
        peers = group.peer_ids
        me = peers.index(self._peer.peer_id)
        spared = spared_routes([candidate_of(member) for member in group.members])
        return {peers[one] for pair in spared if me in pair for one in pair}

    def keep_apart(self, peers: Iterable[PeerID], fault: Fault = Fault.UNREACHED) -> None:
        """This peer has seen these fail, in its last round for instance: others are to be in its next groups."""
        now = self._peer.clock()
        for peer in peers:
            self._memory.note(peer, fault, now)

    def hear_of_exclusions(self, leader: PeerID, excluded: Iterable[PeerID]) -> None:
        """The ``leader`` of this peer's last round says that it went on without these."""
        now = self._peer.clock()
        for peer in excluded:
            if peer == self._peer.peer_id:
                continue  # a leader that was replaced has been excluded itself
            if leader == self._peer.peer_id:
                self._memory.note(peer, Fault.EXCLUDED, now)
            else:
                self._memory.hear(peer, Fault.EXCLUDED, now, told_by=leader)

    def _leader_failed(self, leader: PeerID, fault: Fault) -> None:
        """A leader that others follow fails this peer: it says so at once, or they would send it back there. One that
        gave no answer may only have been stopped for a moment: the search asks others, and it again.
        """
        search = self._search
        is_known = self._memory.avoids(leader, fault, self._peer.clock())
        if search is not None and not (fault is Fault.UNREACHED and is_known):
            self.keep_apart([leader], fault)
            logger.info("%s: leaves the leader %s, which %s", self._peer.prefix, leader, fault.words)
            start_time = search.place.start_time
            if fault in HELD_ITS_FOLLOWER:
                start_time = max(
                    start_time, search.soon(min(REGROUP, self._peer.config.min_matchmaking_time))
                )
            if fault is not Fault.UNANSWERED:
                self._move(search, start_time)

    def watch_members(self, when_gone: WhenMemberGone) -> None:
        """If this peer leads the group that it found last, call ``when_gone`` for each member that leaves before it has
        heard of the group, and so will not take part. They may have left already.
        """
        if self._search is not None:
            self._search.watch_members(when_gone)

    async def find_group(
        self,
        *,
        start_time: float,
        deadline: float | None,
        gather: bytes = b"",
        weight: float = 1.0,
    ) -> GroupInfo:
        """Find a group that begins at ``start_time`` or, if it is full, at once. Times are in DHT time.

        Cancelling frees followers and leader at once. If it comes in the very moment when the group is complete, the
        group is returned, and the task is cancelled at its next wait: to withdraw is up to the round then. Without
        a ``deadline`` it waits for as long as it takes, and logs what it sees.

        :param weight: of this peer's tensors in the average; 0: it contributes nothing
        :raises MatchmakingException: no group was found until ``deadline``; says what the search saw
        :raises InvalidValueError: ``gather`` is too long, or a number is out of range
        """
        if len(gather) > MAX_GATHER_BYTES:
            raise InvalidValueError(
                f"gather must take at most {MAX_GATHER_BYTES:,} bytes, got {len(gather):,}"
            )
        check_number("start_time", start_time)
        if deadline is not None:
            check_number("deadline", deadline)
        check_number("weight", weight, minimum=0)
        async with self._turn:
            if self._is_closed:
                raise InvalidStateError("the matchmaker is closed")
            self._scout.take_seat()
            place = self._place(start_time)
            search = self._search = Search(
                self._peer,
                place,
                deadline,
                gather,
                weight,
                self._known,
                when_too_few=self._scout.found_too_few,
                when_too_many=self._scout.found_too_many,
                when_missed=self._scout.missed_rounds,
                last_group=self._last_group,
                when_mode_changed=self._mode_changed,
                when_leader_failed=self._leader_failed,
                is_first=self._search is None,
            )
            self._last_group = ()  # one search waits for them; if they do not come to it, they have gone elsewhere
            self._scout.search_began(search, is_new=not self._known.start_times)
            try:
                group = await search.run()
                self._last_group = tuple(peer for peer in group.peer_ids if peer != self._peer.peer_id)
                return group
            finally:
                self._last_order_time = self._peer.after_search(self._last_order_time)
                known = search.known
                times = {peer: self._peer.after_search(time) for peer, time in known.start_times.items()}
                self._known = replace(known, start_times=times)
                if not self._is_closed:
                    self._scout.search_ended(search)

    def leave_search(self) -> None:
        """End a search that goes on: it raises, and frees followers and leader. A group that stands already is kept."""
        if self._search is not None and not self._search.is_over:
            self._search.tell(Cancelled())

    async def close(self) -> None:
        """End a search that goes on (it raises), and everything else. Idempotent."""
        if self._is_closed:
            return
        self._is_closed = True
        self._router.unregister(JOIN, self._peer.prefix)
        if self._search is not None:
            self._search.tell(Cancelled())
        await self._peer.declarations.close(WITHDRAWAL_TIMEOUT)
        await self._peer.others.close()
        await self._peer.tasks.close()

    def _place(self, start_time: float) -> Place:
        # Others tell a peer's searches apart by their times, so each must be later than what the one before has
        # left behind.
        self._last_order_time = max(start_time, self._last_order_time + 0.001)
        keys = self._keys
        lost = tuple(peer.to_bytes() for peer in self._memory.avoided(self._peer.clock()))
        return Place(
            keys.key(self._peer.prefix),
            start_time,
            self._last_order_time,
            self._bits.grid_round,
            NO_LINEAGE if keys.has_seat else self._lineage,
            lost,
            keys.grid,
            keys.expects,
            keys.may_spread,
        )

    def _move(self, search: Search, start_time: float) -> None:
        """The search begins anew, where this peer looks now."""
        search.move_to(self._place(start_time))

    def _mode_changed(self) -> None:
        """The search that goes on has declared another mode than this peer has now: it begins anew."""
        if self._search is not None:
            self._move(self._search, self._search.place.start_time)

    async def _serve_join(self, stream: Stream, request: JoinRequest) -> None:
        info = verify_member(request.member, now=self._peer.clock())
        if info.peer_id != stream.remote.to_bytes():
            raise ProtocolViolation(f"{stream.remote} asks to join as another peer")
        if info.leader != self._peer.peer_id.to_bytes():
            raise ProtocolViolation(f"{stream.remote} asks this peer with an info for another leader")
        if self._search is None:
            await stream.send(Rejected(RejectReason.NOT_LOOKING))
        else:
            await self._search.attend(stream, request.member, info)
