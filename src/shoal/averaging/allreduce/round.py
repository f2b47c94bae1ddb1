"""The shell of one round: it owns the tasks, the timers and the pure core in :mod:`.core`.

:mod:`.streams` moves tensor bytes, :mod:`.commit` reports and decisions.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any

from shoal.averaging.allreduce.assignment import SpanId
from shoal.averaging.allreduce.commit import Commitment, to_event
from shoal.averaging.allreduce.core import AllReduce
from shoal.averaging.allreduce.effects import (
    AnnounceExclusion,
    AnnounceOutcome,
    AnnounceRepair,
    AskForAcceptance,
    AskForOutcome,
    AskForPromise,
    AveragePart,
    DropSender,
    Effect,
    Finish,
    FollowLeader,
    LeadMembers,
    OpenSpans,
    Reply,
    ReturnAverage,
    ReturnReport,
    StopContributing,
    StopLeading,
    TellLeader,
    VoidSpans,
)
from shoal.averaging.allreduce.events import (
    Event,
    JoinTimedOut,
    MemberLeft,
    MemberLost,
    Roles,
    RoundTimeouts,
    SnapshotFailed,
    SnapshotTaken,
    Withdrawn,
)
from shoal.averaging.allreduce.exchange import Arena
from shoal.averaging.allreduce.lateness import Waits
from shoal.averaging.allreduce.messages import Answer, Question, is_weight
from shoal.averaging.allreduce.pace import Wait, find_slowest
from shoal.averaging.allreduce.participants import RoundCore, learn_addresses
from shoal.averaging.allreduce.result import RoundResult, result_of
from shoal.averaging.allreduce.streams import Exchange, describe_failure
from shoal.averaging.group import MAX_WEIGHT, GroupInfo, PeerMode
from shoal.averaging.partition import Partition
from shoal.errors import AllreduceException, InvalidValueError, ShoalError
from shoal.p2p.host import Host
from shoal.p2p.identity import PeerID
from shoal.p2p.protocol.violations import Ending
from shoal.p2p.rpc import Stream
from shoal.sansio.driver import Driver

__all__ = ["Round", "RoundResult", "RoundTimeouts"]

FAREWELL_TIMEOUT = 1.0
"""How long a member that gives up takes to tell the leader."""
DEADLINE_SLACK = 0.01
"""Seconds by which a deadline of the round may be noticed late while parts come and go."""
JOIN_TIMEOUT = 15.0
"""Seconds, from the beginning of the round, within which each member has joined it at the leader; ``sender_timeout``
if that is shorter.
"""


class Round:
    """One round of all-reduce at one member.

    :param take_snapshot: copies the tensors to the arena once all-reduce may begin; awaited once by every member,
      also an auxiliary one, which has nothing to copy. If it raises, this member contributes nothing and its round
      fails, but it serves its span
    :param weight: read once, right after ``take_snapshot`` has returned; ignored for an auxiliary member
    :param timeouts: in seconds; see :class:`RoundTimeouts`
    :param min_size: members that must be left for the round to commit
    :param on_bound: called once, when :meth:`withdraw` has become of no effect in a round that may commit
    """

    def __init__(
        self,
        host: Host,
        prefix: str,
        group: GroupInfo,
        partition: Partition,
        arena: Arena,
        *,
        take_snapshot: Callable[[], Awaitable[None]],
        weight: Callable[[], float],
        timeouts: RoundTimeouts,
        min_size: int = 1,
        on_bound: Callable[[], None] = lambda: None,
    ) -> None:
        self.group = group
        self.core = AllReduce(_roles(group, partition, host.peer_id, min_size), timeouts)
        self._host = host
        self._peers = group.peer_ids
        self._partition = partition
        self._take_snapshot = take_snapshot
        self._weight = weight
        self._timeouts = timeouts
        shared = RoundCore(host, prefix, group.group_id, self._peers, self.core, self._feed)
        self._shared = shared
        self._exchange = Exchange(shared, partition, arena)
        self._commitment = Commitment(shared)
        self._decided = asyncio.Event()
        self._stopped = asyncio.Event()
        self._on_bound = on_bound
        self._is_bound = False
        self._tasks: asyncio.TaskGroup | None = None
        self._following: asyncio.Task[None] | None = None
        self._asking: set[asyncio.Task[None]] = set()
        self._replies: list[Answer] = []
        self._driver: Driver[Event, Effect] = Driver(
            self.core,
            self._carry_out,
            on_turn=self._note_bound,
            slack=DEADLINE_SLACK,
            name="allreduce",
            subject=group.group_id.hex(),
        )
        self._is_broken = False

    @property
    def part_count(self) -> int:
        """Parts of all owners' spans."""
        return len(self._partition.parts)

    @property
    def unreached(self) -> list[PeerID]:
        """Members that this one could not reach, or that could not reach it."""
        return self._shared.unreached()

    @property
    def waits(self) -> Waits:
        """How long this member has waited for others, for deadlines that adapt."""
        return self.core.ledger.waits

    def held_up(self, duration: float) -> tuple[PeerID, Wait] | None:
        """The member that this one has waited for in most of a round of ``duration`` seconds, if there is one."""
        found = find_slowest(self._exchange.waits, duration)
        return None if found is None else (self._peers[found.sender], found.wait)

    async def run(self) -> RoundResult:
        """Take part until the round is decided; never cancel this: :meth:`withdraw`, and wait for the
        decision.
        """
        loop = asyncio.get_running_loop()
        began = loop.time()
        learn_addresses(self._host, self.group)
        unsubscribe = self._host.on_disconnect(self._on_disconnect)
        limit: asyncio.TimerHandle | None = None
        try:
            async with asyncio.TaskGroup() as group:
                self._tasks = group
                self._exchange.begin(group)
                self._following = group.create_task(self._take_part_in_decision())
                await self._snapshot()
                snapshot_at = loop.time()
                if self._timeouts.allreduce is not None:
                    reason = f"all-reduce took longer than allreduce_timeout={self._timeouts.allreduce:g} s"
                    limit = loop.call_later(self._timeouts.allreduce, self.withdraw, reason)
                await self._decided.wait()
                decided_at = loop.time()
                self._exchange.stop_contributing()
                for task in self._asking:
                    task.cancel()
                if not self._commitment.leads:
                    await asyncio.wait([self._following], timeout=FAREWELL_TIMEOUT)
                self._following.cancel()
        except BaseException as e:
            # A bug. The others must not wait for a member that is no more in the round.
            first = e.exceptions[0] if isinstance(e, BaseExceptionGroup) else e
            self.withdraw(f"{type(first).__name__} in the round: {first}")
            raise
        finally:
            self._tasks = None
            unsubscribe()
            self._driver.close()
            if limit is not None:
                limit.cancel()
        return self._result(snapshot_at - began, decided_at - snapshot_at)

    def withdraw(self, reason: str) -> None:
        """Give up, unless this member has already given its word to commit: then the decision is still to
        come.
        """
        self._feed(Withdrawn(reason))

    def leave(self, reason: str) -> None:
        """As :meth:`withdraw`, where this member's vote ends, too."""
        self._feed(Withdrawn(reason, leaves=True))

    def lose_member(self, peer: PeerID, reason: str) -> None:
        """As the leader: ``peer`` left before it heard that the group begins, so that it never joins."""
        if self._commitment.leads:
            self._feed(JoinTimedOut(self._peers.index(peer), reason))

    async def serve_exchange(self, stream: Stream, first: object) -> None:
        """A member opened a stream of :data:`.messages.EXCHANGE`."""
        await self._exchange.serve(stream, first)

    async def serve_commit(self, stream: Stream, first: object) -> None:
        """A member opened a stream of :data:`.messages.COMMIT`."""
        await self._commitment.serve(stream, first)

    def vote(self, question: Question, member: PeerID) -> Answer:
        """What this member answers to another one's question.

        :raises ProtocolViolation: the question is not well-formed, or not a member's
        """
        event = to_event(question, self._peers.index(member))
        if event is None:
            return self.core.answer()
        self._feed(event)
        return self._replies.pop()

    async def _take_part_in_decision(self) -> None:
        if self._commitment.leads:
            await self._expect_members()
        else:
            await self._commitment.follow_leader(0, 0)

    async def _expect_members(self) -> None:
        limit = self._timeouts.sender
        await self._commitment.expect_members(JOIN_TIMEOUT if limit is None else min(limit, JOIN_TIMEOUT))

    def _follow(self, work: Coroutine[Any, Any, None]) -> None:
        """Do this from now on, instead of following, or expecting members, as before."""
        if self._following is not None:
            self._following.cancel()
        if self._tasks is None:
            work.close()
        else:
            self._following = self._tasks.create_task(work)

    async def _snapshot(self) -> None:
        waiting = [
            asyncio.ensure_future(work)
            for work in (self._take_snapshot(), self._decided.wait(), self._stopped.wait())
        ]
        taking = waiting[0]
        try:
            await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
            if taking.done():
                taking.result()
                self._begin_exchange()
        except ShoalError as e:
            self._feed(SnapshotFailed(str(e)))
        except Exception as e:  # noqa: BLE001 - it copies tensors in another process, where CUDA may raise anything
            self._feed(SnapshotFailed(f"the snapshot failed with {type(e).__name__}: {e}"))
        finally:
            for task in waiting:
                task.cancel()
            await asyncio.gather(*waiting, return_exceptions=True)

    def _begin_exchange(self) -> None:
        if self._stopped.is_set():
            return
        weight = self._weight()
        if not is_weight(weight):
            raise InvalidValueError(f"weight must be 0 to {MAX_WEIGHT:g}, got {weight}")
        self._exchange.contribute(weight)
        self._feed(SnapshotTaken(weight))

    def _result(self, snapshot_seconds: float, allreduce_seconds: float) -> RoundResult:
        return result_of(
            self.core,
            self._partition.layout.numel,
            bytes_sent=self._exchange.bytes_sent,
            bytes_received=self._exchange.bytes_received,
            snapshot_seconds=snapshot_seconds,
            allreduce_seconds=allreduce_seconds,
        )

    # core

    def _feed(self, event: Event) -> None:
        self._driver.tell(event)

    def _note_bound(self) -> None:
        if self.core.is_bound and not self._is_bound:
            self._is_bound = True
            self._on_bound()

    def _carry_out(self, effect: Effect) -> None:
        match effect:
            case (
                AveragePart()
                | ReturnAverage()
                | ReturnReport()
                | DropSender()
                | StopContributing()
                | VoidSpans()
                | OpenSpans()
            ):
                self._carry_on_exchange(effect)
            case AskForOutcome() | AskForPromise() | AskForAcceptance():
                self._ask(effect)
            case TellLeader(report):
                self._commitment.report(report)
            case FollowLeader(leader, term):
                self._commitment.follow_anew()
                self._follow(self._commitment.follow_leader(leader, term))
            case LeadMembers():
                self._follow(self._expect_members())
            case StopLeading(heir):
                self._commitment.stop_leading(heir)
            case AnnounceExclusion(word) | AnnounceRepair(word) | AnnounceOutcome(word):
                self._commitment.announce(word)
            case Reply(answer):
                self._replies.append(answer)
            case Finish(reason):
                self._decided.set()
                self._commitment.close()
                if self.core.outcome is None:
                    self._commitment.stop_leading()
                self._exchange.close(reason)

    def _carry_on_exchange(
        self,
        effect: AveragePart
        | ReturnAverage
        | ReturnReport
        | DropSender
        | StopContributing
        | VoidSpans
        | OpenSpans,
    ) -> None:
        match effect:
            case AveragePart(span, index):
                self._average(span, index)
            case ReturnAverage(span, index):
                self._exchange.release(span, index + 1)
            case ReturnReport(report):
                self._exchange.report(report)
            case DropSender(span, sender, reason, is_silent):
                self._exchange.drop(span, sender, reason, is_silent=is_silent)
            case StopContributing():
                self._stopped.set()
                self._exchange.stop_contributing()
            case VoidSpans(void):
                self._exchange.void(void)
            case OpenSpans(opened):
                self._exchange.open(opened)

    def _average(self, span: SpanId, index: int) -> None:
        if self._is_broken:
            return  # an earlier part of the same batch could not be averaged
        try:
            self._exchange.average(span, index)
        except Exception as e:  # noqa: BLE001 - memory may be short, a codec is the user's: whose part came last is not to blame
            self._is_broken = True
            self._feed(Withdrawn(describe_failure(e)))

    def _ask(self, effect: AskForOutcome | AskForPromise | AskForAcceptance) -> None:
        if self._tasks is None:
            return
        for member in effect.members:
            task = self._tasks.create_task(self._question(effect, member))
            self._asking.add(task)
            task.add_done_callback(self._asking.discard)

    def _question(
        self, effect: AskForOutcome | AskForPromise | AskForAcceptance, member: int
    ) -> Coroutine[Any, Any, None]:
        ask = self._commitment
        match effect:
            case AskForOutcome(_, delay, burials):
                return ask.ask_for_outcome(member, delay, burials)
            case AskForPromise(_, term, delay, burials, floor):
                return ask.ask_for_promise(member, term, delay, burials, floor)
            case AskForAcceptance(_, term, outcome, delay):
                return ask.ask_for_acceptance(member, term, outcome, delay)

    def _on_disconnect(self, peer: PeerID, ending: Ending) -> None:
        # Other connections than the leader's come and go as the DHT needs them; a stream that ends with one says so.
        if ending.peer_has_left and peer in self._peers:
            self._feed(MemberLeft(self._peers.index(peer)))
        if self._commitment.leads and peer in self._peers:
            self._feed(MemberLost(self._peers.index(peer), ending.reason))


def _roles(group: GroupInfo, partition: Partition, peer_id: PeerID, min_size: int) -> Roles:
    peers = group.peer_ids
    if peer_id not in peers:
        raise AllreduceException(f"{peer_id} is no member of its own group")
    return Roles(
        me=peers.index(peer_id),
        parts_owned=tuple(len(partition.parts_of(member)) for member in range(len(peers))),
        contributes=tuple(member.mode is not PeerMode.AUXILIARY for member in group.members),
        names=tuple(str(peer) for peer in peers),
        can_serve=tuple(member.mode.can_lead for member in group.members),
        min_size=min_size,
    )
