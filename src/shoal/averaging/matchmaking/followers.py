"""The followers of a search that leads: the leader's end of each request, and what is sent there."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field

from shoal.averaging.group import (
    GROUP_ID_BYTES,
    MAX_GATHER_BYTES,
    MAX_GROUP_GATHER_BYTES,
    GroupInfo,
    MemberInfo,
    SignedMemberInfo,
    order_members,
    terms_of,
    verify_member,
)
from shoal.averaging.matchmaking.events import (
    AnswerRequest,
    BeginGroup,
    DismissFollower,
    Event,
    FollowerLost,
    JoinRequested,
    PostponeFollower,
)
from shoal.averaging.matchmaking.join_stream import expect_end
from shoal.averaging.matchmaking.messages import (
    Accepted,
    Begin,
    GroupMember,
    LeaderMessage,
    Postponed,
    Rejected,
    RejectReason,
)
from shoal.averaging.matchmaking.peer import LocalPeer
from shoal.errors import ShoalError
from shoal.p2p.identity import PeerID
from shoal.p2p.rpc import Stream

WhenMemberGone = Callable[[PeerID, str], None]
"""Called with a member of a group that this peer leads, and why it is not there any more."""


@dataclass
class _Follower:
    """The leader's end of one request: what is to be sent, ``None`` after the last message."""

    signed: SignedMemberInfo
    info: MemberInfo
    has_begun: bool = False
    """It is in the group that this peer leads, and is being told so."""
    # Unbounded, since the core must not wait for a slow follower: it says little, and no more than a group's members.
    outbox: asyncio.Queue[LeaderMessage | None] = field(default_factory=asyncio.Queue)

    def send(self, *messages: LeaderMessage, last: bool) -> None:
        for message in messages:
            self.outbox.put_nowait(message)
        if last:
            self.outbox.put_nowait(None)


class Followers:
    """Those that ask this peer to lead them, by the token of their request.

    :param tell: takes what happens to them to the core of the search
    """

    def __init__(self, peer: LocalPeer, tell: Callable[[Event], None]) -> None:
        self._peer = peer
        self._tell = tell
        self._followers: dict[int, _Follower] = {}
        self._tokens = 0
        self._gone: list[tuple[PeerID, str]] = []
        self._when_member_gone: WhenMemberGone | None = None

    async def attend(self, stream: Stream, signed: SignedMemberInfo, info: MemberInfo) -> None:
        """Let the core answer a request, and send all that it has to say to the asker until the request is over."""
        # Each member gets what all gathered. To refuse one now is better than a group that nobody can take in.
        held = sum(len(follower.signed.info) for follower in self._followers.values())
        if held + len(signed.info) > MAX_GROUP_GATHER_BYTES - MAX_GATHER_BYTES:
            await stream.send(Rejected(RejectReason.FULL))
            return
        self._tokens += 1
        token = self._tokens
        follower = self._followers[token] = _Follower(signed, info)
        reason = "left"
        try:
            self._tell(JoinRequested(token, info))
            while (message := await follower.outbox.get()) is not None:
                await stream.send(message)
            if follower.has_begun:
                # The follower is in the group once it has finished its side, too: before, it may have heard nothing.
                await stream.finish()
                await expect_end(stream)
                follower.has_begun = False
        except ShoalError as e:
            reason = str(e)
        finally:
            # Also when the asker went away: the host cancels this handler then.
            del self._followers[token]
            self._tell(FollowerLost(token, reason))
            if follower.has_begun:
                self._lose_member(stream.remote, str(stream.failure or reason))

    def send(self, effect: AnswerRequest | PostponeFollower | DismissFollower) -> None:
        """Queue what the core says to one of them: it goes out as fast as that one takes it."""
        follower = self._followers[effect.token]
        match effect:
            case AnswerRequest(_, answer):
                follower.send(answer, last=not isinstance(answer, Accepted))
            case PostponeFollower(_, begins_in):
                follower.send(Postponed(begins_in), last=False)
            case DismissFollower(_, message):
                follower.send(message, last=True)

    def form_group(self, key: str, effect: BeginGroup, own: SignedMemberInfo) -> GroupInfo:
        """The group of this peer and these followers, which are told of it."""
        followers = [self._followers[token] for token in effect.tokens]
        signed = [own, *(follower.signed for follower in followers)]
        infos = [verify_member(own, now=self._peer.clock()), *(follower.info for follower in followers)]
        group_id = self._peer.rng.randbytes(GROUP_ID_BYTES)
        terms = terms_of(infos[0])
        messages: list[LeaderMessage] = [
            Begin(group_id, len(signed), effect.seen, effect.before),
            *(GroupMember.without(terms, member) for member in signed),
        ]
        for follower in followers:
            follower.has_begun = True
            follower.send(*messages, last=True)
        return GroupInfo(group_id, key, order_members(self._peer.peer_id, infos), effect.seen, effect.before)

    # ---- after the beginning

    def watch(self, when_gone: WhenMemberGone) -> None:
        """Call ``when_gone`` for each member that leaves before it has heard of its group, or has left already."""
        self._when_member_gone = when_gone
        for peer_id, reason in self._gone:
            when_gone(peer_id, reason)

    def _lose_member(self, peer_id: PeerID, why: str) -> None:
        reason = f"it left before it heard that the group begins: {why}"
        self._gone.append((peer_id, reason))
        if self._when_member_gone is not None:
            self._when_member_gone(peer_id, reason)
