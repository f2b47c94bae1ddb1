"""One search for a group: the asyncio shell of a :class:`.SearchCore`. Turns effects into I/O, and I/O into events.

It owns the core and its driver, the stream to the leader that this peer asks, and the streams of its followers.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from shoal.averaging.group import (
    GROUP_ID_BYTES,
    MAX_GATHER_BYTES,
    MAX_GROUP_GATHER_BYTES,
    MAX_GROUP_SIZE,
    GroupInfo,
    MemberInfo,
    SignedMemberInfo,
    order_members,
    verify_group,
    verify_member,
)
from shoal.averaging.matchmaking.core import SearchCore
from shoal.averaging.matchmaking.events import (
    AnswerRequest,
    AskSchema,
    AskToJoin,
    BeginGroup,
    Cancelled,
    Declare,
    Declared,
    DeclareFailed,
    DismissFollower,
    Effect,
    Event,
    FinishWithGroup,
    FinishWithout,
    FollowerLost,
    JoinRequested,
    LeaderAccepted,
    LeaderBegan,
    LeaderDismissed,
    LeaderLost,
    LeaderPostponed,
    LeaderRedirected,
    LeaderRejected,
    LeaveLeader,
    Log,
    MoveTo,
    PeerGone,
    Place,
    Poll,
    Polled,
    PollFailed,
    PostponeFollower,
    Restarted,
    SchemaCompared,
    SearchStarted,
    TooFew,
)
from shoal.averaging.matchmaking.messages import (
    JOIN,
    MAX_DECLARED_MEMBERS,
    Accepted,
    Begin,
    Dismissed,
    JoinRequest,
    LeaderMessage,
    Member,
    Postponed,
    Redirect,
    Rejected,
    RejectReason,
    check_searches,
    peer_id_of,
)
from shoal.averaging.matchmaking.peer import LocalPeer
from shoal.averaging.matchmaking.story import SearchStory
from shoal.averaging.matchmaking.view import Known
from shoal.errors import (
    MatchmakingException,
    PeerUnreachable,
    ProtocolViolation,
    ShoalError,
)
from shoal.p2p.identity import PeerID
from shoal.p2p.multiaddr import Multiaddr
from shoal.p2p.rpc import EndOfStream, Stream
from shoal.sansio.driver import Driver

logger = logging.getLogger(__name__)

BEGIN_TIMEOUT = 10.0
"""Seconds for which a follower that hears the beginning of a group takes in its members: no longer than its round waits
for whoever has not heard of it."""
END_TIMEOUT = 60.0
"""Seconds for which a stream is kept when all has been said."""

WhenMemberGone = Callable[[PeerID, str], None]
"""Called with a member of a group that this peer leads, and why it is not there any more."""


@dataclass
class _Follower:
    """The leader's end of one request: what is to be sent, ``None`` after the last message."""

    signed: SignedMemberInfo
    info: MemberInfo
    has_begun: bool = False
    """It is in the group that this peer leads, and is being told so."""
    outbox: asyncio.Queue[LeaderMessage | None] = field(default_factory=asyncio.Queue)

    def send(self, *messages: LeaderMessage, last: bool) -> None:
        for message in messages:
            self.outbox.put_nowait(message)
        if last:
            self.outbox.put_nowait(None)


class Search:
    """One search. Its core may only be touched through :meth:`dispatch`."""

    def __init__(
        self,
        peer: LocalPeer,
        place: Place,
        deadline: float | None,
        gather: bytes,
        weight: float,
        known: Known,
        *,
        when_too_few: Callable[[int], None],
        when_mode_changed: Callable[[], None],
        when_leader_lost: Callable[[PeerID], None],
        is_first: bool = False,
        last_group: Sequence[PeerID] = (),
    ) -> None:
        """
        :param when_too_few: called with the number of peers seen when the start time came without enough members
        :param when_mode_changed: called when this peer's mode is another one than it declared
        :param when_leader_lost: called with a leader to which no route leads
        :param is_first: of its averager
        :param last_group: with whom this peer was before; those to whom a connection stands are likely to come back
        """
        self.place = place
        self.now = peer.clock.frozen()
        """DHT time as it was when the search began: if the peer's clock is moved meanwhile, no wait changes."""
        self._peer = peer
        self._gather = gather
        self._weight = weight
        self._when_too_few = when_too_few
        self._when_mode_changed = when_mode_changed
        self._when_leader_lost = when_leader_lost
        self._mode = peer.mode
        self._core = SearchCore(
            peer.config.within(None if deadline is None else deadline - self.now()),
            peer_id=peer.peer_id,
            mode=self._mode,
            schema_hash=peer.schema_hash,
            key=place.key,
            start_time=place.start_time,
            order_time=place.order_time,
            deadline=deadline,
            grid_round=place.grid_round,
            lineage=place.lineage,
            lost=place.lost,
            known=known,
            expected=[member for member in last_group if peer.node.host.is_connected(member)],
            is_first=is_first,
        )
        self._loop = asyncio.get_running_loop()
        self._result: asyncio.Future[GroupInfo] = self._loop.create_future()
        self._driver: Driver[Event, Effect] = Driver(
            self._core, self._carry_out, clock=self.now, name="matchmaking", subject=peer.prefix
        )
        self._asks: dict[int, asyncio.Task[None]] = {}
        self._followers: dict[int, _Follower] = {}
        self._tokens = 0
        self._gone: list[tuple[PeerID, str]] = []
        self._when_member_gone: WhenMemberGone | None = None

    @property
    def is_over(self) -> bool:
        """Whether it has found a group or has ended without one."""
        return self._result.done()

    @property
    def _found_group(self) -> bool:
        result = self._result
        return result.done() and not result.cancelled() and result.exception() is None

    @property
    def story(self) -> SearchStory:
        """What it has seen and asked until now."""
        return self._core.story.summary(self.now())

    @property
    def count_seen(self) -> int:
        """How many peers have looked for a group under its key while it did, this one included."""
        return self._core.count_seen

    @property
    def known(self) -> Known:
        """What the next search of this peer is to know."""
        return self._core.known

    def move_to(self, place: Place) -> None:
        """Begin anew at another place, in this peer's mode of now, unless the search is over."""
        if not self.is_over:
            self._mode = self._peer.mode
            self.dispatch(Restarted(place, self._mode))

    def watch_members(self, when_gone: WhenMemberGone) -> None:
        """Call ``when_gone`` for each member of the group that this peer leads that left before it heard of it."""
        self._when_member_gone = when_gone
        for peer_id, reason in self._gone:
            when_gone(peer_id, reason)

    async def run(self) -> GroupInfo:
        """Cancelled in the very moment when the group is complete, it returns the group, and the task is cancelled at
        its next wait: the others count on this member, and only its round can tell them that it leaves.

        :raises MatchmakingException:
        """
        self.dispatch(SearchStarted())
        unsubscribe = self._peer.node.host.on_disconnect(lambda peer, _: self.dispatch(PeerGone(peer)))
        try:
            return await self._result
        except asyncio.CancelledError:
            if self._found_group:
                _cancel_later()
                return self._result.result()
            self.dispatch(Cancelled())
            if self._result.done() and not self._result.cancelled():
                self._result.exception()  # nobody is there to see it
            raise
        finally:
            unsubscribe()

    def dispatch(self, event: Event) -> None:
        """Let the core take in ``event``, and carry out what it asks for."""
        try:
            self._driver.tell(event)
        except Exception as e:
            # A bug: whoever waits for the group must not wait for ever.
            if not self._result.done():
                self._result.set_exception(e)
            raise

    def _carry_out(self, effect: Effect) -> None:
        match effect:
            case Declare():
                self._declare(effect)
            case MoveTo(place):
                self.place = place
            case Poll():
                self._peer.tasks.start(self._poll(), f"poll {self.place.key}")
            case AskToJoin(ask, leader):
                self._asks[ask] = self._peer.tasks.start(self._ask(effect), f"ask {leader}")
                self._asks[ask].add_done_callback(lambda _: self._asks.pop(ask))
            case LeaveLeader():
                self._leave(effect)
            case AnswerRequest() | PostponeFollower() | DismissFollower():
                self._tell_follower(effect)
            case BeginGroup(tokens):
                self._begin(tokens)
            case Log() | TooFew() | AskSchema():
                self._report(effect)
            case FinishWithGroup() | FinishWithout():
                self._finish(effect)

    def _sign_info(self, leader: PeerID) -> SignedMemberInfo:
        return self._peer.sign_info(leader, self.place, self._gather, self._weight)

    def _report(self, effect: Log | TooFew | AskSchema) -> None:
        match effect:
            case Log(text, is_warning, tells_how_to_join):
                more = f". {self._peer.how_to_join()}" if tells_how_to_join else ""
                logger.log(logging.WARNING if is_warning else logging.INFO, "%s%s", text, more)
            case TooFew(seen):
                # Not at once: its answer may be to move, which is another event.
                self._loop.call_soon(self._when_too_few, seen)
            case AskSchema(peer, addresses, schema_hash):
                self._peer.tasks.start(self._compare(peer, addresses, schema_hash), f"compare with {peer}")

    def _finish(self, effect: FinishWithGroup | FinishWithout) -> None:
        self._driver.close()
        if self._result.done():
            return  # the search was cancelled
        match effect:
            case FinishWithGroup(group):
                self._result.set_result(group)
            case FinishWithout(explanation):
                self._result.set_exception(MatchmakingException(explanation, self.story))

    # ---- the DHT

    def _declare(self, effect: Declare) -> None:
        group = effect.group[:MAX_DECLARED_MEMBERS]
        declaration = self._peer.declaration(self.place, self._mode, effect.state, group)
        self._peer.declarations.declare(self.place.key, declaration, self._declared)

    def _declared(self, seconds: float, failure: str | None) -> None:
        self.dispatch(Declared(seconds) if failure is None else DeclareFailed(failure))

    async def _poll(self) -> None:
        began_at, place = self.now(), self.place
        result: Polled | PollFailed
        try:
            declared = await self._peer.declarations.read(place.key)
            result = Polled(began_at, declared)
            self._peer.look_at(declared)
        except ShoalError as e:
            result = PollFailed(str(e))
        if self._mode is not self._peer.mode and not self.is_over:
            self._when_mode_changed()
        if place is self.place:
            self.dispatch(result)

    async def _compare(self, peer: PeerID, addresses: tuple[str, ...], schema_hash: bytes) -> None:
        difference = await self._peer.others.compare(peer, addresses, schema_hash)
        self.dispatch(SchemaCompared(peer, difference))

    # ---- this peer asks a leader

    async def _ask(self, effect: AskToJoin) -> None:
        host, ask, leader = self._peer.node.host, effect.ask, effect.leader
        add = host.add_hearsay if effect.is_hearsay else host.add_addresses
        try:
            add(leader, [Multiaddr.parse(address) for address in effect.addresses])
            own = self._sign_info(leader)
            async with host.open_stream(leader, JOIN) as stream:
                await stream.send(JoinRequest(self._peer.prefix, own))
                await self._listen_to_leader(ask, stream, own)
        except ShoalError as e:
            self.dispatch(LeaderLost(ask, str(e)))
            if not self.is_over:
                self._note_lost(leader, e)

    async def _listen_to_leader(self, ask: int, stream: Stream, own: SignedMemberInfo) -> None:
        """Turn the leader's messages into events, up to the last one.

        :raises ShoalError: the leader is lost, or does not keep to the protocol
        """
        match await stream.receive():
            case Accepted(begins_in):
                self.dispatch(LeaderAccepted(ask, _check_delay(begins_in)))
            case Redirect(leader, addresses):
                self.dispatch(LeaderRedirected(ask, peer_id_of(leader), addresses))
                return
            case Rejected() as rejected:
                check_searches(rejected.members)
                self.dispatch(LeaderRejected(ask, rejected))
                return
            case other:
                raise ProtocolViolation(f"{stream.remote} answers a request by {type(other).__name__}")
        while True:
            match await stream.receive():
                case Postponed(begins_in):
                    self.dispatch(LeaderPostponed(ask, _check_delay(begins_in)))
                case Dismissed() as dismissed:
                    check_searches(dismissed.members)
                    if dismissed.leader is not None:
                        peer_id_of(dismissed.leader)
                    self.dispatch(LeaderDismissed(ask, dismissed))
                    return
                case Begin(group_id, size):
                    # What all gathered takes its time on a slow link.
                    self.dispatch(LeaderPostponed(ask, BEGIN_TIMEOUT))
                    members = await _receive_members(stream, size)
                    now = self._peer.clock()
                    group = verify_group(group_id, members, leader=stream.remote, own=own, now=now)
                    self.dispatch(LeaderBegan(ask, group))
                    # Before the leader has finished too, to leave would reset the stream: as if out of the group.
                    await _expect_end(stream)
                    return
                case other:
                    raise ProtocolViolation(f"{stream.remote} sends its follower a {type(other).__name__}")

    def _leave(self, effect: LeaveLeader) -> None:
        if effect.ask in self._asks:
            self._asks[effect.ask].cancel()
        if effect.overdue is not None:
            self._peer.tasks.start(self._look_for_route(effect.overdue), f"dial {effect.overdue}")

    async def _look_for_route(self, leader: PeerID) -> None:
        """Where packets vanish, a dial takes longer than this peer waits for an answer: wait until it has failed."""
        host = self._peer.node.host
        try:
            await host.connect(leader, timeout=2 * host.config.dial_timeout)
        except ShoalError as e:
            self._note_lost(leader, e)

    def _note_lost(self, leader: PeerID, error: ShoalError) -> None:
        if isinstance(error, PeerUnreachable) and not error.is_refused:
            self._when_leader_lost(leader)

    # ---- this peer leads

    def _tell_follower(self, effect: AnswerRequest | PostponeFollower | DismissFollower) -> None:
        follower = self._followers[effect.token]
        match effect:
            case AnswerRequest(_, answer):
                follower.send(answer, last=not isinstance(answer, Accepted))
            case PostponeFollower(_, begins_in):
                follower.send(Postponed(begins_in), last=False)
            case DismissFollower(_, message):
                follower.send(message, last=True)

    async def serve(self, stream: Stream, signed: SignedMemberInfo, info: MemberInfo) -> None:
        """Let the core answer a request, and send all that it has to say to the asker until the request is over."""
        held = sum(len(follower.signed.info) for follower in self._followers.values())
        if held + len(signed.info) > MAX_GROUP_GATHER_BYTES - MAX_GATHER_BYTES:
            await stream.send(Rejected(RejectReason.FULL))
            return
        self._tokens += 1
        token = self._tokens
        follower = self._followers[token] = _Follower(signed, info)
        reason = "left"
        try:
            self.dispatch(JoinRequested(token, info))
            while (message := await follower.outbox.get()) is not None:
                await stream.send(message)
            if follower.has_begun:
                await stream.finish()
                await _expect_end(stream)
                follower.has_begun = False
        except ShoalError as e:
            reason = str(e)
        finally:
            # Also when the asker went away: the host cancels this handler then.
            del self._followers[token]
            self.dispatch(FollowerLost(token, reason))
            if follower.has_begun:
                self._lose_member(stream.remote, str(stream.failure or reason))

    def _lose_member(self, peer_id: PeerID, why: str) -> None:
        reason = f"it left before it heard that the group begins: {why}"
        self._gone.append((peer_id, reason))
        if self._when_member_gone is not None:
            self._when_member_gone(peer_id, reason)

    def _begin(self, tokens: tuple[int, ...]) -> None:
        leader = self._peer.peer_id
        own = self._sign_info(leader)
        followers = [self._followers[token] for token in tokens]
        signed = [own, *(follower.signed for follower in followers)]
        infos = [verify_member(own, now=self._peer.clock()), *(follower.info for follower in followers)]
        group_id = self._peer.rng.randbytes(GROUP_ID_BYTES)
        messages: list[LeaderMessage] = [Begin(group_id, len(signed)), *(Member(member) for member in signed)]
        for follower in followers:
            follower.has_begun = True
            follower.send(*messages, last=True)
        group = GroupInfo(group_id, self.place.key, order_members(leader, infos))
        self._finish(FinishWithGroup(group))


def _cancel_later() -> None:
    """The cancellation of this task, which was caught, comes again when it next waits."""
    task = asyncio.current_task()
    assert task is not None
    task.uncancel()
    task.cancel()


async def _expect_end(stream: Stream) -> None:
    """Wait until the other side has finished, but not for ever: whether a member takes part shows in its round too.

    :raises ProtocolViolation: it sends something else
    """
    try:
        async with asyncio.timeout(END_TIMEOUT):
            message = await stream.receive()
    except (EndOfStream, TimeoutError):
        return
    raise ProtocolViolation(f"{stream.remote} sends {type(message).__name__} after a group began")


async def _receive_members(stream: Stream, size: int) -> list[SignedMemberInfo]:
    if not 1 <= size <= MAX_GROUP_SIZE:
        raise ProtocolViolation(f"{stream.remote} begins a group of {size}")
    members: list[SignedMemberInfo] = []
    total = 0
    for _ in range(size):
        message = await stream.receive()
        if not isinstance(message, Member):
            raise ProtocolViolation(f"{stream.remote} sends {type(message).__name__} among the members")
        total += len(message.member.info)
        if total > MAX_GROUP_GATHER_BYTES:
            raise ProtocolViolation(
                f"{stream.remote} sends members of more than {MAX_GROUP_GATHER_BYTES} bytes"
            )
        members.append(message.member)
    return members


def _check_delay(seconds: float) -> float:
    if not 0 <= seconds < 1e9:  # false for NaN too
        raise ProtocolViolation(f"a group begins in {seconds} seconds")
    return seconds
