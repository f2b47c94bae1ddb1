"""One stream of a connection, sans I/O: its two directions, its items, its credit.

A stream has two directions, each of which ends with END (the last message may ride on it) or, both at once, with RESET.

Flow control. Each direction starts with a credit of ``INITIAL_WINDOW``. An item (message or payload) costs its
length plus ``ITEM_COST``, so that empty items are not free. A message may be sent while the credit is positive, and
may overdraw it, so that the receiver's memory is bounded by its window plus one message. A payload needs credit
for all of it: it may be large, and it must not arrive before its receiver has given it a place. The receiver gives
credit back when the application has taken items, once that makes half a window.

Windows bound one stream; :class:`.unread.UnreadBytes` bounds what all streams that the peer opened make this side hold:
messages that nobody has taken, requests that are being answered, and payloads that nobody has asked for. What would
exceed it is not kept: its stream is reset as ``busy``. The answers to what this side asked are bounded by what it asks.

Striped payloads. The bytes of a payload may travel as pieces over any connection between the two processes, while
STRIPED keeps its place among the items of the stream. Pieces and STRIPED overtake each other; whichever comes first
takes the credit and asks for memory. So a sink may be asked for payloads out of order. A payload is striped only after
the receiver has given a window: before that, it might not know the stream yet. It has at least two pieces. END counts
when all pieces are there.

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
from shoal.p2p.protocol.frames import CHUNK_BYTES, FrameKind, Piece
from shoal.p2p.protocol.pieces import Assembly, Numbers
from shoal.p2p.protocol.unread import UnreadBytes

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


@dataclass(frozen=True)
class _Striped:
    """The place of a payload that arrives in pieces."""

    assembly: Assembly


Item = wire.Body | Payload


def _nobody_listens() -> None:
    """Stands for the observer of a stream that has none."""


class StreamState:
    """One stream as one side sees it. Changed by its :class:`~shoal.p2p.protocol.streams.Multiplexer` and by the
    methods here only."""

    __slots__ = (
        "_arriving",
        "_blocked_grant",
        "_complete",
        "_ended_by_peer",
        "_held",
        "_markers",
        "_pending_grant",
        "_receive_credit",
        "_send_frame",
        "_sink",
        "_striped_sent",
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
        "send_window",
        "unconfirmed",
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
        self.send_window = INITIAL_WINDOW
        """The most credit that there was at one time."""
        self.local_finished = False
        self.remote_finished = False
        self.failure: ShoalError | None = None
        self.received: deque[Item | _Striped] = deque()
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
        self._striped_sent = 0
        self.unconfirmed: set[int] = set()
        """Striped payloads of which the peer has not said yet that it has them."""
        self._arriving: dict[int, Assembly] = {}
        """Striped payloads that are not complete, or whose STRIPED has not come."""
        self._markers = 0
        """How many STRIPED have come."""
        self._complete = Numbers()
        self._ended_by_peer = False

    @property
    def is_closed(self) -> bool:
        """Whether nothing more can happen on this stream: of striped payloads, too, none may have to be sent again."""
        is_over = self.local_finished and self.remote_finished and not self.unconfirmed
        return self.failure is not None or is_over

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

    @property
    def may_stripe(self) -> bool:
        """Whether the receiver has given a window for payloads, and so knows the stream, and there is a number left."""
        return self.send_window > INITIAL_WINDOW and self._striped_sent <= wire.MAX_NUMBER

    def begin_striped(self, tag: int, length: int) -> int:
        """Say that the next item is a striped payload, and take the credit for it. Returns its number."""
        self.charge(length)
        number = self._striped_sent
        self._striped_sent += 1
        self.unconfirmed.add(number)
        self._send_frame(FrameKind.STRIPED, self.id, wire.encode_striped(number, tag, length))
        return number

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
        self._close_if_over()

    def _close_if_over(self) -> None:
        if self.is_closed:
            self.on_closed(self)

    def reset(self, code: str, message: str, failure: ShoalError) -> None:
        """End the stream from this side: the peer gets RESET, the user of the stream here gets ``failure``."""
        if not self.is_closed:
            self._send_frame(FrameKind.RESET, self.id, wire.encode_reset(code, message))
            self._give_back(sum(map(_held_for, self.received)))
            self.received.clear()
            self._arriving.clear()
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
        if not self.received or not _is_whole(self.received[0]):
            return None
        taken = self.received.popleft()
        self._give_back(_held_for(taken))
        item = Payload(taken.assembly.tag, taken.assembly.memory) if isinstance(taken, _Striped) else taken
        self._pending_grant += ITEM_COST + (len(item.data) if isinstance(item, Payload) else len(item))
        # So early that a payload of half a window passes, whatever is still to be given back.
        if (self._pending_grant + ITEM_COST) * 2 >= self._window:
            self._grant()
        return item

    def take_request(self) -> Item | None:
        """The one message of a unary call; it counts as unread until the call is answered (:meth:`release`)."""
        item = self.received.popleft() if self.received else None
        return None if isinstance(item, _Striped) else item

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
        """Move what has arrived to where the sink says; it may end the stream, which drops all of it."""
        placed: deque[Item | _Striped] = deque()
        before = sum(map(_held_for, self.received))
        for item in list(self.received):
            placed.append(_placed(item, sink))
            if not self.received:
                return
        self.received = placed
        self._give_back(before - sum(map(_held_for, placed)))
        for assembly in list(self._arriving.values()):
            if not assembly.is_placed:
                assembly.move_to(sink(assembly.tag, len(assembly.memory)))
            if self.is_closed:
                return

    def _grant(self) -> None:
        count, self._pending_grant = self._pending_grant, 0
        if not self.remote_finished and self.failure is None:
            self._receive_credit += count
            self._send_frame(FrameKind.CREDIT, self.id, wire.encode_credit(count))

    # Receiving, peer side.

    def payload_memory(self, tag: int, length: int) -> memoryview:
        """Where the payload goes that is about to arrive; raises before anything is allocated."""
        self._check_open("payload")
        return self._take_memory(tag, length)

    def _take_memory(self, tag: int, length: int) -> memoryview:
        cost = length + ITEM_COST
        if cost > self._receive_credit:
            raise ProtocolViolation(
                f"payload of {length} bytes on stream {self.id}, which has credit for {self._receive_credit}"
            )
        memory = memoryview(bytearray(length)) if self._sink is None else self._sink(tag, length)
        self._receive_credit -= cost  # only now: a sink that refuses has taken nothing
        return memory

    def receive_payload(self, tag: int, data: memoryview, placed: bool) -> None:
        """A payload has arrived whole; ``placed`` if in memory that a sink gave."""
        self._check_open("payload")
        unplaced = _Awaited if self._blocked_grant else _Unsunk
        item = Payload(tag, data) if placed else unplaced(tag, data)
        # A sink that came while the payload was under way wants it in its own memory.
        if self._keep(item if self._sink is None else _placed(item, self._sink)):
            self.on_change()

    def receive_striped(self, number: int, tag: int, length: int) -> None:
        """A striped payload is the next item; some or all of its pieces may have come before."""
        self._check_open("STRIPED")
        if number != self._markers:
            raise ProtocolViolation(f"STRIPED with number {number}, not {self._markers}, on stream {self.id}")
        self._markers += 1
        assembly = self._assembly(number, tag, length)
        if self.is_closed or not self._keep(_Striped(assembly)):
            return
        self._forget_complete(number, assembly)

    def piece_memory(self, piece: Piece) -> memoryview | None:
        """Where a piece that has arrived belongs; None: nowhere, since it has arrived before."""
        if piece.number in self._complete:
            return None
        return self._assembly(piece.number, piece.tag, piece.total).place(piece)

    def receive_piece(self, piece: Piece) -> None:
        """A piece was verified, and is where :meth:`piece_memory` said."""
        assembly = self._arriving.get(piece.number)
        if assembly is None or assembly.is_complete:
            return  # an earlier copy completed it, or the stream was reset by the one that gave the memory
        if not assembly.note_written(piece):
            return
        self._complete.add(piece.number)
        self._send_frame(FrameKind.RECEIVED, self.id, wire.encode_received(piece.number))
        self._forget_complete(piece.number, assembly)

    def _assembly(self, number: int, tag: int, total: int) -> Assembly:
        assembly = self._arriving.get(number)
        if assembly is not None:
            assembly.check(tag, total)
            return assembly
        if number in self._complete or self._ended_by_peer or not self._blocked_grant:
            raise ProtocolViolation(f"a striped payload on stream {self.id} where there can be none")
        if total <= CHUNK_BYTES:  # what is kept of it would be more than its credit
            raise ProtocolViolation(
                f"a striped payload of {total} bytes on stream {self.id}: it is one piece"
            )
        has_sink = self.has_sink
        assembly = Assembly(tag, self._take_memory(tag, total), is_placed=has_sink)
        if not self.is_closed:  # the sink may have ended the stream
            self._arriving[number] = assembly
        return assembly

    def _forget_complete(self, number: int, assembly: Assembly) -> None:
        """Done with a payload if it is complete, and its place among the items is known."""
        if not assembly.is_complete or number >= self._markers:
            return
        del self._arriving[number]
        if self._ended_by_peer and not self._arriving:
            self._finish_receiving()
        else:
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
        self._ended_by_peer = True
        if any(number >= self._markers for number in self._arriving):
            raise ProtocolViolation(f"END of stream {self.id} before a striped payload had its place")
        if not self._arriving:
            self._finish_receiving()

    def _finish_receiving(self) -> None:
        self.remote_finished = True
        self._close_if_over()
        self.on_change()

    def check_confirmation(self, number: int) -> None:
        """:class:`ProtocolViolation` unless this striped payload was begun, and is confirmed for the first time."""
        if number not in self.unconfirmed:
            raise ProtocolViolation(f"RECEIVED with number {number} on stream {self.id}: no such payload")

    def receive_confirmation(self, number: int) -> None:
        """The peer has all of a striped payload."""
        self.unconfirmed.discard(number)
        self._close_if_over()
        self.on_change()

    def receive_credit(self, count: int) -> None:
        """The peer has given credit."""
        self.send_credit += count
        self.send_window = max(self.send_window, self.send_credit)
        if self.send_credit > MAX_CREDIT:
            raise ProtocolViolation(f"credit of {self.send_credit} bytes on stream {self.id}")
        self.on_change()

    @property
    def has_sink(self) -> bool:
        """Whether payloads go to memory that the application gives."""
        return self._sink is not None

    def _keep(self, item: Item | _Striped) -> bool:
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
        if self.remote_finished or self._ended_by_peer:
            raise ProtocolViolation(f"{what} on stream {self.id} after its END")


def _is_whole(item: Item | _Striped) -> bool:
    return not isinstance(item, _Striped) or item.assembly.is_complete


def _held_for(item: Item | _Striped) -> int:
    """The bytes for which nobody but the peer is responsible; a message without any costs memory too."""
    if isinstance(item, Payload | _Striped):
        return len(item.data) + ITEM_COST if type(item) is _Unsunk else 0
    return len(item) + ITEM_COST


def _placed(item: Item | _Striped, sink: Sink) -> Item | _Striped:
    if isinstance(item, _Striped) and not item.assembly.is_placed:
        item.assembly.move_to(sink(item.assembly.tag, len(item.assembly.memory)))
    if not isinstance(item, _Unsunk):
        return item
    memory = sink(item.tag, len(item.data))
    memory[:] = item.data
    return Payload(item.tag, memory)
