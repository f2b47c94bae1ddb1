"""One search for a group: the asyncio shell of a :class:`.SearchCore`. Turns effects into I/O, and I/O into events.

It owns the core and its driver, what is asked of the DHT, the leaders that it asks, and its followers.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Sequence

from shoal.averaging.group import GroupInfo, MemberInfo, SignedMemberInfo
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
    DistrustLeader,
    Effect,
    Event,
    FinishWithGroup,
    FinishWithout,
    LeaveLeader,
    Log,
    MissedRounds,
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
    TooMany,
)
from shoal.averaging.matchmaking.followers import Followers, WhenMemberGone
from shoal.averaging.matchmaking.leaders import AskedLeaders
from shoal.averaging.matchmaking.memory import Fault
from shoal.averaging.matchmaking.messages import MAX_DECLARED_MEMBERS
from shoal.averaging.matchmaking.missed import Missed
from shoal.averaging.matchmaking.peer import LocalPeer
from shoal.averaging.matchmaking.story import SearchStory
from shoal.averaging.matchmaking.view import Known
from shoal.errors import MatchmakingException, ShoalError
from shoal.p2p.identity import PeerID
from shoal.p2p.rpc import Stream
from shoal.sansio.driver import Driver

logger = logging.getLogger(__name__)

ASK_ALL_EVERY = 4
"""In a grid most polls ask one of the nodes that keep a group's record, the nearest: all have the same, and each would
send it. One that has just come may lack some of it, so every so many polls ask them all."""


class Search:
    """One search. Its core may only be touched through :meth:`tell`."""

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
        when_too_many: Callable[[int, int], None],
        when_missed: Callable[[Missed], None],
        when_mode_changed: Callable[[], None],
        when_leader_failed: Callable[[PeerID, Fault], None],
        is_first: bool = False,
        last_group: Sequence[PeerID] = (),
    ) -> None:
        """
        :param when_too_few: called with the number of peers seen when the start time came without enough members
        :param when_too_many: called with the number of peers that are about to make a grid, and this one's rank in
            their order
        :param when_missed: called when those that were dealt to this peer's key have gone on without it
        :param when_mode_changed: called when this peer's mode is another one than it declared
        :param when_leader_failed: called with a leader that this peer could not rely on, and why
        :param is_first: of its averager
        :param last_group: with whom this peer was before; those to whom a connection stands are likely to come back
        """
        self.place = place
        self.now = peer.clock.frozen()
        """DHT time as it was when the search began: if the peer's clock is moved meanwhile, no wait changes."""
        self._deadline = deadline
        self._peer = peer
        self._gather = gather
        self._weight = weight
        self._when_too_few = when_too_few
        self._when_too_many = when_too_many
        self._when_missed = when_missed
        self._polls = 0
        self._when_mode_changed = when_mode_changed
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
            swarm_round=place.grid.round,
            expects=place.expects,
            may_spread=place.may_spread,
            known=known,
            expected=[member for member in last_group if peer.node.host.is_connected(member)],
            is_first=is_first,
        )
        self._loop = asyncio.get_running_loop()
        self._result: asyncio.Future[GroupInfo] = self._loop.create_future()
        self._driver: Driver[Event, Effect] = Driver(
            self._core, self._carry_out, clock=self.now, name="matchmaking", subject=peer.prefix
        )
        self._when_leader_failed = when_leader_failed
        self._leaders = AskedLeaders(self, peer, self._leader_unreachable)
        self._followers = Followers(peer, self.tell)

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

    def soon(self, seconds: float) -> float:
        """A start time in so many seconds, but well before the deadline."""
        now = self.now()
        return now + (seconds if self._deadline is None else min(seconds, max(0.0, self._deadline - now) / 2))

    def move_to(self, place: Place) -> None:
        """Begin anew at another place, in this peer's mode of now, unless the search is over."""
        if not self.is_over:
            self._mode = self._peer.mode
            self.tell(Restarted(place, self._mode))

    def watch_members(self, when_gone: WhenMemberGone) -> None:
        """Call ``when_gone`` for each member of the group that this peer leads that left before it heard of it."""
        self._followers.watch(when_gone)

    def _leader_unreachable(self, leader: PeerID) -> None:
        self._when_leader_failed(leader, Fault.UNREACHED)

    async def attend(self, stream: Stream, signed: SignedMemberInfo, info: MemberInfo) -> None:
        """Answer another peer's request to be led by this one, and hear it out to its end."""
        await self._followers.attend(stream, signed, info)

    async def run(self) -> GroupInfo:
        """Cancelled in the very moment when the group is complete, it returns the group, and the task is cancelled at
        its next wait: the others count on this member, and only its round can tell them that it leaves.

        :raises MatchmakingException:
        """
        self.tell(SearchStarted())
        unsubscribe = self._peer.node.host.on_disconnect(lambda peer, _: self.tell(PeerGone(peer)))
        try:
            return await self._result
        except asyncio.CancelledError:
            if self._found_group:
                _cancel_later()
                return self._result.result()
            self.tell(Cancelled())
            if self._result.done() and not self._result.cancelled():
                self._result.exception()  # nobody is there to see it
            raise
        finally:
            unsubscribe()

    def tell(self, event: Event) -> None:
        """Let the core take in ``event``, and carry out what it asks for."""
        try:
            self._driver.tell(event)
        except Exception as e:
            # A bug: the step that waits for the group must not wait for ever.
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
            case AskToJoin():
                self._leaders.ask(effect)
            case LeaveLeader():
                self._leaders.leave(effect)
            case DistrustLeader(leader, fault):
                if fault is Fault.UNANSWERED:
                    self._leaders.look_for_route(leader)
                # Not at once: its answer may be to move, which is another event.
                self._loop.call_soon(self._when_leader_failed, leader, fault)
            case AnswerRequest() | PostponeFollower() | DismissFollower():
                self._followers.send(effect)
            case BeginGroup():
                own = self.sign_info(self._peer.peer_id)
                group = self._followers.form_group(self.place.key, effect, own)
                self._finish(FinishWithGroup(group))
            case Log() | TooFew() | TooMany() | MissedRounds() | AskSchema():
                self._report(effect)
            case FinishWithGroup() | FinishWithout():
                self._finish(effect)

    def sign_info(self, leader: PeerID) -> SignedMemberInfo:
        """What this peer says of itself to ``leader``."""
        return self._peer.sign_info(leader, self.place, self._gather, self._weight)

    def _report(self, effect: Log | TooFew | TooMany | MissedRounds | AskSchema) -> None:
        match effect:
            case Log(text, is_warning, tells_how_to_join):
                more = f". {self._peer.how_to_join()}" if tells_how_to_join else ""
                logger.log(logging.WARNING if is_warning else logging.INFO, "%s%s", text, more)
            case TooFew(seen):
                # Not at once: its answer may be to move, which is another event.
                self._loop.call_soon(self._when_too_few, seen)
            case TooMany(seen, rank):
                self._loop.call_soon(self._when_too_many, seen, rank)
            case MissedRounds(missed):
                self._loop.call_soon(self._when_missed, missed)
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
        self.tell(Declared(seconds) if failure is None else DeclareFailed(failure))

    async def _poll(self) -> None:
        began_at, place = self.now(), self.place
        self._polls += 1
        replicas = 1 if place.expects and self._polls % ASK_ALL_EVERY else None
        answered_at: list[float] = []
        result: Polled | PollFailed
        try:
            declared = await self._peer.declarations.read(
                place.key, replicas=replicas, when_answered=lambda: answered_at.append(self.now())
            )
            result = Polled(began_at, declared, answered_at[0] - began_at if answered_at else None)
            self._peer.look_at(declared)
        except ShoalError as e:
            result = PollFailed(str(e))
        if self._mode is not self._peer.mode and not self.is_over:
            self._when_mode_changed()
        if (
            place is self.place
        ):  # else it moved meanwhile: what is under the old key says nothing of the new one
            self.tell(result)

    async def _compare(self, peer: PeerID, addresses: tuple[str, ...], schema_hash: bytes) -> None:
        difference = await self._peer.others.compare(peer, addresses, schema_hash)
        self.tell(SchemaCompared(peer, difference))


def _cancel_later() -> None:
    """The cancellation of this task, which was caught, comes again when it next waits."""
    task = asyncio.current_task()
    assert task is not None
    task.uncancel()
    task.cancel()
