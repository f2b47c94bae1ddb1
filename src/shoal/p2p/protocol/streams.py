"""All calls and streams of one connection, sans I/O: frames in, streams and frames out.

Theory of operation. Each side opens streams with ids of its own parity, in rising order. A
:class:`~shoal.p2p.protocol.stream_state.StreamState`, which holds the rules of one stream, leaves the table when both
its directions have ended. Frames for ids that were used before are late and are ignored; frames for ids that were never
used break the protocol. So does everything else that raises :class:`ProtocolViolation` here: it ends the connection.
"""

from __future__ import annotations

from collections.abc import Callable

from shoal.errors import ProtocolViolation, RemoteError, ShoalError
from shoal.p2p.protocol import wire
from shoal.p2p.protocol.codes import ResetCode
from shoal.p2p.protocol.frames import MAX_STREAM_ID, FrameKind, Piece, is_opened_by
from shoal.p2p.protocol.stream_state import SendFrame, StreamState
from shoal.p2p.protocol.unread import UnreadBytes


def _keep_payload() -> None:
    """Stands for a session whose payloads go where they go."""


def _stripe_nothing(_stream_id: int, _number: int) -> None:
    """Stands for a sender that stripes no payloads."""


def _raise(violation: ProtocolViolation) -> None:
    """Stands for a connection that ends itself."""
    raise violation


class Multiplexer:
    """All streams of one connection.

    ``send_frame`` puts a frame on its way; it is called in the frames' order. ``discard_payload`` makes the rest of
    the payload that is arriving go elsewhere than into the memory that was given for it. ``striped_received`` hears
    that the peer has all of a striped payload, by stream and number. ``violate`` ends the connection; it is called
    where the peer broke the protocol by what came on another one.
    """

    def __init__(
        self,
        *,
        is_initiator: bool,
        send_frame: SendFrame,
        max_inbound: int,
        max_unread: int,
        discard_payload: Callable[[], None] = _keep_payload,
        striped_received: Callable[[int, int], None] = _stripe_nothing,
        violate: Callable[[ProtocolViolation], None] = _raise,
    ) -> None:
        self._send_frame = send_frame
        self._striped_received = striped_received
        self._violate = violate
        self._discard_payload = discard_payload
        self._is_initiator = is_initiator
        self._next_id = 1 if is_initiator else 2
        self._last_peer_id = 0 if is_initiator else -1
        self._max_inbound = max_inbound
        self._unread = UnreadBytes(max_unread)
        self._streams: dict[int, StreamState] = {}
        self._inbound = 0
        self._payload: tuple[StreamState | None, bool] = (None, False)

    @property
    def open_streams(self) -> int:
        """Streams that have not ended."""
        return len(self._streams)

    def open(self, method: str, timeout: float | None, message: bytes | None, *, final: bool) -> StreamState:
        """Begin a stream; with a message and ``final`` it is a unary call."""
        if self._next_id > MAX_STREAM_ID:
            raise OverflowError("all stream ids of this connection are used")
        body = wire.encode_open(method, timeout, final, message)
        state = StreamState(self._next_id, self._send_frame, self._forget)
        self._next_id += 2
        state.local_finished = final
        if message is not None:
            state.charge(len(message))
        self._streams[state.id] = state
        self._send_frame(FrameKind.OPEN, state.id, body)
        return state

    def receive_open(self, stream_id: int, body: bytes) -> tuple[StreamState, wire.Open] | None:
        """The stream that the peer begins, or None if it was refused because there is too much already.

        The handler that serves it calls :meth:`release` when done with it.
        """
        if stream_id <= self._last_peer_id:
            raise ProtocolViolation(f"OPEN with stream id {stream_id} after {self._last_peer_id}")
        self._last_peer_id = stream_id
        opened = wire.decode_open(body)
        if self._inbound >= self._max_inbound:
            refusal = wire.encode_reset(
                ResetCode.BUSY, f"{self._max_inbound} streams are being served on this connection"
            )
            self._send_frame(FrameKind.RESET, stream_id, refusal)
            return None
        state = StreamState(stream_id, self._send_frame, self._forget, self._unread)
        if opened.has_message:
            state.receive_message(bytes(opened.message))
            if state.is_closed:
                return None
        state.remote_finished = opened.final
        self._streams[stream_id] = state
        self._inbound += 1
        return state, opened

    def release(self, state: StreamState) -> None:
        """A stream that :meth:`receive_open` returned is served no more."""
        self._inbound -= 1
        state.release()

    def receive_frame(self, kind: FrameKind, stream_id: int, body: bytes) -> None:
        """MESSAGE, END, RESET, CREDIT, STRIPED or RECEIVED."""
        state = self._find(kind.name, stream_id)
        if kind is FrameKind.CREDIT:
            count = wire.decode_credit(body)
            if state is not None:
                state.receive_credit(count)
        elif kind is FrameKind.RESET:
            reset = wire.decode_reset(body)
            if state is not None:
                state.fail(RemoteError(reset.code, reset.message or "the peer reset the stream"))
        elif kind is FrameKind.RECEIVED:
            number = wire.decode_received(body)
            if state is not None:  # else it was left meanwhile, and what it had sent does not matter
                state.check_confirmation(number)
            self._striped_received(stream_id, number)
            if state is not None:
                state.receive_confirmation(number)
        elif kind is FrameKind.STRIPED:
            number, tag, length = wire.decode_striped(body)
            if state is not None:
                state.receive_striped(number, tag, length)
        elif state is not None:
            if kind is FrameKind.MESSAGE:
                state.receive_message(body)
            else:
                state.receive_end(body)

    def payload_memory(self, stream_id: int, tag: int, length: int) -> memoryview:
        """Where the payload goes whose header has arrived."""
        state = self._find("PAYLOAD", stream_id)
        if state is None:
            self._payload = (None, False)
            return memoryview(bytearray(length))
        memory = state.payload_memory(tag, length)
        self._payload = (state, state.has_sink)
        return memory

    def receive_payload(self, stream_id: int, tag: int, data: memoryview) -> None:
        """The payload has arrived whole for which :meth:`payload_memory` was asked last."""
        state, placed = self._payload
        assert state is None or state.id == stream_id
        self._payload = (None, False)
        if state is not None and not state.is_closed:
            state.receive_payload(tag, data, placed)

    def piece_memory(self, piece: Piece) -> memoryview | None:
        """Where a piece belongs that has arrived, on whichever connection; None: nowhere.

        A piece that breaks the protocol, or is refused by the application, ends the connection of its stream, and not
        the one that has brought it: there it would come again, on another lane.
        """
        try:
            state = self._find("PIECE", piece.stream_id)
            return None if state is None else state.piece_memory(piece)
        except ProtocolViolation as violation:
            self._violate(violation)
            return None

    def receive_piece(self, piece: Piece) -> None:
        """A piece was verified, and is where :meth:`piece_memory` said."""
        state = self._streams.get(piece.stream_id)
        try:
            if state is not None:
                state.receive_piece(piece)
        except ProtocolViolation as violation:
            self._violate(violation)

    def fail_all(self, failure: Callable[[], ShoalError]) -> None:
        """The connection has ended: every stream fails, each with an error of its own."""
        for state in list(self._streams.values()):
            state.fail(failure())

    def _find(self, what: str, stream_id: int) -> StreamState | None:
        state = self._streams.get(stream_id)
        if state is None:
            is_own = is_opened_by(self._is_initiator, stream_id)
            known = stream_id < self._next_id if is_own else stream_id <= self._last_peer_id
            if not known:
                raise ProtocolViolation(f"{what} for stream {stream_id}, which was never opened")
        return state

    def _forget(self, state: StreamState) -> None:
        self._streams.pop(state.id, None)
        if self._payload[0] is state:
            # The application has taken back the memory into which a payload was arriving.
            self._payload = (None, False)
            self._discard_payload()
