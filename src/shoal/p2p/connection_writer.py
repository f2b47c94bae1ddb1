"""What goes out on one connection: frames in order, payloads in pieces, and the streams that wait for room.

The session encrypts, the transport takes. Between them, this keeps little ciphertext queued at a time and holds frames
back while a payload is under way. It bounds what a peer that does not read can make this side hold.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable

from shoal.p2p import tcp_info
from shoal.p2p.config import KIB, MIB
from shoal.p2p.protocol.frames import CHUNK_BYTES, FrameKind, Piece
from shoal.p2p.protocol.session import Session
from shoal.p2p.protocol.stream_state import StreamState
from shoal.p2p.sockets import unsent_bytes
from shoal.p2p.turns import SendingTurns

WRITE_HIGH = 1 * MIB
WRITE_LOW = 256 * KIB
PAYLOAD_CHUNK = 512 * KIB
"""A longer payload is encrypted in pieces of this size, each when the transport has room. The cache holds one until the
kernel has copied it; larger ones cost twice as much."""
UNSENT_SECONDS = 0.04
"""With several lanes the kernel of each holds what it sends in this time beyond what is on its way. A slow one would
sit on more, and with less a fast one would stand still until this process comes to fill it again;"""
LEAST_UNSENT = 16 * KIB
"""but not less than this,"""
MOST_UNSENT = 1 * MIB
"""and not more than this."""
MAX_UNREAD_ANSWERS = 4096
"""Answers that may be queued for a peer that does not read; more is an attempt to make us hold memory."""

ANSWERS = frozenset({FrameKind.PONG, FrameKind.RESET})


def unsent_bound(rate: float) -> int:
    """Bytes that the kernel of a lane holds unsent, which carries so many bytes a second."""
    return max(LEAST_UNSENT, min(int(rate * UNSENT_SECONDS), MOST_UNSENT))


class ConnectionWriter:
    """See the module.

    :param turns: to send payloads, of all connections of the host
    :param peer_does_not_read: called when too many answers are queued; it ends the connection
    """

    def __init__(self, session: Session, turns: SendingTurns, peer_does_not_read: Callable[[], None]) -> None:
        self.written = 0
        """Bytes handed to the transport so far."""
        self._session = session
        self._turns = turns
        self._peer_does_not_read = peer_does_not_read
        self._transport: asyncio.Transport | None = None
        self._is_ended = False
        self._is_paused = False
        self._is_batching = False
        self._payload_under_way = False
        self._is_reserved = self._has_entered = False
        """For a payload that is under way, or waits for its turn; which has entered among those that may be so."""
        self._held_frames: deque[tuple[FrameKind, int, bytes]] = deque()
        self._unread_answers = 0
        self._on_room: Callable[[], None] | None = None
        self._may_hold = 0
        self._write_waiters: dict[asyncio.Future[None], None] = {}  # ordered, as a set is not

    def connect(self, transport: asyncio.Transport) -> None:
        """Write to ``transport`` from now on."""
        transport.set_write_buffer_limits(high=WRITE_HIGH, low=WRITE_LOW)
        self._transport = transport

    @property
    def transport(self) -> asyncio.Transport | None:
        """What it writes to."""
        return self._transport

    def stripe(self, on_room: Callable[[], None]) -> None:
        """From now on this is one of several lanes: hold little, and call ``on_room`` when there is room again."""
        self._on_room = on_room
        if self._transport is not None:
            self._transport.set_write_buffer_limits(high=0)
            self.fit_to(0.0)

    def fit_to(self, rate: float) -> None:
        """As one of several lanes: hold no more than so many bytes a second call for."""
        nbytes = unsent_bound(rate)
        if self._transport is not None and not nbytes // 2 < self._may_hold < nbytes * 2:
            self._may_hold = nbytes
            tcp_info.keep_little_unsent(self._transport, nbytes)

    def end(self) -> None:
        """Take nothing more; what was written is still sent. Those that wait look again."""
        self._is_ended = True
        self._wake_writers()

    @property
    def unsent(self) -> int:
        """Bytes that the peer's machine has not taken yet."""
        return 0 if self._transport is None else unsent_bytes(self._transport)

    # Frames.

    @property
    def has_place_for_frame(self) -> bool:
        """Whether a frame would be sent now; in the middle of a payload there is no place for one."""
        return not self._payload_under_way

    def send_frame(self, kind: FrameKind, stream_id: int, body: bytes) -> None:
        """Send a frame, after the payload that is under way; nothing on a connection that has ended."""
        if self._is_ended:
            return
        if self._payload_under_way:
            self._held_frames.append((kind, stream_id, body))
        else:
            self._session.send_frame(kind, stream_id, body)
            if not self._is_batching:
                self.flush()
        if kind in ANSWERS and (self._is_paused or self._payload_under_way):
            self._unread_answers += 1
            if self._unread_answers > MAX_UNREAD_ANSWERS:
                self._peer_does_not_read()

    def flush(self) -> None:
        """Hand what is queued to the transport."""
        if self._transport is not None and not self._transport.is_closing():
            pieces = self._session.data_to_send()
            if pieces:
                self.written += sum(map(len, pieces))
                self._transport.writelines(pieces)

    def hold(self) -> None:
        """Frames leave in one write, at :meth:`let_go`."""
        self._is_batching = True

    def let_go(self) -> None:
        """Frames leave at once again, and those that were held leave now."""
        self._is_batching = False
        self.flush()

    # Room.

    def pause(self) -> None:
        """The transport has enough for now."""
        self._is_paused = True

    def resume(self) -> None:
        """The transport takes more."""
        self._is_paused = False
        self._unread_answers = 0
        self._wake_writers()

    @property
    def is_writable(self) -> bool:
        """Whether the socket takes more now; true on a connection that has ended, where streams have failed."""
        return not (self._is_paused or self._payload_under_way) or self._is_ended

    @property
    def takes_payload(self) -> bool:
        """Whether :meth:`send_payload` may be called now."""
        return self.is_writable and not self._is_reserved

    def add_write_waiter(self, waiter: asyncio.Future[None]) -> None:
        """Resolve ``waiter`` when :attr:`is_writable` may have become true."""
        self._write_waiters[waiter] = None

    def remove_write_waiter(self, waiter: asyncio.Future[None]) -> None:
        """Nobody waits for ``waiter`` any more."""
        self._write_waiters.pop(waiter, None)

    def _wake_writers(self) -> None:
        waiters, self._write_waiters = self._write_waiters, {}
        for waiter in waiters:
            if not waiter.done():
                waiter.set_result(None)
        if self._on_room is not None and self.is_writable and not self._is_ended:
            self._on_room()

    async def writable(self) -> None:
        """Wait until the socket takes more."""
        while not self.is_writable:
            await self._wait_to_write()

    async def _wait_to_write(self) -> None:
        waiter: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.add_write_waiter(waiter)
        try:
            await waiter
        finally:
            self.remove_write_waiter(waiter)

    # Payloads.

    async def send_payload(self, state: StreamState, tag: int, data: memoryview) -> None:
        """Send a payload whole; one of several MB in pieces, so that little ciphertext is queued at a time. Only while
        :attr:`takes_payload`.

        Once it has begun, its frame is completed whatever happens, or else the connection would be of no use: when
        the stream fails or the caller is cancelled, the rest is queued at once.
        """
        self._is_reserved, paid = True, 0
        step = max(1, (self._turns.quantum or PAYLOAD_CHUNK) // CHUNK_BYTES) * CHUNK_BYTES
        try:
            await self._turns.enter()
            self._has_entered = True
            # The first turn before the frame begins: frames are not held back meanwhile, and if this is given up,
            # there is nothing to complete.
            if self._turns.is_limited:
                first = min(step, data.nbytes)
                await self._turns.wait(first)
                paid = first
            if state.failure is None and not self._is_ended:
                first, paid = paid, 0
                await self._send_in_steps(state, tag, data, step, first)
        finally:
            self._turns.spend(-paid)
            self._leave()
            self._is_reserved = False
            self._wake_writers()

    def _leave(self) -> None:
        """Let another payload begin, also if this one is under way but its peer takes less than it may get."""
        if self._has_entered:
            self._has_entered = False
            self._turns.leave()

    async def _send_in_steps(
        self, state: StreamState, tag: int, data: memoryview, step: int, paid: int
    ) -> None:
        """:param step: bytes
        :param paid: for the first step, that is; the rest has turns of its own
        """
        pieces = self._session.send_payload_pieces(state.id, tag, data, step)
        begin = self.written
        self._payload_under_way = True
        try:
            for number, _ in enumerate(pieces):
                if number and self._turns.is_limited and state.failure is None:
                    price = min(step, data.nbytes - number * step)
                    await self._turns.wait(price)
                    paid += price
                self.flush()
                if self._is_paused and state.failure is None:
                    self._leave()
                    await self._drained(state)
                if self._is_ended:
                    return
        finally:
            if not self._is_ended:
                for _ in pieces:
                    pass
                self.flush()
            # What it really was: with headers and what is queued at once, without what never left.
            self._turns.spend(self.written - begin - paid)
            self._payload_under_way = False
            self._send_held_frames()

    def send_piece(self, piece: Piece, data: memoryview) -> None:
        """Send a piece of a striped payload; only while :attr:`is_writable`."""
        self._session.send_piece(piece, data)
        self.flush()

    async def _drained(self, state: StreamState) -> None:
        while self._is_paused and not self._is_ended and state.failure is None:
            await self._wait_to_write()

    def _send_held_frames(self) -> None:
        held, self._held_frames = self._held_frames, deque()
        if self._is_ended:
            return
        for kind, stream_id, body in held:
            self._session.send_frame(kind, stream_id, body)
        self.flush()
        if not self._is_paused:
            self._unread_answers = 0
