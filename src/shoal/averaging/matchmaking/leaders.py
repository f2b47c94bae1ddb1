"""The leaders that a search asks: a task and a stream for each request. What leaders answer becomes events."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Protocol

from shoal.averaging.group import SignedMemberInfo, terms_in, verify_group
from shoal.averaging.matchmaking.events import (
    AskToJoin,
    Event,
    LeaderAccepted,
    LeaderBegan,
    LeaderDismissed,
    LeaderLost,
    LeaderPostponed,
    LeaderRedirected,
    LeaderRejected,
    LeaveLeader,
)
from shoal.averaging.matchmaking.join_stream import check_delay, expect_end, receive_members
from shoal.averaging.matchmaking.messages import (
    JOIN,
    Accepted,
    Begin,
    Dismissed,
    JoinRequest,
    Postponed,
    Redirect,
    Rejected,
    check_searches,
    peer_id_of,
)
from shoal.averaging.matchmaking.peer import LocalPeer
from shoal.errors import PeerUnreachable, ProtocolViolation, ShoalError
from shoal.p2p.identity import PeerID
from shoal.p2p.multiaddr import Multiaddr
from shoal.p2p.rpc import Stream

BEGIN_TIMEOUT = 10.0
"""Seconds for which a follower that hears the beginning of a group takes in its members: no longer than its round waits
for members that have not heard of it."""


class Asker(Protocol):
    """The search that asks, as far as it matters here."""

    @property
    def is_over(self) -> bool: ...

    def tell(self, event: Event) -> None: ...

    def sign_info(self, leader: PeerID) -> SignedMemberInfo: ...


class AskedLeaders:
    """This peer's requests to leaders, by number.

    :param when_unreachable: called with a leader to which no route leads
    """

    def __init__(self, search: Asker, peer: LocalPeer, when_unreachable: Callable[[PeerID], None]) -> None:
        self._search = search
        self._peer = peer
        self._when_unreachable = when_unreachable
        self._tasks: dict[int, asyncio.Task[None]] = {}

    def ask(self, request: AskToJoin) -> None:
        """Ask a leader, in a task of its own."""
        number = request.ask
        self._tasks[number] = self._peer.tasks.start(self._ask(request), f"ask {request.leader}")
        self._tasks[number].add_done_callback(lambda _: self._tasks.pop(number))

    def leave(self, request: LeaveLeader) -> None:
        """End a request, whether it was answered or not: the leader's end of the stream is reset."""
        if request.ask in self._tasks:
            self._tasks[request.ask].cancel()

    def look_for_route(self, leader: PeerID) -> None:
        """A leader gave no answer. Where packets vanish, a dial takes longer than this peer waits for one: find out."""
        self._peer.tasks.start(self._dial(leader), f"dial {leader}")

    async def _ask(self, request: AskToJoin) -> None:
        host, leader = self._peer.node.host, request.leader
        # What others say of a leader must not displace what it said itself.
        add = host.add_hearsay if request.is_hearsay else host.add_addresses
        try:
            add(leader, [Multiaddr.parse(address) for address in request.addresses])
            # For this leader alone: nobody else can begin a group with it.
            own = self._search.sign_info(leader)
            async with host.open_stream(leader, JOIN) as stream:
                await stream.send(JoinRequest(self._peer.prefix, own))
                await self._listen(request.ask, stream, own)
        except ShoalError as e:
            self._search.tell(LeaderLost(request.ask, str(e)))
            if not self._search.is_over:
                self._note_lost(leader, e)

    async def _listen(self, ask: int, stream: Stream, own: SignedMemberInfo) -> None:
        """Turn the leader's messages into events, up to the last one.

        :raises ShoalError: the leader is lost, or does not keep to the protocol
        """
        tell = self._search.tell
        match await stream.receive():
            case Accepted(begins_in):
                tell(LeaderAccepted(ask, check_delay(begins_in)))
            case Redirect(leader, addresses):
                tell(LeaderRedirected(ask, peer_id_of(leader), addresses))
                return
            case Rejected() as rejected:
                check_searches(rejected.members)
                tell(LeaderRejected(ask, rejected))
                return
            case other:
                raise ProtocolViolation(f"{stream.remote} answers a request by {type(other).__name__}")
        while True:
            match await stream.receive():
                case Postponed(begins_in):
                    tell(LeaderPostponed(ask, check_delay(begins_in)))
                case Dismissed() as dismissed:
                    check_searches(dismissed.members)
                    if dismissed.leader is not None:
                        peer_id_of(dismissed.leader)
                    tell(LeaderDismissed(ask, dismissed))
                    return
                case Begin() as begin:
                    await self._hear_beginning(ask, stream, begin, own)
                    return
                case other:
                    raise ProtocolViolation(f"{stream.remote} sends its follower a {type(other).__name__}")

    async def _hear_beginning(self, ask: int, stream: Stream, begin: Begin, own: SignedMemberInfo) -> None:
        # What all gathered takes its time on a slow link.
        self._search.tell(LeaderPostponed(ask, BEGIN_TIMEOUT, is_beginning=True))
        members = await receive_members(stream, begin.size, terms_in(own))
        group = verify_group(
            begin.group_id,
            members,
            leader=stream.remote,
            own=own,
            now=self._peer.clock(),
            seen=begin.seen,
            before=begin.before,
        )
        self._search.tell(LeaderBegan(ask, group))
        # Before the leader has finished too, to leave would reset the stream: as if out of the group.
        await expect_end(stream)

    async def _dial(self, leader: PeerID) -> None:
        host = self._peer.node.host
        try:
            await host.connect(leader, timeout=2 * host.config.dial_timeout)
        except ShoalError as e:
            self._note_lost(leader, e)

    def _note_lost(self, leader: PeerID, error: ShoalError) -> None:
        # A peer that refuses the connection says why itself, and may take others.
        if isinstance(error, PeerUnreachable) and not error.is_refused:
            self._when_unreachable(leader)
