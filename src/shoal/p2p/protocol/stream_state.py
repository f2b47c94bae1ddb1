"""One stream of a connection, sans I/O: its two directions, its items, its credit.

A stream has two directions, each of which ends with END (the last message may ride on it) or, both at once, with RESET.

Flow control. Each direction starts with a credit of ``INITIAL_WINDOW``. An item (message or payload) costs its
length plus ``ITEM_COST``, so that empty items are not free. A message may be sent while the credit is positive, and
may overdraw it, so that the receiver's memory is bounded by its window plus one message. A payload needs credit
for all of it: it may be large, and it must not arrive before its receiver has given it a place. The receiver gives
credit back when the application has taken items, once that makes half a window.

Windows bound one stream; :class:`UnreadBytes` bounds what all streams that the peer opened make this side hold:
messages that nobody has taken, requests that are being answered, and payloads that nobody has asked for. What would
exceed it is not kept: its stream is reset as ``busy``. The answers to what this side asked are bounded by what it asks.

Everything that a peer can do wrong raises :class:`ProtocolViolation` here, which ends the connection.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from shoal.errors import ProtocolViolation, RemoteError, ShoalError
from shoal.p2p.config import INITIAL_WINDOW
from shoal.p2p.protocol import wire
from shoal.p2p.protocol.codes import ResetCode
from shoal.p2p.protocol.frames import FrameKind

ITEM_COST = 64
MAX_CREDIT = 1 << 40

Sink = Callable[[int, int], memoryview]
"""Given (tag, length) of a payload, returns memory that :func:`.frames.payload_memory` has checked."""
SendFrame = Callable[[FrameKind, int, bytes], None]


@dataclass(frozen=True)
class Payload:
    """Raw bytes with a tag (64 bits) that the application chose."""

    tag: int
    data: memoryview


class _Unsunk(Payload):
    """A payload that came before the application said where payloads go."""


class _Awaited(_Unsunk):
    """A payload for which the application gave a window, but no memory."""


Item = wire.Body | Payload


def _nobody_listens() -> None:
    """Stands for the observer of a stream that has none."""


class UnreadBytes:
    """What the streams that a peer opened on one connection make this side hold, and how much that may be."""

    __slots__ = ("_limit", "_used")

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._used = 0

    def take(self, count: int) -> bool:
        """Note ``count`` more bytes, or nothing and False if they are too many."""
        if self._used + count > self._limit:
            return False
        self._used += count
        return True

    def give_back(self, count: int) -> None:
        """``count`` bytes are held no more."""
        self._used -= count

    @property
    def refusal(self) -> str:
        """Why nothing more is taken."""
        return f"more than {self._limit} bytes of messages on this connection wait to be read"


class StreamState:
    """One stream as one side sees it. Changed by its :class:`~shoal.p2p.protocol.streams.Multiplexer` and by the
    methods here only."""

    __slots__ = (
        "_blocked_grant",
        "_held",
        "_pending_grant",
        "_receive_credit",
        "_send_frame",
        "_sink",
        "_unread",
        "_window",
        "failure",
        "id",
        "local_finished",
        "on_change",
        "on_closed",
        "received",
        "remote_finished",
        "send_credit",
    )

    def __init__(
        self,
        stream_id: int,
        send_frame: SendFrame,
        on_closed: Callable[[StreamState], None],
        unread: UnreadBytes | None = None,
    ) -> None:
        self.id = stream_id
        self.send_credit = INITIAL_WINDOW
        self.local_finished = False
        self.remote_finished = False
        self.failure: ShoalError | None = None
        self.received: deque[Item] = deque()
        self.on_change: Callable[[], None] = _nobody_listens
        """Called after everything that somebody may wait for: items, credit, the end."""
        self.on_closed = on_closed
        self._send_frame = send_frame
        self._sink: Sink | None = None
        self._window = INITIAL_WINDOW
        self._receive_credit = INITIAL_WINDOW
        self._pending_grant = 0
        self._blocked_grant = False
        self._unread = unread
        self._held = 0

    @property
    def is_closed(self) -> bool:
        """Whether nothing more can happen on this stream."""
        return self.failure is not None or (self.local_finished and self.remote_finished)

    # Sending. The caller has made sure that the stream has not failed and that there is credit.

    def can_send_message(self) -> bool:
        """Whether there is credit for a message."""
        return self.send_credit > 0

    def can_send_payload(self, length: int) -> bool:
        """Whether there is credit for a payload of ``length`` bytes."""
        return self.send_credit >= length + ITEM_COST

    def charge(self, length: int) -> None:
        """Take the credit for an item that is about to be sent."""
        self.send_credit -= length + ITEM_COST

    def send_message(self, body: bytes) -> None:
        """Send a message."""
        self.charge(len(body))
        self._send_frame(FrameKind.MESSAGE, self.id, body)

    def finish(self, last_message: bytes = b"") -> None:
        """Send END, with the last message on it if there is one."""
        if self.is_closed or self.local_finished:
            return
        self.local_finished = True
        self._send_frame(FrameKind.END, self.id, last_message)
        if self.remote_finished:
            self.on_closed(self)

    def reset(self, code: str, message: str, failure: ShoalError) -> None:
        """End the stream from this side: the peer gets RESET, whoever uses the stream here gets ``failure``."""
        if not self.is_closed:
            self._send_frame(FrameKind.RESET, self.id, wire.encode_reset(code, message))
            self._give_back(sum(map(_held_for, self.received)))
            self.received.clear()
            self.fail(failure)

    def fail(self, failure: ShoalError) -> None:
        """End the stream without telling the peer; what was received can still be taken."""
        if not self.is_closed:
            self.failure = failure
            self._sink = None
            self.on_closed(self)
            self.on_change()

    # Receiving, application side.

    def take(self) -> Item | None:
        """The next item, whose credit goes back to the sender; None if there is none."""
        if not self.received:
            return None
        item = self.received.popleft()
        self._give_back(_held_for(item))
        self._pending_grant += ITEM_COST + (len(item.data) if isinstance(item, Payload) else len(item))
        # So early that a payload of half a window passes, whatever is still to be given back.
        if (self._pending_grant + ITEM_COST) * 2 >= self._window:
            self._grant()
        return item

    def take_request(self) -> Item | None:
        """The one message of a unary call; it counts as unread until the call is answered (:meth:`release`)."""
        return self.received.popleft() if self.received else None

    def release(self) -> None:
        """Nobody serves the stream any more, so nobody holds what came on it."""
        self._give_back(self._held)
        self._unread = None

    def is_waiting(self) -> None:
        """Note that the application waits for an item: a payload may need all the credit that there is."""
        if self._blocked_grant and self._pending_grant > 0:
            self._grant()

    def accept_payloads(self, sink: Sink | None, window: int) -> None:
        """See :meth:`shoal.p2p.rpc.Stream.accept_payloads`."""
        window += ITEM_COST
        self._sink = None if self.is_closed else sink
        self._blocked_grant = True
        # A larger window is open at once; a smaller one by giving back less.
        self._pending_grant += window - self._window
        self._window = window
        if sink is not None:
            self._place_early(sink)
        if self._pending_grant > 0:
            self._grant()

    def _place_early(self, sink: Sink) -> None:
        """Move payloads that have arrived to where the sink says; it may end the stream, which drops them."""
        placed: deque[Item] = deque()
        before = sum(map(_held_for, self.received))
        for item in list(self.received):
            placed.append(_placed(item, sink))
            if not self.received:
                return
        self.received = placed
        self._give_back(before - sum(map(_held_for, placed)))

    def _grant(self) -> None:
        count, self._pending_grant = self._pending_grant, 0
        if not self.remote_finished and self.failure is None:
            self._receive_credit += count
            self._send_frame(FrameKind.CREDIT, self.id, wire.encode_credit(count))

    # Receiving, peer side.

    def payload_memory(self, tag: int, length: int) -> memoryview:
        """Where the payload goes that is about to arrive; raises before anything is allocated."""
        self._check_open("payload")
        cost = length + ITEM_COST
        if cost > self._receive_credit:
            raise ProtocolViolation(
                f"payload of {length} bytes on stream {self.id}, which has credit for {self._receive_credit}"
            )
        self._receive_credit -= cost
        if self._sink is None:
            return memoryview(bytearray(length))
        return self._sink(tag, length)

    def receive_payload(self, tag: int, data: memoryview, placed: bool) -> None:
        """A payload has arrived whole; ``placed`` if in memory that a sink gave."""
        self._check_open("payload")
        unplaced = _Awaited if self._blocked_grant else _Unsunk
        item = Payload(tag, data) if placed else unplaced(tag, data)
        # A sink that came while the payload was under way wants it in its own memory.
        if self._keep(item if self._sink is None else _placed(item, self._sink)):
            self.on_change()

    def receive_message(self, body: bytes) -> None:
        """A message has arrived."""
        self._check_open("message")
        if self._receive_credit <= 0:
            raise ProtocolViolation(f"message on stream {self.id}, which has no credit")
        self._receive_credit -= len(body) + ITEM_COST
        if self._keep(body):
            self.on_change()

    def receive_end(self, last_message: bytes) -> None:
        """The peer has finished."""
        self._check_open("END")
        if last_message:
            if self._receive_credit <= 0:
                raise ProtocolViolation(f"message on stream {self.id}, which has no credit")
            if not self._keep(last_message):
                return
        self.remote_finished = True
        if self.local_finished:
            self.on_closed(self)
        self.on_change()

    def receive_credit(self, count: int) -> None:
        """The peer has given credit."""
        self.send_credit += count
        if self.send_credit > MAX_CREDIT:
            raise ProtocolViolation(f"credit of {self.send_credit} bytes on stream {self.id}")
        self.on_change()

    @property
    def has_sink(self) -> bool:
        """Whether payloads go to memory that the application gives."""
        return self._sink is not None

    def _keep(self, item: Item) -> bool:
        """Put what has arrived where it will be taken; False if the stream was reset instead."""
        count = _held_for(item)
        if self._unread is not None:
            if not self._unread.take(count):
                refusal = self._unread.refusal
                self.reset(ResetCode.BUSY, refusal, RemoteError(ResetCode.BUSY, refusal))
                return False
            self._held += count
        self.received.append(item)
        return True

    def _give_back(self, count: int) -> None:
        if self._unread is not None:
            self._unread.give_back(count)
            self._held -= count

    def _check_open(self, what: str) -> None:
        if self.remote_finished:
            raise ProtocolViolation(f"{what} on stream {self.id} after its END")


def _held_for(item: Item) -> int:
    """The bytes for which nobody but the peer is responsible; a message without any costs memory too."""
    if isinstance(item, Payload):
        return len(item.data) + ITEM_COST if type(item) is _Unsunk else 0
    return len(item) + ITEM_COST


def _placed(item: Item, sink: Sink) -> Item:
    if not isinstance(item, _Unsunk):
        return item
    memory = sink(item.tag, len(item.data))
    memory[:] = item.data
    return Payload(item.tag, memory)
