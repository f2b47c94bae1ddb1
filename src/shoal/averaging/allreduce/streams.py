"""The streams of one round that carry tensor bytes: one for each span and member, between the member and the span's
owner.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from functools import partial

from shoal.averaging.allreduce.assignment import Span, SpanId
from shoal.averaging.allreduce.events import (
    AverageReceived,
    ExchangeOpened,
    ExcludedByOwner,
    OwnerLost,
    PartAveraged,
    PartDelivered,
    PartSent,
    SenderAwaited,
    SenderHeld,
    SenderLost,
    SpanReceived,
    WeightDeclared,
    Withdrawn,
)
from shoal.averaging.allreduce.exchange import (
    HELD_BYTES,
    Arena,
    ForeignSpan,
    NotFiniteError,
    OwnSpan,
)
from shoal.averaging.allreduce.message_checks import check_span_averaged, check_span_id
from shoal.averaging.allreduce.messages import (
    EXCHANGE,
    Contribute,
    DeclareWeight,
    Loss,
    ReadyForParts,
    SpanAveraged,
)
from shoal.averaging.allreduce.pace import Wait
from shoal.averaging.allreduce.participants import RoundCore
from shoal.averaging.codes import AveragingCode
from shoal.averaging.flow_window import FlowWindow, first_size
from shoal.averaging.formats import Bytes
from shoal.averaging.partition import Partition
from shoal.errors import AllreduceException, PeerUnreachable, ProtocolViolation, RemoteError, ShoalError
from shoal.p2p.protocol.codes import ResetCode
from shoal.p2p.rpc import Lane, Payload, Stream

logger = logging.getLogger(__name__)

WINDOW_BYTES = 4 << 20
"""Credit of each stream of parts or averages at least; and two parts, whatever their size. More on a long path."""
MAX_WINDOW_BYTES = 64 << 20
"""The same at most, where the path holds as much: 1 Gbit/s with a round trip of 200 ms needs 50 MB."""
ORDER_TIMEOUT = 10.0
"""Seconds for which a stream of a repaired span may be ahead of the leader's order to repair it."""


class Serving:
    """An own span, and the streams of the members that contribute to it."""

    def __init__(self, span: Span, own: OwnSpan) -> None:
        self.span = span
        self.own = own
        self.averaged = 0
        self.report: SpanAveraged | None = None
        """What is said of the span after its last average."""
        self.begun: set[int] = set()
        """Members that have opened a stream; nobody does so twice."""
        self.streams: dict[int, Stream] = {}
        """Those that are open."""
        self.returned: dict[int, int] = {}
        """Averages that each member has been sent; the report counts as one more."""
        largest = max((part.nbytes for part in own.parts), default=1)
        self.max_held = max(2, HELD_BYTES // largest)

    def is_done(self, member: int) -> bool:
        """Whether a member was sent everything."""
        return self.returned.get(member, 0) > len(self.own.parts)

    def is_ahead(self, member: int, index: int) -> bool:
        """Whether a member's next part would take more memory than it may: for parts that wait for slower senders,
        and, under a lossy codec, for answers that the member has not taken yet.
        """
        settled = min(self.averaged, self.returned.get(member, 0))
        return index - settled > self.max_held


class Exchange:
    """Moves the parts and averages of one member: :meth:`open` spans, :meth:`serve` a sender."""

    def __init__(self, shared: RoundCore, partition: Partition, arena: Arena) -> None:
        self._shared = shared
        self._core = shared.core
        self._partition = partition
        self._arena = arena
        self.bytes_sent = self.bytes_received = 0
        self.waits: dict[int, Wait] = {}
        """For each sender that has begun: what came of it, and how long this owner waited for it."""
        self._weight: asyncio.Future[float] = asyncio.get_running_loop().create_future()
        self._own_weight: float | None = None
        self._serving: dict[SpanId, Serving] = {}
        self._taking: dict[SpanId, Stream] = {}
        """Streams to the owners of other spans, whose payloads are written to the arena."""
        self._contributing: dict[SpanId, asyncio.Task[None]] = {}
        self._tasks: asyncio.TaskGroup | None = None
        self._is_contributing = self._core.roles.contributes[self._core.roles.me]
        self._progress = asyncio.Event()
        self._held = 0
        """Senders of which nothing is taken for now. Only they look again when an average has been returned."""
        self._serve_own(self._core.ledger.assignment.spans)  # others' streams may come before this round runs

    # from the round

    def begin(self, tasks: asyncio.TaskGroup) -> None:
        """Contribute to the spans of the first assignment; ``tasks`` owns the streams to owners."""
        self._tasks = tasks
        self._contribute_to(self._core.ledger.assignment.spans)

    def contribute(self, weight: float) -> None:
        """The snapshot is taken: parts may be sent, and averaged, from now on."""
        if self._core.roles.contributes[self._core.roles.me]:
            self._own_weight = weight
            for serving in self._serving.values():
                serving.own.set_weight(self._core.roles.me, weight)
        self._weight.set_result(weight)

    def open(self, spans: tuple[Span, ...]) -> None:
        """Serve those of these spans that are the own ones, and contribute to the others."""
        self._serve_own(spans)
        self._contribute_to(spans)
        self.wake()

    def _serve_own(self, spans: tuple[Span, ...]) -> None:
        me = self._core.roles.me
        known = {} if self._own_weight is None else {me: self._own_weight}
        for span in spans:
            if span.owner == me:
                own = OwnSpan(self._partition, span, me, self._arena, known)
                self._serving[span.id] = Serving(span, own)

    def _contribute_to(self, spans: tuple[Span, ...]) -> None:
        if not self._is_contributing or self._tasks is None:
            return
        for span in spans:
            if span.owner != self._core.roles.me:
                self._contributing[span.id] = self._tasks.create_task(self._run_with_owner(span))

    def void(self, spans: tuple[SpanId, ...]) -> None:
        """These spans count no more. Nothing of them is written to the arena from now on."""
        for span in spans:
            stream, task = self._taking.pop(span, None), self._contributing.pop(span, None)
            if stream is not None:
                stream.reset(AveragingCode.VOID, "the span was assigned anew")
            if task is not None:
                task.cancel()
            serving = self._serving.pop(span, None)
            if serving is not None:
                for sender in serving.streams.values():
                    sender.reset(AveragingCode.VOID, "the span was assigned anew")
                serving.own.clear()
        self.wake()

    def average(self, span: SpanId, index: int) -> None:
        """Average a part of an own span, and feed the core what came of it.

        :raises Exception: it cannot be averaged
        """
        serving = self._serving.get(span)
        if serving is None:
            return
        own = serving.own
        offences = own.average(index)
        measured = own.spread() if index == len(own.parts) - 1 else (None, None)
        for member, (reason, kept) in offences.items():
            self._shared.feed(SenderLost(span, member, reason, Loss.INVALID, kept))
        self._shared.feed(PartAveraged(span, index, *measured))

    def release(self, span: SpanId, averaged: int) -> None:
        """So many parts of an own span have been averaged: they may be returned."""
        if span in self._serving:
            self._serving[span].averaged = averaged
            self.wake()

    def report(self, report: SpanAveraged) -> None:
        """After the last average of an own span, tell every member what it is made of."""
        if report.span in self._serving:
            self._serving[report.span].report = report
            self.wake()

    def wake(self) -> None:
        """Let everybody look again who waits for parts to be averaged."""
        self._progress.set()
        self._progress = asyncio.Event()

    def stop_contributing(self) -> None:
        """Send no more parts, and take no more averages."""
        self._is_contributing = False
        for task in self._contributing.values():
            task.cancel()

    def close(self, failure: str | None) -> None:
        """The round is decided: a member that has not got its averages gets none any more. A peer that neither takes
        them nor leaves would keep the round in memory otherwise, and the arena, of which pieces may be sent again.
        """
        for serving in self._serving.values():
            for member, stream in serving.streams.items():
                if not (serving.is_done(member) and stream.is_delivered):
                    stream.reset(AveragingCode.ROUND_FAILED, failure or "the round is over")
            serving.own.clear()
        self.wake()

    def drop(self, span: SpanId, sender: int, reason: str, *, is_silent: bool = False) -> None:
        """Take nothing more from a sender, and tell it so."""
        serving = self._serving.get(span)
        stream = None if serving is None else serving.streams.get(sender)
        if stream is not None:
            stream.reset(AveragingCode.EXCLUDED, reason)
        elif is_silent and (serving is None or sender not in serving.begun):
            self._shared.note_silence(sender)

    def _window(self) -> int:
        return max(WINDOW_BYTES, 2 * max((part.nbytes for part in self._partition.parts), default=0))

    def _accept(self, stream: Stream, sink: Callable[[int, int], memoryview]) -> Callable[[int], None]:
        """Let payloads pass. What is returned is to be called with the bytes of each that was taken: it fits the window
        to the path.
        """
        host, loop, least = self._shared.host, asyncio.get_running_loop(), self._window()
        first = first_size(host.least_rtt(stream.remote) or 0.0, least, MAX_WINDOW_BYTES)
        window = FlowWindow(first, least, MAX_WINDOW_BYTES)
        stream.accept_payloads(sink, window.size)

        def took(nbytes: int) -> None:
            if window.receive(nbytes, loop.time(), host.rtt(stream.remote) or 0.0) and stream.failure is None:
                stream.accept_payloads(sink, window.size)

        return took

    # to owners

    async def _run_with_owner(self, span: Span) -> None:
        """Send the owner of a span this member's weight and parts, and receive their averages."""
        feed = self._shared.feed
        try:
            await self._exchange_with(span)
        except RemoteError as e:
            await self._hear_refusal(span, e)
        except NotFiniteError as e:
            feed(OwnerLost(span.id, str(e), Loss.INVALID))
        except (ShoalError, EOFError) as e:
            self._shared.note_failure(span.owner, e)
            loss = Loss.UNDIALABLE if isinstance(e, PeerUnreachable) else Loss.BROKEN
            feed(OwnerLost(span.id, str(e), loss))

    async def _hear_refusal(self, span: Span, error: RemoteError) -> None:
        feed = self._shared.feed
        if error.code == AveragingCode.EXCLUDED:
            feed(ExcludedByOwner(span.id, error.message))
        elif error.code == AveragingCode.VOID:
            # The leader's order, which ends this task, is on its way, unless something is wrong. If it has come, this
            # task was cancelled in the moment in which its stream ended, and its group has lost the cancellation.
            if span.id in self._core.ledger.assignment.by_id:
                await asyncio.sleep(ORDER_TIMEOUT)
                feed(OwnerLost(span.id, str(error)))
        elif error.code != AveragingCode.ROUND_FAILED or span.owner != self._core.leader:
            feed(OwnerLost(span.id, str(error)))
        # else the leader's decision is on its way, with the reason

    async def _exchange_with(self, span: Span) -> None:
        shared, foreign = self._shared, ForeignSpan(self._partition, span, self._arena)
        async with shared.host.open_stream(shared.peers[span.owner], EXCHANGE, lane=Lane.BULK) as stream:
            await stream.send(Contribute(shared.prefix, shared.group_id, span.id))
            if not isinstance(await stream.receive(), ReadyForParts):
                raise ProtocolViolation("sent a payload before it was ready for parts")
            self._taking[span.id] = stream
            took = self._accept(stream, foreign.receive_into)
            try:
                await self._exchange_on(stream, foreign, span.id, took)
            except asyncio.CancelledError:
                if self._core.failure is not None:  # the owner may hear of it here before the leader tells it
                    stream.reset(ResetCode.CANCELLED, self._core.failure)
                raise

    async def _exchange_on(
        self, stream: Stream, foreign: ForeignSpan, span: SpanId, took: Callable[[int], None]
    ) -> None:
        weight = await asyncio.shield(self._weight)
        foreign.sends = weight != 0
        await stream.send(DeclareWeight(weight))
        self._shared.feed(ExchangeOpened(span))
        try:
            async with asyncio.TaskGroup() as group:
                group.create_task(self._send_parts(stream, foreign, span))
                group.create_task(self._receive_averages(stream, foreign, span, took))
        except* (ShoalError, EOFError) as errors:
            raise errors.exceptions[0] from None

    async def _send_parts(self, stream: Stream, foreign: ForeignSpan, span: SpanId) -> None:
        for index in range(len(foreign.parts) if foreign.sends else 0):
            await stream.send_payload(index, self._encoded(foreign.to_send, index))
            self.bytes_sent += foreign.parts[index].nbytes
            self._shared.feed(PartSent(span, index))
        await stream.finish()

    def _encoded(self, encode: Callable[[int], Bytes], index: int) -> Bytes:
        """A part as it is sent. A codec of the user's own that fails, say, is no fault of its receiver."""
        try:
            return encode(index)
        except Exception as e:  # a codec is the user's: may be anything
            self._shared.feed(Withdrawn(describe_failure(e)))
            raise

    async def _receive_averages(
        self, stream: Stream, foreign: ForeignSpan, span: SpanId, took: Callable[[int], None]
    ) -> None:
        for index in range(len(foreign.parts)):
            payload = await stream.receive()
            if not isinstance(payload, Payload) or payload.tag != index:
                raise ProtocolViolation(f"sent something else than average {index}")
            took(len(payload.data))
            foreign.deliver(index, payload.data)
            self.bytes_received += len(payload.data)
            self._shared.feed(AverageReceived(span, index))
        report = await stream.receive()
        if not isinstance(report, SpanAveraged) or report.span != span:
            raise ProtocolViolation("did not say what its averages are made of")
        check_span_averaged(report, self._core.roles.size)
        self._shared.feed(SpanReceived(report))

    # from senders

    async def serve(self, stream: Stream, first: object) -> None:
        """Receive a member's parts of an own span and return the averages."""
        member = self._shared.member(stream)
        if not isinstance(first, Contribute):
            raise ProtocolViolation(f"{stream.remote} opened an exchange with something else")
        check_span_id(first.span)
        serving = await self._find(first.span)
        if not self._core.roles.contributes[member] or member in serving.begun:
            raise ProtocolViolation(f"{stream.remote} opened an exchange that it has no part in")
        serving.begun.add(member)
        serving.streams[member] = stream
        reason = ""
        try:
            self._refuse_dropped(serving, member)
            took = self._accept(stream, lambda tag, length: serving.own.receive_into(member, tag, length))
            await stream.send(ReadyForParts())
            async with asyncio.TaskGroup() as group:
                group.create_task(self._receive_parts(serving, stream, member, took))
                group.create_task(self._return_averages(serving, stream, member))
            await stream.delivered()  # until then the arena is read
        except* (ShoalError, EOFError) as errors:
            reason = str(errors.exceptions[0])
            raise errors.exceptions[0] from None
        finally:
            if not serving.is_done(member):
                # Where the member reset the stream, this handler is cancelled, and the stream says why.
                story = reason or str(stream.failure or "it ended the exchange")
                self._shared.feed(SenderLost(serving.span.id, member, story))
            serving.streams.pop(member, None)

    async def _find(self, span: SpanId) -> Serving:
        """An own span. The leader's order to serve it may still be on its way."""
        try:
            async with asyncio.timeout(ORDER_TIMEOUT):
                while span not in self._serving:
                    if self._shared.is_over or span.epoch <= self._core.ledger.assignment.epoch:
                        break
                    await self._progress.wait()
        except TimeoutError:
            pass  # answered as any other span that is not served here
        if span not in self._serving:
            raise RemoteError(AveragingCode.VOID, f"{span} is not served here")
        return self._serving[span]

    def _refuse_dropped(self, serving: Serving, member: int) -> None:
        book = self._core.ledger.collections.get(serving.span.id)
        reason = None if book is None else book.dropped.get(member)
        if reason is not None:
            raise RemoteError(AveragingCode.EXCLUDED, reason)

    async def _receive_parts(
        self, serving: Serving, stream: Stream, member: int, took: Callable[[int], None]
    ) -> None:
        span, own = serving.span.id, serving.own
        declared = await stream.receive()
        if not isinstance(declared, DeclareWeight):
            raise ProtocolViolation(f"{stream.remote} declared no weight before its parts")
        self._shared.feed(WeightDeclared(span, member, declared.weight))
        own.set_weight(member, declared.weight)
        if declared.weight:
            self.waits.setdefault(member, Wait())
        loop = asyncio.get_running_loop()
        for index in range(len(own.parts) if declared.weight else 0):
            if serving.is_ahead(member, index):
                await self._hold(serving, member, index)
            began = loop.time()
            payload = await stream.receive()
            if not isinstance(payload, Payload) or payload.tag != index:
                raise ProtocolViolation(f"{stream.remote} sent something else than part {index}")
            took(len(payload.data))
            self._refuse_dropped(serving, member)
            self.waits[member] = self.waits[member].plus(len(payload.data), loop.time() - began)
            self.bytes_received += len(payload.data)
            own.deliver(member, index, payload.data)
            self._shared.feed(PartDelivered(span, member, index))

    async def _hold(self, serving: Serving, member: int, index: int) -> None:
        """Read no further until the member is no longer ahead. While slower members are the cause, and not that it
        takes no averages, it is not to blame for that time.
        """
        span, is_held = serving.span.id, False
        self._held += 1
        try:
            while serving.is_ahead(member, index) and not self._is_closed(serving):
                waits_for_others = index - serving.averaged > serving.max_held
                if waits_for_others == is_held:
                    await self._progress.wait()
                    continue
                is_held = waits_for_others
                self._shared.feed(SenderHeld(span, member) if is_held else SenderAwaited(span, member))
        finally:
            self._held -= 1
        self._shared.feed(SenderAwaited(span, member))

    def _is_closed(self, serving: Serving) -> bool:
        return self._shared.is_over or serving.span.id not in self._serving

    async def _return_averages(self, serving: Serving, stream: Stream, member: int) -> None:
        own = serving.own
        for index in range(len(own.parts)):
            await self._until(serving, lambda index=index: serving.averaged > index)  # type: ignore[misc]
            await stream.send_payload(index, self._encoded(partial(own.to_return, member), index))
            self.bytes_sent += own.parts[index].nbytes
            serving.returned[member] = index + 1
            if self._held:
                self.wake()
        await self._until(serving, lambda: serving.report is not None)
        assert serving.report is not None
        await stream.send(serving.report)
        serving.returned[member] = len(own.parts) + 1

    async def _until(self, serving: Serving, is_so: Callable[[], bool]) -> None:
        while not is_so():
            if self._is_closed(serving):
                raise RemoteError(AveragingCode.ROUND_FAILED, self._core.failure or "the round is over")
            await self._progress.wait()


def describe_failure(error: Exception) -> str:
    """Why this member's own arithmetic failed: it has to leave the round with that reason."""
    if isinstance(error, AllreduceException):
        return str(error)
    logger.error("a part could not be averaged or encoded", exc_info=error)
    return f"{type(error).__name__} while it averaged: {error}"
