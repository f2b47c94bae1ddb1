"""What an averager holds to find groups: one search after the other, and the group bits between them."""

from __future__ import annotations

import asyncio
import math
import random
from collections.abc import Callable

from shoal.averaging.group import (
    MAX_GATHER_BYTES,
    SCHEMA_HASH_BYTES,
    GroupInfo,
    PeerMode,
    group_key,
    verify_member,
)
from shoal.averaging.group_bits import GroupBits
from shoal.averaging.join_messages import JOIN, JoinRequest, Rejected, RejectReason
from shoal.averaging.lineage import NO_LINEAGE, after_round
from shoal.averaging.matchmaking import MatchmakingConfig
from shoal.averaging.matchmaking_events import Cancelled, Place
from shoal.averaging.matchmaking_peer import LocalPeer
from shoal.averaging.matchmaking_search import GroupSearch
from shoal.averaging.matchmaking_view import NOBODY
from shoal.averaging.router import Router
from shoal.dht.node import DHTNode
from shoal.errors import InvalidStateError, InvalidValueError, ProtocolViolation
from shoal.p2p.rpc import Stream
from shoal.utils.timed import get_dht_time

WITHDRAWAL_TIMEOUT = 1.0
"""Seconds that :meth:`Matchmaker.close` gives the DHT to learn that this peer looks for no group any more."""


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
        clock: Callable[[], float] = get_dht_time,
        rng: random.Random | None = None,
    ) -> None:
        """:raises InvalidValueError: the prefix is in use on this host, or a value is out of range"""
        group_key(prefix)
        if len(schema_hash) != SCHEMA_HASH_BYTES:
            raise InvalidValueError(f"schema_hash={schema_hash!r}: {SCHEMA_HASH_BYTES} bytes are allowed")
        if bandwidth is not None and not (math.isfinite(bandwidth) and bandwidth >= 0):
            raise InvalidValueError(f"bandwidth={bandwidth}: None or a finite number >= 0 is allowed")
        rng = random.SystemRandom() if rng is None else rng
        self._peer = LocalPeer(node, prefix, schema_hash, config, mode, bandwidth, clock, rng)
        self._bits = GroupBits(node.peer_id, initial_bits)
        self._lineage = NO_LINEAGE
        self._router = router
        self._turn = asyncio.Lock()
        self._search: GroupSearch | None = None
        self._last_order_time = -math.inf
        self._is_closed = False
        router.register(JOIN, prefix, self._serve_join)

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
        self._bits.set(bits)
        if self._search is not None and not self._search.is_over:
            self._search.move_to(self._place(self._search.place.start_time))

    def reschedule(self, start_time: float) -> None:
        """The search that goes on, if any, shall begin at ``start_time`` instead: it begins anew, at its new place.

        :raises InvalidValueError: not finite
        """
        if not math.isfinite(start_time):
            raise InvalidValueError(f"start_time={start_time}: must be finite")
        if self._search is not None and not self._search.is_over:
            self._search.move_to(self._place(start_time))

    def round_committed(self, group: GroupInfo) -> None:
        """A round of ``group``, which this peer found, has been committed: choose the bits of the next one.

        :raises InvalidValueError: this peer is no member of it
        """
        if self._peer.peer_id not in group.peer_ids:
            raise InvalidValueError(f"group {group.group_id.hex()}: this peer is no member of it")
        self._bits.round_committed(group, self._peer.config.target_group_size)
        averaged = [
            (member.peer_id, member.lineage)
            for member in group.members
            if member.mode is not PeerMode.AUXILIARY and member.weight > 0
        ]
        if averaged:
            self._lineage = after_round(group.group_id, averaged)

    async def find_group(
        self,
        *,
        start_time: float,
        deadline: float | None,
        gather: bytes = b"",
        weight: float = 1.0,
    ) -> GroupInfo:
        """Find a group that begins at ``start_time`` or, if it is full, at once. Times are in DHT time.

        Cancelling frees followers and leader at once. Without a ``deadline`` it waits for as long as it takes, and
        logs what it sees.

        :param weight: of this peer's tensors in the average; 0: it contributes nothing
        :raises MatchmakingException: no group was found until ``deadline``; says what the search saw
        :raises InvalidValueError: ``gather`` is too long, or a number is out of range
        """
        if len(gather) > MAX_GATHER_BYTES:
            raise InvalidValueError(f"gather: {len(gather)} bytes; at most {MAX_GATHER_BYTES} are allowed")
        if not math.isfinite(start_time) or (deadline is not None and not math.isfinite(deadline)):
            raise InvalidValueError(f"start_time={start_time}, deadline={deadline}: must be finite")
        if not (math.isfinite(weight) and weight >= 0):
            raise InvalidValueError(f"weight={weight}: a finite number of at least 0 is allowed")
        async with self._turn:
            if self._is_closed:
                raise InvalidStateError("the matchmaker is closed")
            known = NOBODY if self._search is None else self._search.known
            self._search = GroupSearch(self._peer, self._place(start_time), deadline, gather, weight, known)
            return await self._search.run()

    async def close(self) -> None:
        """End a search that goes on (it raises), and everything else. Idempotent."""
        if self._is_closed:
            return
        self._is_closed = True
        self._router.unregister(JOIN, self._peer.prefix)
        if self._search is not None:
            self._search.dispatch(Cancelled())
        await self._peer.declarations.flush(WITHDRAWAL_TIMEOUT)
        await self._peer.tasks.close()

    def _place(self, start_time: float) -> Place:
        # Others tell a peer's searches apart by their times, so each must be later than the one before, even
        # if that one was scheduled far ahead and its group was full early.
        self._last_order_time = max(start_time, self._last_order_time + 0.001)
        key = group_key(self._peer.prefix, self._bits.bits)
        return Place(key, start_time, self._last_order_time, self._bits.grid_round, self._lineage)

    async def _serve_join(self, stream: Stream, request: JoinRequest) -> None:
        info = verify_member(request.member, now=self._peer.clock())
        if info.peer_id != stream.remote.to_bytes():
            raise ProtocolViolation(f"{stream.remote} asks to join as another peer")
        if info.leader != self._peer.peer_id.to_bytes():
            raise ProtocolViolation(f"{stream.remote} asks this peer with an info for another leader")
        if self._search is None:
            await stream.send(Rejected(RejectReason.NOT_LOOKING))
        else:
            await self._search.serve(stream, request.member, info)
