"""The shell of one round: streams to and from the other members, around the pure core in :mod:`.allreduce`."""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from shoal.averaging.allreduce import (
    DECIDED,
    AllReduce,
    AnnounceOutcome,
    AskForOutcome,
    AveragePart,
    AverageReceived,
    Effect,
    Event,
    Finish,
    MemberLost,
    MemberReported,
    OutcomeAnswered,
    OutcomeReceived,
    PartAveraged,
    PartDelivered,
    Phase,
    ReportToLeader,
    ReturnAverage,
    Roles,
    SnapshotTaken,
    Withdrawn,
)
from shoal.averaging.exchange import HELD_BYTES, Arena, ForeignSpan, NotFiniteError, OwnSpan
from shoal.averaging.group import GroupInfo, PeerMode
from shoal.averaging.partition import Partition
from shoal.averaging.round_messages import (
    COMMIT,
    EXCHANGE,
    MAX_REASON_CHARS,
    OUTCOME,
    AskOutcome,
    Contribute,
    JoinRound,
    MemberReport,
    Outcome,
    OutcomeAnswer,
    ReadyForParts,
    phase_of,
)
from shoal.errors import AllreduceException, ConnectionLost, ProtocolViolation, RemoteError, ShoalError
from shoal.p2p.host import Host
from shoal.p2p.identity import PeerID
from shoal.p2p.rpc import Lane, Payload, Stream

logger = logging.getLogger(__name__)

WINDOW_BYTES = 4 << 20
"""Credit of each stream of parts or averages; at least two parts, whatever their size."""
ASK_TIMEOUT = 5.0
ASK_AGAIN_AFTER = 0.25
FAREWELL_TIMEOUT = 1.0
"""How long a member that gives up takes to tell the leader."""
JOIN_TIMEOUT = 15.0
"""Seconds, from the beginning of the round, within which each member has joined it at the leader."""


@dataclass(frozen=True)
class RoundResult:
    """How a round ended for this member. ``failure`` None: committed, and the arena holds the average."""

    failure: str | None
    bytes_sent: int
    bytes_received: int
    snapshot_seconds: float
    allreduce_seconds: float


class Round:
    """One round of all-reduce at one member.

    :param take_snapshot: copies the tensors to the arena once all-reduce may begin; whatever it raises fails the
      round for everybody
    :param timeout: seconds for the exchange, from the snapshot on; None: no limit
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
        timeout: float | None,
    ) -> None:
        self.group = group
        self.core = AllReduce(_roles(group, partition, host.peer_id))
        self._host = host
        self._prefix = prefix
        self._peers = group.peer_ids
        self._partition = partition
        self._arena = arena
        self._take_snapshot = take_snapshot
        self._timeout = timeout
        roles = self.core.roles
        weights = {i: member.weight for i, member in enumerate(group.members) if roles.contributes[i]}
        self._own = OwnSpan(partition, roles.me, arena, weights)
        self.weight = sum(weights.values())
        self._exchanging: set[int] = set()
        self._joined: set[int] = {roles.leader}
        self._averaged = 0
        self._returned: dict[int, int] = {}
        largest = max((part.nbytes for part in self._own.parts), default=1)
        self._max_held = max(2, HELD_BYTES // largest)
        self._progress = asyncio.Event()
        self._snapshot_taken = asyncio.Event()
        self._decided = asyncio.Event()
        self._announced = asyncio.Event()
        self._report: asyncio.Future[str | None] = asyncio.get_running_loop().create_future()
        self._tasks: asyncio.TaskGroup | None = None
        self._asking: set[asyncio.Task[None]] = set()
        self._bytes_sent = self._bytes_received = 0

    @property
    def part_count(self) -> int:
        """Parts of all owners' spans."""
        return len(self._partition.parts)

    async def run(self) -> RoundResult:
        """Take part until the round is decided; never cancel this: :meth:`withdraw`, and wait for the
        decision.
        """
        loop = asyncio.get_running_loop()
        roles = self.core.roles
        began = loop.time()
        unsubscribe = self._host.on_disconnect(self._on_disconnect)
        timer: asyncio.TimerHandle | None = None
        try:
            async with asyncio.TaskGroup() as group:
                self._tasks = group
                tasks = [group.create_task(self._exchange_with(owner)) for owner in self._other_owners()]
                if roles.me != roles.leader:
                    farewell = group.create_task(self._follow_leader())
                else:
                    tasks.append(group.create_task(self._expect_members()))
                await self._snapshot()
                snapshot_at = loop.time()
                if self._timeout is not None:
                    reason = f"all-reduce took longer than allreduce_timeout={self._timeout:g} s"
                    timer = loop.call_later(self._timeout, self.withdraw, reason)
                await self._decided.wait()
                decided_at = loop.time()
                for task in (*tasks, *self._asking):
                    task.cancel()
                if roles.me != roles.leader:
                    await asyncio.wait([farewell], timeout=FAREWELL_TIMEOUT)
                    farewell.cancel()
        except BaseException as e:
            # A bug. The others must not wait for a member that is no more in the round.
            first = e.exceptions[0] if isinstance(e, BaseExceptionGroup) else e
            self.withdraw(f"{type(first).__name__} in the round: {first}")
            raise
        finally:
            self._tasks = None
            unsubscribe()
            if timer is not None:
                timer.cancel()
        return RoundResult(
            self.core.failure,
            self._bytes_sent,
            self._bytes_received,
            snapshot_at - began,
            decided_at - snapshot_at,
        )

    def withdraw(self, reason: str) -> None:
        """Give up, unless this member has already given its word to commit: then the decision is still to
        come.
        """
        self._feed(Withdrawn(reason))

    async def _snapshot(self) -> None:
        taking = asyncio.ensure_future(self._take_snapshot())
        deciding = asyncio.ensure_future(self._decided.wait())
        try:
            await asyncio.wait({taking, deciding}, return_when=asyncio.FIRST_COMPLETED)
            if taking.done():
                taking.result()
                self._snapshot_taken.set()
                self._feed(SnapshotTaken())
        except ShoalError as e:
            self.withdraw(str(e))
        except Exception as e:  # noqa: BLE001 - it copies tensors in another process, where CUDA may raise anything
            self.withdraw(f"the snapshot failed with {type(e).__name__}: {e}")
        finally:
            deciding.cancel()
            taking.cancel()
            await asyncio.wait({taking, deciding})

    # core

    def _feed(self, event: Event) -> None:
        pending = deque([event])
        while pending:
            for effect in self.core.handle(pending.popleft()):
                pending.extend(self._carry_out(effect))

    def _feed_from(self, member: int, event: Event) -> None:
        """As :meth:`_feed`, for an event that ``member`` caused: if it broke the protocol, it is lost to the
        round.
        """
        try:
            self._feed(event)
        except ProtocolViolation as e:
            self._feed(MemberLost(member, f"it broke the protocol: {e}"))
            raise

    def _carry_out(self, effect: Effect) -> list[Event]:
        match effect:
            case AveragePart(index):
                return self._average(index)
            case ReturnAverage(index):
                self._averaged = index + 1
                self._wake()
            case ReportToLeader(reason):
                if not self._report.done():
                    self._report.set_result(reason)
            case AnnounceOutcome():
                self._announced.set()
            case AskForOutcome(members):
                if self._tasks is not None:
                    for member in members:
                        task = self._tasks.create_task(self._ask_for_outcome(member))
                        self._asking.add(task)
                        task.add_done_callback(self._asking.discard)
            case Finish():
                self._decided.set()
                self._wake()
        return []

    def _average(self, index: int) -> list[Event]:
        try:
            self._own.average(index)
        except NotFiniteError as e:
            return [Withdrawn(f"{self.core.roles.name(e.member)} {e}")]
        except AllreduceException as e:
            return [Withdrawn(str(e))]
        return [PartAveraged(index)]

    def _wake(self) -> None:
        """Let everybody look again who waits for parts to be averaged."""
        self._progress.set()
        self._progress = asyncio.Event()

    def _on_disconnect(self, peer: PeerID, reason: str) -> None:
        if peer in self._peers and self._deals_with(self._peers.index(peer)):
            self._feed(MemberLost(self._peers.index(peer), reason))

    def _deals_with(self, member: int) -> bool:
        """Whether this round has a stream to ``member``: other connections come and go as the DHT needs them."""
        roles = self.core.roles
        pair = (roles.me, member)
        return roles.leader in pair or any(roles.parts_owned[one] for one in pair)

    # data: to owners

    def _other_owners(self) -> list[int]:
        roles = self.core.roles
        return [owner for owner in roles.others if roles.parts_owned[owner] and roles.contributes[roles.me]]

    def _window(self) -> int:
        return max(WINDOW_BYTES, 2 * max((part.nbytes for part in self._partition.parts), default=0))

    async def _exchange_with(self, owner: int) -> None:
        """Send an owner this member's parts of its span and receive their averages."""
        span = ForeignSpan(self._partition, owner, self._arena)
        try:
            async with self._host.open_stream(self._peers[owner], EXCHANGE, lane=Lane.BULK) as stream:
                await stream.send(Contribute(self._prefix, self.group.group_id))
                if not isinstance(await stream.receive(), ReadyForParts):
                    raise ProtocolViolation("sent a payload before it was ready for parts")
                stream.accept_payloads(span.receive_into, self._window())
                await self._snapshot_taken.wait()
                sending = asyncio.ensure_future(self._send_parts(stream, span))
                try:
                    await self._receive_averages(stream, span, owner)
                    await sending
                finally:
                    sending.cancel()
                    await asyncio.wait({sending})
        except (ShoalError, EOFError) as e:
            self._feed(MemberLost(owner, str(e)))

    async def _send_parts(self, stream: Stream, span: ForeignSpan) -> None:
        for index in range(len(span.parts)):
            await stream.send_payload(index, span.to_send(index))
            self._bytes_sent += span.parts[index].nbytes
        await stream.finish()

    async def _receive_averages(self, stream: Stream, span: ForeignSpan, owner: int) -> None:
        for index in range(len(span.parts)):
            payload = await stream.receive()
            if not isinstance(payload, Payload):
                raise ProtocolViolation("sent a message instead of an average")
            span.deliver(index, payload.data)
            self._bytes_received += len(payload.data)
            self._feed_from(owner, AverageReceived(owner, index))

    # data: as an owner

    async def serve_exchange(self, stream: Stream, first: Contribute) -> None:
        """Receive a member's parts of this member's span and return the averages."""
        member = self._member(stream)
        if not self.core.roles.contributes[member] or member in self._exchanging:
            raise ProtocolViolation(f"{stream.remote} opened an exchange that it has no part in")
        self._exchanging.add(member)
        reason = "it ended the exchange"
        try:
            stream.accept_payloads(
                lambda tag, length: self._own.receive_into(member, tag, length), self._window()
            )
            await stream.send(ReadyForParts())
            async with asyncio.TaskGroup() as group:
                group.create_task(self._receive_parts(stream, member))
                group.create_task(self._return_averages(stream, member))
        except* ShoalError as errors:
            reason = str(errors.exceptions[0])
            raise errors.exceptions[0] from None
        finally:
            if self._averaged < len(self._own.parts) and self.core.phase not in DECIDED:
                self._feed(MemberLost(member, reason))

    async def _receive_parts(self, stream: Stream, member: int) -> None:
        for index in range(len(self._own.parts)):
            while self._is_ahead(member, index) and self.core.phase not in DECIDED:
                await self._progress.wait()
            payload = await stream.receive()
            if not isinstance(payload, Payload):
                raise ProtocolViolation(f"{stream.remote} sent a message instead of a part")
            self._bytes_received += len(payload.data)
            self._own.deliver(member, index, payload.data)
            self._feed_from(member, PartDelivered(member, index))

    async def _return_averages(self, stream: Stream, member: int) -> None:
        for index in range(len(self._own.parts)):
            while self._averaged <= index:
                if self.core.phase in DECIDED:
                    raise RemoteError("round_failed", self.core.failure or "the round is over")
                await self._progress.wait()
            data = self._own.to_return(member, index)
            await stream.send_payload(index, data)
            self._bytes_sent += self._own.parts[index].nbytes
            self._returned[member] = index + 1
            self._wake()

    def _is_ahead(self, member: int, index: int) -> bool:
        """Whether a member's next part would take more memory than it may: for parts that wait for slower senders,
        and, under a lossy codec, for answers that the member has not taken yet.
        """
        settled = min(self._averaged, self._returned.get(member, 0))
        return index - settled > self._max_held

    def _member(self, stream: Stream) -> int:
        if stream.remote not in self._peers:
            raise RemoteError("not_a_member", f"{stream.remote} is no member of this group")
        return self._peers.index(stream.remote)

    # commit

    async def _follow_leader(self) -> None:
        """Report to the leader, and learn its decision."""
        leader = self.core.roles.leader
        try:
            async with self._host.open_stream(self._peers[leader], COMMIT) as stream:
                await stream.send(JoinRound(self._prefix, self.group.group_id))
                outcome = asyncio.ensure_future(stream.receive())
                try:
                    await asyncio.wait({outcome, self._report}, return_when=asyncio.FIRST_COMPLETED)
                    if not outcome.done():
                        reason = self._report.result()
                        await stream.send(MemberReport(reason and reason[:MAX_REASON_CHARS]))
                    self._feed_from(leader, OutcomeReceived((await outcome).reason))
                finally:
                    outcome.cancel()
                    await asyncio.wait({outcome})
        except (ShoalError, EOFError) as e:
            self._feed(MemberLost(leader, str(e)))

    async def _expect_members(self) -> None:
        """As the leader: who does not join has left before it learned of the group, and nobody else may notice:
        members that own nothing are not dialed.
        """
        await asyncio.sleep(JOIN_TIMEOUT)
        for member in self.core.roles.others:
            if member not in self._joined:
                self._feed(MemberLost(member, f"it did not join the round within {JOIN_TIMEOUT:g} s"))

    async def serve_commit(self, stream: Stream, first: JoinRound) -> None:
        """As the leader: take a member's report, and tell it the decision."""
        member = self._member(stream)
        if self.core.roles.me != self.core.roles.leader:
            raise ProtocolViolation(f"{stream.remote} reports to a member that does not lead")
        self._joined.add(member)
        report = asyncio.ensure_future(stream.receive())
        announced = asyncio.ensure_future(self._announced.wait())
        reported = False
        try:
            await asyncio.wait({report, announced}, return_when=asyncio.FIRST_COMPLETED)
            if report.done():
                message = report.result()
                if not isinstance(message, MemberReport):
                    raise ProtocolViolation(f"{stream.remote} sent no report")
                reported = True
                self._feed_from(member, MemberReported(member, message.reason))
            await announced
            await stream.send(Outcome(self.core.failure and self.core.failure[:MAX_REASON_CHARS]))
        except (ConnectionLost, RemoteError) as e:
            self._feed(MemberLost(member, str(e)))
        finally:
            report.cancel()
            announced.cancel()
            await asyncio.wait({report, announced})
            if not reported:
                self._feed(MemberLost(member, "it ended the round"))

    async def _ask_for_outcome(self, member: int) -> None:
        phase, reason = None, ""
        try:
            async with self._host.open_stream(self._peers[member], OUTCOME, timeout=ASK_TIMEOUT) as stream:
                await stream.send(AskOutcome(self._prefix, self.group.group_id))
                answer = await stream.receive()
                phase, reason = phase_of(answer), answer.reason
        except (ShoalError, EOFError) as e:
            logger.debug("%s does not say how the round ended: %s", self.core.roles.name(member), e)
        if phase in (Phase.EXCHANGING, Phase.READY):
            await asyncio.sleep(ASK_AGAIN_AFTER)
        self._feed(OutcomeAnswered(member, phase, reason))


def answer_outcome(core: AllReduce) -> OutcomeAnswer:
    """What a member answers to an orphan."""
    return OutcomeAnswer(core.phase.name, (core.failure or "")[:MAX_REASON_CHARS])


def _roles(group: GroupInfo, partition: Partition, peer_id: PeerID) -> Roles:
    peers = group.peer_ids
    if peer_id not in peers:
        raise AllreduceException(f"{peer_id} is no member of its own group")
    return Roles(
        me=peers.index(peer_id),
        parts_owned=tuple(len(partition.parts_of(member)) for member in range(len(peers))),
        contributes=tuple(member.mode is not PeerMode.AUXILIARY for member in group.members),
        names=tuple(str(peer) for peer in peers),
    )
