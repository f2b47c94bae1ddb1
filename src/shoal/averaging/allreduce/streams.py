"""The streams of one round that carry tensor bytes: to the owners of other spans, and from the senders of the own."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from functools import partial

from shoal.averaging.allreduce.events import (
    AverageReceived,
    ExchangeOpened,
    ExcludedByOwner,
    OwnerLost,
    PartDelivered,
    PartSent,
    SenderAwaited,
    SenderHeld,
    SenderLost,
    WeightDeclared,
    Withdrawn,
)
from shoal.averaging.allreduce.exchange import HELD_BYTES, Arena, ForeignSpan, OwnSpan
from shoal.averaging.allreduce.messages import EXCHANGE, Contribute, DeclareWeight, Loss, ReadyForParts
from shoal.averaging.allreduce.pace import Wait
from shoal.averaging.allreduce.participants import RoundCore
from shoal.averaging.partition import Partition
from shoal.compression.base import Bytes
from shoal.errors import AllreduceException, PeerUnreachable, ProtocolViolation, RemoteError, ShoalError
from shoal.p2p.rpc import Lane, Payload, Stream

logger = logging.getLogger(__name__)

WINDOW_BYTES = 4 << 20
"""Credit of each stream of parts or averages; at least two parts, whatever their size."""
EXCLUDED = "excluded"
ROUND_FAILED = "round_failed"


class Exchange:
    """Moves the parts and averages of one member: :meth:`run_with` an owner, :meth:`serve` a sender."""

    def __init__(self, shared: RoundCore, partition: Partition, arena: Arena) -> None:
        self._shared = shared
        self._core = shared.core
        self._partition = partition
        self._arena = arena
        self.own = OwnSpan(partition, shared.core.roles.me, arena, {})
        self.bytes_sent = self.bytes_received = 0
        self.waits: dict[int, Wait] = {}
        """For each sender that has begun: what came of it, and how long this owner waited for it."""
        self._weight: asyncio.Future[float] = asyncio.get_running_loop().create_future()
        self._streams: dict[int, Stream] = {}
        self._averaged = 0
        self._returned: dict[int, int] = {}
        largest = max((part.nbytes for part in self.own.parts), default=1)
        self._max_held = max(2, HELD_BYTES // largest)
        self._progress = asyncio.Event()

    # from the round

    def contribute(self, weight: float) -> None:
        """The snapshot is taken: parts may be sent, and averaged, from now on."""
        if self._core.roles.contributes[self._core.roles.me]:
            self.own.set_weight(self._core.roles.me, weight)
        self._weight.set_result(weight)

    def owners(self) -> list[int]:
        """The members that owe this one averages, and want its parts."""
        roles = self._core.roles
        return [owner for owner in roles.others if roles.parts_owned[owner] and roles.contributes[roles.me]]

    def release(self, averaged: int) -> None:
        """So many parts of the own span have been averaged: they may be returned."""
        self._averaged = averaged
        self.wake()

    def wake(self) -> None:
        """Let everybody look again who waits for parts to be averaged."""
        self._progress.set()
        self._progress = asyncio.Event()

    def close(self, failure: str | None) -> None:
        """The round is decided: whoever has not got its averages gets none any more. A peer that neither takes them nor
        leaves would keep the round in memory otherwise.
        """
        for member, stream in self._streams.items():
            if self._returned.get(member, 0) < len(self.own.parts):
                stream.reset(ROUND_FAILED, failure or "the round is over")
        self.own.clear()
        self.wake()

    def drop(self, sender: int, reason: str, *, is_silent: bool = False) -> None:
        """Take nothing more from a sender, and tell it so."""
        stream = self._streams.get(sender)
        if stream is not None:
            stream.reset(EXCLUDED, reason)
        elif is_silent:
            self._shared.unreached.add(sender)

    def _window(self) -> int:
        return max(WINDOW_BYTES, 2 * max((part.nbytes for part in self._partition.parts), default=0))

    # to owners

    async def run_with(self, owner: int) -> None:
        """Send an owner this member's weight and parts of its span, and receive their averages."""
        feed = self._shared.feed
        try:
            await self._exchange_with(owner)
        except RemoteError as e:
            if e.code == EXCLUDED:
                feed(ExcludedByOwner(owner, e.message))
            elif e.code != ROUND_FAILED or owner != self._core.roles.leader:
                feed(OwnerLost(owner, str(e)))
            # else the leader's decision is on its way, with the reason
        except (ShoalError, EOFError) as e:
            self._shared.note_failure(owner, e)
            loss = Loss.UNDIALABLE if isinstance(e, PeerUnreachable) else Loss.BROKEN
            feed(OwnerLost(owner, str(e), loss))

    async def _exchange_with(self, owner: int) -> None:
        shared, span = self._shared, ForeignSpan(self._partition, owner, self._arena)
        async with shared.host.open_stream(shared.peers[owner], EXCHANGE, lane=Lane.BULK) as stream:
            await stream.send(Contribute(shared.prefix, shared.group_id))
            if not isinstance(await stream.receive(), ReadyForParts):
                raise ProtocolViolation("sent a payload before it was ready for parts")
            stream.accept_payloads(span.receive_into, self._window())
            try:
                await self._exchange_on(stream, span, owner)
            except asyncio.CancelledError:
                if self._core.failure is not None:  # the owner may hear of it here before the leader tells it
                    stream.reset("cancelled", self._core.failure)
                raise

    async def _exchange_on(self, stream: Stream, span: ForeignSpan, owner: int) -> None:
        weight = await asyncio.shield(self._weight)
        span.sends = weight != 0
        await stream.send(DeclareWeight(weight))
        self._shared.feed(ExchangeOpened(owner))
        try:
            async with asyncio.TaskGroup() as group:
                group.create_task(self._send_parts(stream, span, owner))
                group.create_task(self._receive_averages(stream, span, owner))
        except* (ShoalError, EOFError) as errors:
            raise errors.exceptions[0] from None

    async def _send_parts(self, stream: Stream, span: ForeignSpan, owner: int) -> None:
        for index in range(len(span.parts) if span.sends else 0):
            await stream.send_payload(index, self._encoded(span.to_send, index))
            self.bytes_sent += span.parts[index].nbytes
            self._shared.feed(PartSent(owner, index))
        await stream.finish()

    def _encoded(self, encode: Callable[[int], Bytes], index: int) -> Bytes:
        """A part as it is sent. A codec of the user's own that fails, say, is no fault of whom it is sent to."""
        try:
            return encode(index)
        except Exception as e:
            self._shared.feed(Withdrawn(describe_failure(e)))
            raise

    async def _receive_averages(self, stream: Stream, span: ForeignSpan, owner: int) -> None:
        for index in range(len(span.parts)):
            payload = await stream.receive()
            if not isinstance(payload, Payload):
                raise ProtocolViolation("sent a message instead of an average")
            span.deliver(index, payload.data)
            self.bytes_received += len(payload.data)
            self._shared.feed(AverageReceived(owner, index))

    # from senders

    async def serve(self, stream: Stream, first: object) -> None:
        """Receive a member's parts of this member's span and return the averages."""
        member = self._shared.member(stream)
        if not isinstance(first, Contribute):
            raise ProtocolViolation(f"{stream.remote} opened an exchange with something else")
        if not self._core.roles.contributes[member] or member in self._streams:
            raise ProtocolViolation(f"{stream.remote} opened an exchange that it has no part in")
        self._streams[member] = stream
        reason = ""
        try:
            self._refuse_dropped(member)
            stream.accept_payloads(
                lambda tag, length: self.own.receive_into(member, tag, length), self._window()
            )
            await stream.send(ReadyForParts())
            async with asyncio.TaskGroup() as group:
                group.create_task(self._receive_parts(stream, member))
                group.create_task(self._return_averages(stream, member))
        except* (ShoalError, EOFError) as errors:
            reason = str(errors.exceptions[0])
            raise errors.exceptions[0] from None
        finally:
            if self._returned.get(member, 0) < len(self.own.parts):
                # Where the member reset the stream, this handler is cancelled, and the stream says why.
                self._shared.feed(
                    SenderLost(member, reason or str(stream.failure or "it ended the exchange"))
                )

    def _refuse_dropped(self, member: int) -> None:
        reason = self._core.collection.dropped.get(member)
        if reason is not None:
            raise RemoteError(EXCLUDED, reason)

    async def _receive_parts(self, stream: Stream, member: int) -> None:
        declared = await stream.receive()
        if not isinstance(declared, DeclareWeight):
            raise ProtocolViolation(f"{stream.remote} declared no weight before its parts")
        self._shared.feed(WeightDeclared(member, declared.weight))
        self.own.set_weight(member, declared.weight)
        if declared.weight:
            self.waits[member] = Wait()
        loop = asyncio.get_running_loop()
        for index in range(len(self.own.parts) if declared.weight else 0):
            if self._is_ahead(member, index):
                await self._hold(member, index)
            began = loop.time()
            payload = await stream.receive()
            if not isinstance(payload, Payload):
                raise ProtocolViolation(f"{stream.remote} sent a message instead of a part")
            self._refuse_dropped(member)
            self.waits[member] = self.waits[member].plus(len(payload.data), loop.time() - began)
            self.bytes_received += len(payload.data)
            self.own.deliver(member, index, payload.data)
            self._shared.feed(PartDelivered(member, index))

    async def _hold(self, member: int, index: int) -> None:
        """Read no further until the member is no longer ahead. While slower members are the cause, and not that it
        takes no averages, it is not to blame for that time.
        """
        is_held = False
        while self._is_ahead(member, index) and not self._shared.is_decided:
            waits_for_others = index - self._averaged > self._max_held
            if waits_for_others == is_held:
                await self._progress.wait()
                continue
            is_held = waits_for_others
            self._shared.feed(SenderHeld(member) if is_held else SenderAwaited(member))
        self._shared.feed(SenderAwaited(member))

    async def _return_averages(self, stream: Stream, member: int) -> None:
        for index in range(len(self.own.parts)):
            while self._averaged <= index:
                if self._shared.is_decided:
                    raise RemoteError(ROUND_FAILED, self._core.failure or "the round is over")
                await self._progress.wait()
            await stream.send_payload(index, self._encoded(partial(self.own.to_return, member), index))
            self.bytes_sent += self.own.parts[index].nbytes
            self._returned[member] = index + 1
            self.wake()

    def _is_ahead(self, member: int, index: int) -> bool:
        """Whether a member's next part would take more memory than it may: for parts that wait for slower senders,
        and, under a lossy codec, for answers that the member has not taken yet.
        """
        settled = min(self._averaged, self._returned.get(member, 0))
        return index - settled > self._max_held


def describe_failure(error: Exception) -> str:
    """Why this member's own arithmetic failed: it has to leave the round with that reason."""
    if isinstance(error, AllreduceException):
        return str(error)
    logger.error("a part could not be averaged or encoded", exc_info=error)
    return f"{type(error).__name__} while it averaged: {error}"
