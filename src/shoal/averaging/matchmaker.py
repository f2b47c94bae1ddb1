"""The asyncio shell of matchmaking: turns the effects of a :class:`.Matchmaking` into I/O, and I/O into
events.

:class:`Matchmaker` is what an averager holds; :class:`_Search` is one search: its core, its timer, the stream
to the leader that it asks and the streams of its followers.
"""

from __future__ import annotations

import asyncio
import logging
import math
import random
from collections.abc import Callable
from dataclasses import dataclass, field

from shoal.averaging.declarations import Declarations
from shoal.averaging.group import (
    GROUP_ID_BYTES,
    MAX_GATHER_BYTES,
    MAX_GROUP_GATHER_BYTES,
    MAX_GROUP_SIZE,
    NONCE_BYTES,
    SCHEMA_HASH_BYTES,
    GroupInfo,
    MemberInfo,
    PeerMode,
    SignedMemberInfo,
    group_key,
    order_members,
    sign_member,
    verify_group,
    verify_member,
)
from shoal.averaging.join_messages import (
    JOIN,
    Accepted,
    Begin,
    Declaration,
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
from shoal.averaging.matchmaking import Matchmaking, MatchmakingConfig
from shoal.averaging.matchmaking_events import (
    AnswerRequest,
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
    Poll,
    Polled,
    PollFailed,
    PostponeFollower,
    SearchStarted,
    SetTimer,
    TimerFired,
)
from shoal.averaging.router import Router
from shoal.dht.node import DHTNode
from shoal.dht.tasks import TaskSet
from shoal.errors import (
    InvalidStateError,
    InvalidValueError,
    MatchmakingException,
    ProtocolViolation,
    ShoalError,
)
from shoal.p2p.identity import PeerID
from shoal.p2p.multiaddr import Multiaddr
from shoal.p2p.rpc import Stream
from shoal.utils.timed import get_dht_time

logger = logging.getLogger(__name__)

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
        group_key(prefix, initial_bits)
        if len(schema_hash) != SCHEMA_HASH_BYTES:
            raise InvalidValueError(f"schema_hash={schema_hash!r}: {SCHEMA_HASH_BYTES} bytes are allowed")
        if bandwidth is not None and not (math.isfinite(bandwidth) and bandwidth >= 0):
            raise InvalidValueError(f"bandwidth={bandwidth}: None or a finite number >= 0 is allowed")
        self.node = node
        self.prefix = prefix
        self.schema_hash = schema_hash
        self.config = config
        self.bandwidth = bandwidth
        self.clock = clock
        self.rng = random.SystemRandom() if rng is None else rng
        self.tasks = TaskSet()
        self.declarations = Declarations(node, self.tasks, clock)
        self.bits = initial_bits
        self._mode = mode
        self._router = router
        self._turn = asyncio.Lock()
        self._search: _Search | None = None
        self._last_order_time = -math.inf
        self._is_closed = False
        router.register(JOIN, prefix, self._serve_join)

    async def find_group(
        self,
        *,
        start_time: float,
        deadline: float | None,
        gather: bytes = b"",
        weight: float = 1.0,
    ) -> GroupInfo:
        """Find a group that begins at ``start_time`` or, if it is full, at once. Times are in DHT time.

        Cancelling frees followers and leader at once.

        :raises MatchmakingException: no group was found until ``deadline``; says what the search saw
        :raises InvalidValueError: ``gather`` is too long, or a time is not finite
        """
        key = group_key(self.prefix, self.bits)
        if len(gather) > MAX_GATHER_BYTES:
            raise InvalidValueError(f"gather: {len(gather)} bytes; at most {MAX_GATHER_BYTES} are allowed")
        if not math.isfinite(start_time) or (deadline is not None and not math.isfinite(deadline)):
            raise InvalidValueError(f"start_time={start_time}, deadline={deadline}: must be finite")
        if not (math.isfinite(weight) and weight >= 0):
            raise InvalidValueError(f"weight={weight}: a finite number of at least 0 is allowed")
        async with self._turn:
            if self._is_closed:
                raise InvalidStateError("the matchmaker is closed")
            order_time = self._next_order_time(start_time)
            self._search = _Search(self, key, start_time, order_time, deadline, gather, weight)
            return await self._search.run()

    def set_bits(self, bits: str) -> None:
        """Look for groups under these bits from the next search on."""
        group_key(self.prefix, bits)
        self.bits = bits

    def reschedule(self, start_time: float) -> None:
        """The search that goes on is to begin at another time."""
        raise NotImplementedError

    async def close(self) -> None:
        """End a search that goes on (it raises), and everything else. Idempotent."""
        if self._is_closed:
            return
        self._is_closed = True
        self._router.unregister(JOIN, self.prefix)
        if self._search is not None:
            self._search.dispatch(Cancelled())
        await self.declarations.flush(WITHDRAWAL_TIMEOUT)
        await self.tasks.close()

    @property
    def mode(self) -> PeerMode:
        """A peer whom nobody can dial cannot be full: the host may find that out only after joining the DHT."""
        if self._mode is PeerMode.FULL and not self.node.host.can_be_dialed:
            return PeerMode.CLIENT
        return self._mode

    def addresses(self) -> tuple[str, ...]:
        return tuple(str(address) for address in self.node.host.announced_addresses)

    def sign_info(
        self, leader: PeerID, key: str, order_time: float, gather: bytes, weight: float
    ) -> SignedMemberInfo:
        """What this peer says of itself to ``leader`` now."""
        info = MemberInfo(
            peer_id=self.node.peer_id.to_bytes(),
            leader=leader.to_bytes(),
            key=key,
            schema_hash=self.schema_hash,
            mode=self.mode,
            bandwidth=self.bandwidth,
            addresses=self.addresses(),
            gather=gather,
            start_time=order_time,
            signed_at=self.clock(),
            nonce=self.rng.randbytes(NONCE_BYTES),
            weight=weight,
        )
        return sign_member(self.node.host.identity, info)

    def _next_order_time(self, start_time: float) -> float:
        # Others tell a peer's searches apart by their times, so each must be later than the one before, even
        # if that one was scheduled far ahead and its group was full early.
        self._last_order_time = max(start_time, self._last_order_time + 0.001)
        return self._last_order_time

    async def _serve_join(self, stream: Stream, request: JoinRequest) -> None:
        info = verify_member(request.member, now=self.clock())
        if info.peer_id != stream.remote.to_bytes():
            raise ProtocolViolation(f"{stream.remote} asks to join as another peer")
        if info.leader != self.node.peer_id.to_bytes():
            raise ProtocolViolation(f"{stream.remote} asks this peer with an info for another leader")
        if self._search is None:
            await stream.send(Rejected(RejectReason.NOT_LOOKING))
        else:
            await self._search.serve(stream, request.member, info)


@dataclass
class _Follower:
    """The leader's end of one request: what is to be sent, ``None`` after the last message."""

    signed: SignedMemberInfo
    info: MemberInfo
    outbox: asyncio.Queue[LeaderMessage | None] = field(default_factory=asyncio.Queue)

    def send(self, *messages: LeaderMessage, last: bool) -> None:
        for message in messages:
            self.outbox.put_nowait(message)
        if last:
            self.outbox.put_nowait(None)


class _Search:
    """One search. Its core may only be touched through :meth:`dispatch`."""

    def __init__(
        self,
        owner: Matchmaker,
        key: str,
        start_time: float,
        order_time: float,
        deadline: float | None,
        gather: bytes,
        weight: float,
    ) -> None:
        self._owner = owner
        self._key = key
        self._order_time = order_time
        self._gather = gather
        self._weight = weight
        self._mode = owner.mode
        self._core = Matchmaking(
            owner.config,
            peer_id=owner.node.peer_id,
            mode=self._mode,
            schema_hash=owner.schema_hash,
            key=key,
            start_time=start_time,
            order_time=order_time,
            deadline=deadline,
        )
        self._loop = asyncio.get_running_loop()
        self._result: asyncio.Future[GroupInfo] = self._loop.create_future()
        self._timer: asyncio.TimerHandle | None = None
        self._asks: dict[int, asyncio.Task[None]] = {}
        self._followers: dict[int, _Follower] = {}
        self._tokens = 0

    async def run(self) -> GroupInfo:
        """:raises MatchmakingException:"""
        self.dispatch(SearchStarted())
        try:
            return await self._result
        except asyncio.CancelledError:
            self.dispatch(Cancelled())
            if self._result.done() and not self._result.cancelled():
                self._result.exception()  # nobody is there to see it
            raise

    def dispatch(self, event: Event) -> None:
        """Let the core take in ``event``, and carry out what it asks for."""
        try:
            for effect in self._core.handle(event, self._owner.clock()):
                self._carry_out(effect)
        except Exception as e:
            # A bug: whoever waits for the group must not wait for ever.
            if not self._result.done():
                self._result.set_exception(e)
            raise

    def _carry_out(self, effect: Effect) -> None:
        match effect:
            case SetTimer(at):
                self._set_timer(at)
            case Declare():
                self._declare(effect)
            case Poll():
                self._owner.tasks.start(self._poll(), f"poll {self._key}")
            case AskToJoin(ask, leader, addresses):
                self._asks[ask] = self._owner.tasks.start(self._ask(ask, leader, addresses), f"ask {leader}")
                self._asks[ask].add_done_callback(lambda _: self._asks.pop(ask))
            case LeaveLeader(ask):
                if ask in self._asks:
                    self._asks[ask].cancel()
            case AnswerRequest() | PostponeFollower() | DismissFollower():
                self._tell_follower(effect)
            case BeginGroup(tokens):
                self._begin(tokens)
            case Log(text):
                logger.info("%s", text)
            case FinishWithGroup(group):
                self._finish(group)
            case FinishWithout(explanation):
                self._finish(MatchmakingException(explanation))

    def _sign_info(self, leader: PeerID) -> SignedMemberInfo:
        return self._owner.sign_info(leader, self._key, self._order_time, self._gather, self._weight)

    def _finish(self, outcome: GroupInfo | MatchmakingException) -> None:
        self._set_timer(math.inf)
        if self._result.done():
            return  # the search was cancelled
        if isinstance(outcome, MatchmakingException):
            self._result.set_exception(outcome)
        else:
            self._result.set_result(outcome)

    def _set_timer(self, at: float) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if at < math.inf:
            delay = max(0.0, at - self._owner.clock())
            self._timer = self._loop.call_later(delay, self.dispatch, TimerFired())

    # ---- the DHT

    def _declare(self, effect: Declare) -> None:
        declaration = Declaration(
            start_time=self._order_time,
            state=effect.state,
            schema_hash=self._owner.schema_hash,
            mode=self._mode,
            addresses=self._owner.addresses(),
            group=effect.group,
        )
        self._owner.declarations.declare(self._key, declaration, self._declared)

    def _declared(self, seconds: float, failure: str | None) -> None:
        self.dispatch(Declared(seconds) if failure is None else DeclareFailed(failure))

    async def _poll(self) -> None:
        began_at = self._owner.clock()
        try:
            peers = await self._owner.declarations.read(self._key)
        except ShoalError as e:
            self.dispatch(PollFailed(str(e)))
        else:
            self.dispatch(Polled(began_at, peers))

    # ---- this peer asks a leader

    async def _ask(self, ask: int, leader: PeerID, addresses: tuple[str, ...]) -> None:
        host = self._owner.node.host
        try:
            host.add_addresses(leader, [Multiaddr.parse(address) for address in addresses])
            own = self._sign_info(leader)
            async with host.open_stream(leader, JOIN) as stream:
                await stream.send(JoinRequest(self._owner.prefix, own))
                await self._listen_to_leader(ask, stream, own)
        except ShoalError as e:
            self.dispatch(LeaderLost(ask, str(e)))

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
                    members = await _receive_members(stream, size)
                    now = self._owner.clock()
                    group = verify_group(group_id, members, leader=stream.remote, own=own, now=now)
                    self.dispatch(LeaderBegan(ask, group))
                    return
                case other:
                    raise ProtocolViolation(f"{stream.remote} sends its follower a {type(other).__name__}")

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
        except ShoalError as e:
            reason = str(e)
        finally:
            # Also when the asker went away: the host cancels this handler then.
            del self._followers[token]
            self.dispatch(FollowerLost(token, reason))

    def _begin(self, tokens: tuple[int, ...]) -> None:
        leader = self._owner.node.peer_id
        own = self._sign_info(leader)
        followers = [self._followers[token] for token in tokens]
        signed = [own, *(follower.signed for follower in followers)]
        infos = [verify_member(own, now=self._owner.clock()), *(follower.info for follower in followers)]
        group_id = self._owner.rng.randbytes(GROUP_ID_BYTES)
        messages: list[LeaderMessage] = [Begin(group_id, len(signed)), *(Member(member) for member in signed)]
        for follower in followers:
            follower.send(*messages, last=True)
        self._finish(GroupInfo(group_id, self._key, order_members(leader, infos)))


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
