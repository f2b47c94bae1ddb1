"""The rounds of one averager: streams of other members find theirs by group id, and orphans learn how ended
ones ended.
"""

from __future__ import annotations

import asyncio
from collections import Counter, OrderedDict
from typing import NamedTuple

from shoal.averaging.allreduce.commit import answer_question
from shoal.averaging.allreduce.core import AllReduce
from shoal.averaging.allreduce.events import OVER
from shoal.averaging.allreduce.messages import (
    COMMIT,
    EXCHANGE,
    VOTE,
    Contribute,
    JoinRound,
    NotKnown,
    Outcome,
    Question,
)
from shoal.averaging.allreduce.round import Round
from shoal.averaging.codes import AveragingCode
from shoal.averaging.router import Router
from shoal.errors import RemoteError
from shoal.p2p.identity import PeerID
from shoal.p2p.protocol.codes import ResetCode
from shoal.p2p.rpc import Stream

METHODS = (EXCHANGE, COMMIT, VOTE)
ARRIVAL_TIMEOUT = 10.0
"""Seconds for which a stream may be ahead of the message by which this member learns of the group; ``sender_timeout``
if that is shorter.
"""
QUESTION_TIMEOUT = 1.0
"""Likewise for a question: a member that does not know the round has no vote in it."""
MAX_WAITING_STREAMS = 1024
MAX_WAITING_STREAMS_PER_PEER = 8
"""A member opens two in a round. Bytes of streams that wait are bounded by the connection, as of all streams."""
REMEMBERED_ROUNDS = 64
REMEMBERED_FOR = 200.0
"""Seconds for which a round is remembered in any case: longer than another member can be in doubt of it."""
REMEMBERED_AT_MOST = 4096


class Ended(NamedTuple):
    """A round that is over for this member, which answers others' questions all the same."""

    votes: AllReduce | Outcome
    """The decision, once it is known: there is no more to say. Until then the core, which has promises to keep."""
    failure: str | None
    peers: tuple[PeerID, ...]
    at: float
    """When it ended, in seconds of the loop."""


class Rounds:
    """Serves the methods of :mod:`.messages` for one prefix, and hands each stream to its round.

    :param sender_timeout: of the rounds, in seconds; None: no limit
    """

    def __init__(self, router: Router, prefix: str, *, sender_timeout: float | None = None) -> None:
        self._arrival_timeout = (
            ARRIVAL_TIMEOUT if sender_timeout is None else min(sender_timeout, ARRIVAL_TIMEOUT)
        )
        self._router = router
        self._prefix = prefix
        self._current: dict[bytes, Round] = {}
        self._ended: OrderedDict[bytes, Ended] = OrderedDict()
        self._began = asyncio.Event()
        self._waiting: Counter[PeerID] = Counter()
        router.register(EXCHANGE, prefix, self._serve_exchange)
        try:
            router.register(COMMIT, prefix, self._serve_commit)
            router.register(VOTE, prefix, self._serve_vote)
        except BaseException:  # nothing stays half registered
            self.close()
            raise

    def close(self) -> None:
        for method in METHODS:
            self._router.unregister(method, self._prefix)

    def begin(self, current: Round) -> None:
        """From now on streams of this group find their round."""
        self._current[current.group.group_id] = current
        self._began.set()
        self._began = asyncio.Event()

    def end(self, ended: Round) -> None:
        """The round is over here: its memory is let go, its vote is kept."""
        self._current.pop(ended.group.group_id, None)
        if ended.core.phase not in OVER:
            return  # it ended by a bug
        core, now = ended.core, asyncio.get_running_loop().time()
        votes = core if core.outcome is None else core.outcome
        self._ended[ended.group.group_id] = Ended(votes, core.failure, ended.group.peer_ids, now)
        while len(self._ended) > REMEMBERED_ROUNDS:
            oldest = next(iter(self._ended.values()))
            if oldest.at > now - REMEMBERED_FOR and len(self._ended) <= REMEMBERED_AT_MOST:
                break
            self._ended.popitem(last=False)

    def lose_member(self, group_id: bytes, peer: PeerID, reason: str) -> None:
        """This member leads the round of ``group_id``, if that still runs, and ``peer`` will not join it."""
        current = self._current.get(group_id)
        if current is not None:
            current.lose_member(peer, reason)

    async def _find(self, group_id: bytes, peer: PeerID) -> Round:
        if group_id not in self._current and group_id not in self._ended:
            await self._wait_for(group_id, peer, self._arrival_timeout)
        found = self._current.get(group_id)
        if found is None:
            ended = self._ended.get(group_id)
            reason = (
                f"it has ended: {ended.failure or 'committed'}" if ended else "its group is not known here"
            )
            raise RemoteError(AveragingCode.NO_SUCH_ROUND, f"no such round: {reason}")
        return found

    async def _wait_for(self, group_id: bytes, peer: PeerID, seconds: float) -> None:
        of_all, of_peer = self._waiting.total(), self._waiting[peer]
        if of_all >= MAX_WAITING_STREAMS or of_peer >= MAX_WAITING_STREAMS_PER_PEER:
            raise RemoteError(
                ResetCode.BUSY, f"{of_all} streams, {of_peer} of yours, wait for their rounds already"
            )
        self._waiting[peer] += 1
        try:
            async with asyncio.timeout(seconds):
                while group_id not in self._current and group_id not in self._ended:
                    await self._began.wait()
        except TimeoutError:
            pass  # answered as any other unknown group
        finally:
            self._waiting[peer] -= 1
            if not self._waiting[peer]:
                del self._waiting[peer]

    async def _serve_exchange(self, stream: Stream, first: Contribute) -> None:
        await (await self._find(first.group_id, stream.remote)).serve_exchange(stream, first)

    async def _serve_commit(self, stream: Stream, first: JoinRound) -> None:
        await (await self._find(first.group_id, stream.remote)).serve_commit(stream, first)

    async def _serve_vote(self, stream: Stream, first: Question) -> None:
        group_id, peer = first.group_id, stream.remote
        if group_id not in self._current and group_id not in self._ended:
            await self._wait_for(group_id, peer, min(QUESTION_TIMEOUT, self._arrival_timeout))
        current, ended = self._current.get(group_id), self._ended.get(group_id)
        peers = current.group.peer_ids if current else ended.peers if ended else ()
        if peer not in peers:
            await stream.send(NotKnown())
        elif current is not None:
            await stream.send(current.vote(first, peer))
        elif ended is not None:
            now = asyncio.get_running_loop().time()
            await stream.send(answer_question(ended.votes, first, peers.index(peer), now))
