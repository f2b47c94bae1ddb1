"""Which piece of which payload goes out next, on which lane. Pure: the time is an argument.

A lane takes the next piece whenever its socket has room, so that each carries what it can. Payloads of several streams
take turns. Once nothing waits, a lane with room sends a piece again that another one holds, if that one would need much
longer: a connection in its back-off would hold up the last bytes of all for seconds. How long a lane needs follows
from its kernel's figures (:mod:`.forecast`), or from what it carried where the kernel does not tell. What a dead lane
carried is sent again, unless its payload is known to have arrived whole.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from shoal.errors import ProtocolViolation
from shoal.p2p.lanes.forecast import Flow, is_dead, is_stalled, seconds_to_land
from shoal.p2p.protocol.frames import CHUNK_BYTES, Piece

MAX_COPIES = 4
"""So often one piece is sent at most, as long as the lanes that carry it live."""
PATIENCE = 5.0
"""A piece is sent again if it is expected to take so many times as long where it is as on the lane that has room;"""
PATIENCE_WITH_STALLED = 2.0
"""so many times where that lane stalls: what is expected of one that moves is off by as much as a factor of two,"""
PATIENCE_WITHOUT_FORECAST = 3.0
"""and so many times where the kernel says nothing."""
RATE_SECONDS = 1.0
"""The rate of a lane is a mean over about this time."""
LEAST_SECONDS = 0.1
"""On a lane that has room a piece counts as taking this long at least: there is little to gain."""
LEAST_AGE = 0.05
"""Seconds for which a piece is left alone after it was sent."""


@dataclass(eq=False)
class Outgoing:
    """A striped payload on its way out.

    :param is_wanted: False once its stream has failed
    :param on_taken: called when every piece was sent once
    """

    home: int
    stream_id: int
    number: int
    tag: int
    data: memoryview
    is_wanted: Callable[[], bool]
    on_taken: Callable[[], None]
    next_offset: int = 0
    """From here on nothing has been sent."""
    is_received: bool = False
    total: int = field(init=False)
    """Bytes of all of it."""
    copies: dict[int, int] = field(default_factory=dict)
    """How often each piece was sent on lanes that live, by the byte at which it begins."""
    landed: set[int] = field(default_factory=set)
    """The pieces that the peer's machine has."""

    def __post_init__(self) -> None:
        self.total = len(self.data)

    @property
    def is_taken(self) -> bool:
        """Whether every piece was sent once."""
        return self.next_offset >= self.total

    @property
    def is_done(self) -> bool:
        """Whether nothing more of it is ever to be sent."""
        return self.is_received or not self.is_wanted()

    def piece(self, offset: int) -> Piece:
        """The piece that begins at a byte."""
        return Piece(self.home, self.stream_id, self.number, self.tag, self.total, offset)

    def let_go(self) -> None:
        """It is done: its memory is its sender's again."""
        self.data = memoryview(b"")
        self.copies.clear()
        self.landed.clear()


@dataclass(eq=False)
class _Sent:
    """A piece that a lane carries, or has carried."""

    payload: Outgoing
    offset: int
    end: int
    """Bytes of the lane up to its last one."""
    at: float


@dataclass(eq=False)
class LaneBook:
    """What one lane carries."""

    rtt: float
    """Seconds; as far as it is known."""
    flying: deque[_Sent] = field(default_factory=deque)
    """Pieces that the peer's machine does not have yet, the oldest first."""
    landed: dict[Outgoing, list[int]] = field(default_factory=dict)
    """Those that it has of payloads that are not confirmed: the peer itself may not have read them yet."""
    flow: Flow | None = None
    """What the kernel says, where it does."""
    silence: float = 0.0
    """Seconds for which nothing was heard, though something is under way."""
    written: int = 0
    acknowledged: int = 0
    """Bytes that the peer's machine has."""
    noted_at: float = 0.0
    moved_at: float = 0.0
    """When the peer's machine last confirmed something, or there was nothing to confirm."""
    rate: float = 0.0
    """Bytes a second, while it had something to carry."""

    def note_progress(self, written: int, acknowledged: int, now: float) -> None:
        """So many bytes were written in all, and so many of them has the peer's machine."""
        if acknowledged > self.acknowledged or self.written <= self.acknowledged:
            self.moved_at = now
        seconds, count = now - self.noted_at, acknowledged - self.acknowledged
        if self.written > self.acknowledged and seconds > 0:
            weight = min(1.0, seconds / RATE_SECONDS)
            rate = count / seconds
            self.rate = rate if self.rate == 0.0 else (1 - weight) * self.rate + weight * rate
        self.written, self.acknowledged, self.noted_at = written, acknowledged, now
        while self.flying and self.flying[0].end <= acknowledged:
            sent = self.flying.popleft()
            if not sent.payload.is_done:
                sent.payload.landed.add(sent.offset)
                self.landed.setdefault(sent.payload, []).append(sent.offset)

    def seconds_until(self, end: int) -> float:
        """How long it is likely to take until the peer's machine has the first ``end`` bytes."""
        missing = max(0, end - self.acknowledged)
        if self.flow is not None:
            return seconds_to_land(missing, self.flow, self.silence)
        return missing / self.rate if self.rate > 0.0 else float("inf")

    @property
    def is_stalled(self) -> bool:
        """Whether it waits for a time-out, as far as is known."""
        return self.flow is not None and is_stalled(self.flow, self.silence)

    @property
    def patience(self) -> float:
        """How many times as long as elsewhere a piece may take here, until it is sent again there."""
        if self.flow is None:
            return PATIENCE_WITHOUT_FORECAST
        return PATIENCE_WITH_STALLED if self.is_stalled else PATIENCE

    def seconds_for(self, size: int) -> float:
        """How long a piece is likely to take that it is given now."""
        queued = self.written - self.acknowledged + size
        if self.flow is not None:
            return seconds_to_land(queued, self.flow, self.silence)
        return self.rtt + (queued / self.rate if self.rate > 0.0 else 0.0)


class Scheduler:
    """See the module. Lanes are known by any hashable key."""

    def __init__(self) -> None:
        self._waiting: deque[Outgoing] = deque()
        self._again: deque[tuple[Outgoing, int]] = deque()
        """Pieces of lanes that died."""
        self._unconfirmed: dict[tuple[int, int, int], Outgoing] = {}
        self._late: list[tuple[float, object, _Sent]] = []
        """Pieces that may be worth sending again: the seconds that one may take elsewhere to be worth it, the lane that
        carries it, and the piece; the most urgent first."""
        self.lanes: dict[object, LaneBook] = {}
        self.resent = 0
        """Bytes that were sent more than once."""

    @property
    def is_idle(self) -> bool:
        """Whether nothing is under way."""
        # As a rule the first payload says that it is.
        return all(payload.is_done for payload in self._unconfirmed.values())

    @property
    def is_starved(self) -> bool:
        """Whether there is nothing that was not sent yet."""
        return not self._waiting and not self._again

    def is_stuck(self, lanes: Iterable[object]) -> bool:
        """Whether all of these lanes wait for time-outs."""
        return all(lane in self.lanes and self.lanes[lane].is_stalled for lane in lanes)

    def add(self, payload: Outgoing) -> None:
        """Send this too."""
        self._waiting.append(payload)
        self._unconfirmed[payload.home, payload.stream_id, payload.number] = payload

    def receive_confirmation(self, home: int, stream_id: int, number: int) -> None:
        """The peer has all of a payload. Copies of its pieces may still be on their way.

        :raises ProtocolViolation: it cannot have all, since not every piece was sent
        """
        payload = self._unconfirmed.get((home, stream_id, number))
        if payload is None:
            return  # its stream has failed, and it is forgotten
        if not payload.is_taken and payload.is_wanted():
            raise ProtocolViolation(
                f"RECEIVED for payload {number} of stream {stream_id}, of which {payload.next_offset} of "
                f"{payload.total} bytes were sent"
            )
        del self._unconfirmed[home, stream_id, number]
        payload.is_received = True
        self._let_go(payload)
        self._forget_if_idle()

    def note_progress(
        self,
        lane: object,
        rtt: float,
        written: int,
        acknowledged: int,
        now: float,
        flow: Flow | None = None,
        silence: float = 0.0,
    ) -> None:
        """What a lane has written, what the peer's machine has of it, and what the kernel says of its connection.

        :param silence: seconds since it last heard anything
        """
        book = self.lanes.get(lane)
        if book is None:
            book = self.lanes[lane] = LaneBook(rtt, noted_at=now, moved_at=now)
        book.rtt, book.flow = rtt, flow
        book.note_progress(written, acknowledged, now)
        book.silence = min(silence, now - book.moved_at)

    def forget_done(self) -> None:
        """Keep nothing of payloads whose streams have failed: their memory is their senders' again."""
        gone = [key for key, payload in self._unconfirmed.items() if payload.is_done]
        for key in gone:
            self._let_go(self._unconfirmed.pop(key))
        self._forget_if_idle()

    def resume(self, lane: object, written: int, acknowledged: int, now: float) -> None:
        """The lane was not looked at for a while: what it did meanwhile says nothing of its rate."""
        book = self.lanes[lane]
        book.written, book.acknowledged, book.noted_at, book.moved_at = written, acknowledged, now, now

    def next_piece(self, lane: object) -> tuple[Outgoing, int] | None:
        """What this lane, which has room, sends next: a payload, and the first byte of the piece."""
        while self._again:
            payload, offset = self._again.popleft()
            if not payload.is_done:
                return payload, offset
        while self._waiting:
            payload = self._waiting.popleft()
            if payload.is_done:
                continue
            offset = payload.next_offset
            payload.next_offset += CHUNK_BYTES
            if not payload.is_taken:
                self._waiting.append(payload)
            return payload, offset
        return self._find_late(lane)

    def note_sent(self, lane: object, payload: Outgoing, offset: int, written: int, now: float) -> None:
        """The piece is the last one of the first ``written`` bytes of the lane."""
        book = self.lanes[lane]
        if book.written <= book.acknowledged:
            book.noted_at = book.moved_at = now  # it was idle until now
            book.silence = 0.0
        book.flying.append(_Sent(payload, offset, written, now))
        book.written = written
        copies = payload.copies.get(offset, 0)
        payload.copies[offset] = copies + 1
        if copies:
            self.resent += payload.piece(offset).size

    def remove_lane(self, lane: object) -> None:
        """The lane is gone, and with it, perhaps, what it carried."""
        book = self.lanes.pop(lane, None)
        if book is None:
            return
        self._late = [late for late in self._late if late[1] is not lane]
        for payload, offsets in book.landed.items():
            if not payload.is_done:
                elsewhere = {at for other in self.lanes.values() for at in other.landed.get(payload, ())}
                payload.landed.difference_update(set(offsets) - elsewhere)
                for offset in offsets:
                    self._lose_copy(payload, offset)
        for sent in book.flying:
            if not sent.payload.is_done:
                self._lose_copy(sent.payload, sent.offset)

    def _lose_copy(self, payload: Outgoing, offset: int) -> None:
        """A lane that is gone has carried the piece: it is sent again, unless another lane carries it or has brought
        it to the peer's machine.
        """
        payload.copies[offset] -= 1
        if not payload.copies[offset]:
            self._again.append((payload, offset))

    def dead_lanes(self, now: float, heard_elsewhere: float = -math.inf) -> list[object]:
        """Lanes of which all packets vanish while others move.

        :param heard_elsewhere: when the peer was last heard of on a connection that is no lane
        """
        moved = sorted((book.moved_at for book in self.lanes.values()), reverse=True)
        latest, second = [*moved, -math.inf, -math.inf][:2]
        return [
            lane
            for lane, book in self.lanes.items()
            if book.flow is not None
            and is_dead(
                book.flow,
                book.silence,
                now - max(heard_elsewhere, second if book.moved_at == latest else latest),
            )
        ]

    def look_for_late(self, now: float) -> None:
        """Find the pieces that would take longest where they are soonest, if there is nothing else to send."""
        self.forget_done()
        self._late.clear()
        if not self.is_starved:
            return
        soonest: dict[tuple[Outgoing, int], tuple[float, object, _Sent]] = {}
        for lane, book in self.lanes.items():
            for sent in book.flying:
                if sent.payload.is_done or sent.offset in sent.payload.landed:
                    continue
                seconds, key = book.seconds_until(sent.end), (sent.payload, sent.offset)
                if key not in soonest or seconds < soonest[key][0]:
                    soonest[key] = seconds, lane, sent
        self._late = [
            (seconds / self.lanes[lane].patience, lane, sent)
            for seconds, lane, sent in soonest.values()
            if self._may_be_late(lane, sent, now)
        ]
        self._late.sort(key=lambda one: -one[0])

    def _may_be_late(self, lane: object, sent: _Sent, now: float) -> bool:
        copies = sent.payload.copies.get(sent.offset, 0)
        return copies < MAX_COPIES and now - sent.at >= max(LEAST_AGE, 2 * self.lanes[lane].rtt) * copies

    def _find_late(self, lane: object) -> tuple[Outgoing, int] | None:
        """The piece that would take longest where it is, if this lane is much faster."""
        needs = max(self.lanes[lane].seconds_for(CHUNK_BYTES), LEAST_SECONDS)
        for index, (seconds, holder, sent) in enumerate(self._late):
            if seconds <= needs:
                break
            if holder is not lane and not sent.payload.is_done and not self._holds(lane, sent):
                del self._late[index]
                return sent.payload, sent.offset
        return None

    def _holds(self, lane: object, piece: _Sent) -> bool:
        """Whether the lane carries a copy of the piece: one more behind it would come later, and count as a copy."""
        flying = self.lanes[lane].flying
        return any(sent.payload is piece.payload and sent.offset == piece.offset for sent in flying)

    def _let_go(self, payload: Outgoing) -> None:
        payload.let_go()
        for book in self.lanes.values():
            book.landed.pop(payload, None)

    def _forget_if_idle(self) -> None:
        if self._unconfirmed:
            return
        self._waiting.clear()
        self._again.clear()
        self._late.clear()
        for book in self.lanes.values():
            book.flying.clear()
            book.landed.clear()
