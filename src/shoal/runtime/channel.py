"""Frames and file descriptors over the private socket pair between a user process and its background process.

Used by both sides, on any thread; never blocks. Trusts its other end: only these two processes hold the
socket.
"""

from __future__ import annotations

import array
import os
import socket
import struct
import threading
from collections import deque
from collections.abc import Callable, Sequence
from enum import IntEnum
from typing import NamedTuple

_HEADER = struct.Struct("<QQIBB")  # length of the body, call, service, kind, number of descriptors
_READ_SIZE = 64 * 1024
_MAX_DESCRIPTORS = 64
_ANCILLARY_SIZE = socket.CMSG_SPACE(_MAX_DESCRIPTORS * array.array("i").itemsize)
_PATIENCE = 0.05
"""Seconds to wait for a thread that is sending. That takes microseconds, unless a signal handler has interrupted it,
which may wait in turn for the one that waits here.
"""
_CLOSE_ON_EXEC = getattr(socket, "MSG_CMSG_CLOEXEC", 0)


class Kind(IntEnum):
    """What a frame is. Each direction counts its calls; RESULT, ERROR and CANCELLED answer one."""

    READY = 1  # the process runs its event loop
    STATE = 2  # what the process has to know of its user process: sys.path, log levels
    CREATE = 3  # a call that makes a service
    CLOSE = 4  # a call that closes a service
    CALL = 5  # a command for a service, or from a service to its handler in the user process
    CANCEL = 6  # the caller wants no result any more
    RESULT = 7
    ERROR = 8
    CANCELLED = 9  # the command ended by cancelling itself
    LOG = 10
    SHUTDOWN = 11
    PING = 12  # the process lives; answered by PONG
    PONG = 13


class Frame(NamedTuple):
    kind: Kind
    call: int
    service: int
    body: bytes
    descriptors: tuple[int, ...]


class Channel:
    """One end of the socket pair.

    :param watch_writable: called with true when bytes wait for room in the socket (then call :meth:`flush`
        when it is writable), with false when all are sent. May be called on any thread that sends.
    """

    def __init__(self, sock: socket.socket, watch_writable: Callable[[bool], None]) -> None:
        sock.setblocking(False)
        self._socket = sock
        self._watch_writable = watch_writable
        # Re-entrant, because signal handlers and garbage collection may send while their thread is sending.
        self._lock = threading.RLock()
        self._unsent: deque[tuple[memoryview, Sequence[int]]] = deque()
        self._unsent_bytes = 0
        self._buffer = memoryview(bytearray(_READ_SIZE))
        self._received = bytearray()  # what is not a whole frame yet
        self._descriptors: deque[int] = deque()
        self.closed = False

    def fileno(self) -> int:
        return self._socket.fileno()

    @property
    def unsent_bytes(self) -> int:
        """Bytes that wait here because the other side does not read."""
        return self._unsent_bytes

    def send(
        self,
        kind: Kind,
        *,
        call: int = 0,
        service: int = 0,
        body: bytes = b"",
        descriptors: Sequence[int] = (),
    ) -> None:
        """Send a frame, or queue what the socket has no room for now.

        :raises BrokenPipeError: the channel is closed, here or by the other side
        """
        if len(descriptors) > _MAX_DESCRIPTORS:
            raise ValueError(
                f"at most {_MAX_DESCRIPTORS} descriptors can be sent at once, not {len(descriptors)}"
            )
        data = _HEADER.pack(len(body), call, service, kind, len(descriptors)) + body
        with self._lock:
            if self.closed:
                raise BrokenPipeError("the channel is closed")
            if self._unsent:
                # The descriptors have to stay open until they are sent, whatever the caller does meanwhile.
                self._queue(memoryview(data), [os.dup(descriptor) for descriptor in descriptors])
                return
            sent = self._send_now(data, descriptors)
            if sent == len(data):
                return
            kept = [os.dup(descriptor) for descriptor in descriptors] if sent == 0 else []
            self._queue(memoryview(data)[sent:], kept)
            self._watch_writable(True)

    def flush(self) -> None:
        """Send what is queued, as far as the socket has room. Does nothing while a thread was interrupted as it sent:
        call it again when the socket is writable still.

        :raises BrokenPipeError: the other side is gone
        """
        if not self._lock.acquire(timeout=_PATIENCE):
            return
        try:
            while self._unsent and not self.closed:
                data, descriptors = self._unsent[0]
                sent = self._send_now(data, descriptors)
                if sent:
                    self._unsent_bytes -= sent
                    for descriptor in descriptors:
                        os.close(descriptor)
                    self._unsent[0] = (data[sent:], ())
                if sent < len(data):
                    return
                self._unsent.popleft()
            self._watch_writable(False)
        finally:
            self._lock.release()

    def receive(self) -> list[Frame]:
        """The frames that have arrived whole by now; the receiver owns their descriptors.

        :raises EOFError: the other side closed the channel or is gone
        """
        try:
            count, ancillary, _, _ = self._socket.recvmsg_into(
                [self._buffer], _ANCILLARY_SIZE, _CLOSE_ON_EXEC
            )
        except (BlockingIOError, InterruptedError):
            return []
        except OSError as error:
            raise EOFError(str(error)) from error
        for level, kind, payload in ancillary:
            if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
                self._add_descriptors(payload)
        if not count:
            raise EOFError("the other side closed the channel")
        self._received += self._buffer[:count]
        return self._take_frames()

    def close(self) -> None:
        """Close this end; idempotent. What was not sent is dropped."""
        is_free = self._lock.acquire(timeout=_PATIENCE)
        try:
            if self.closed:
                return
            self.closed = True
            self._socket.close()
            for _, descriptors in self._unsent:
                for descriptor in descriptors:
                    os.close(descriptor)
            self._unsent.clear()
            self._unsent_bytes = 0
        finally:
            if is_free:
                self._lock.release()
        while self._descriptors:
            os.close(self._descriptors.popleft())

    def abandon(self) -> None:
        """Drop this end in a forked child, without the lock, which a lost thread may hold."""
        self.closed = True
        self._socket.close()

    def _queue(self, data: memoryview, descriptors: Sequence[int]) -> None:
        self._unsent.append((data, descriptors))
        self._unsent_bytes += len(data)

    def _send_now(self, data: bytes | memoryview, descriptors: Sequence[int]) -> int:
        try:
            if not descriptors:
                return self._socket.send(data)
            rights = (socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", descriptors))
            return self._socket.sendmsg([data], [rights])
        except (BlockingIOError, InterruptedError):
            return 0
        except (BrokenPipeError, ConnectionError) as error:
            raise BrokenPipeError("the other side is gone") from error

    def _add_descriptors(self, payload: bytes) -> None:
        descriptors = array.array("i")
        descriptors.frombytes(payload[: len(payload) - len(payload) % descriptors.itemsize])
        for descriptor in descriptors:
            if not _CLOSE_ON_EXEC:
                os.set_inheritable(descriptor, False)
            self._descriptors.append(descriptor)

    def _take_frames(self) -> list[Frame]:
        received = self._received
        frames = []
        offset = 0
        while len(received) - offset >= _HEADER.size:
            length, call, service, kind, count = _HEADER.unpack_from(received, offset)
            end = offset + _HEADER.size + length
            if len(received) < end:
                break
            # The descriptors came with the frame's first byte at the latest.
            descriptors = tuple(self._descriptors.popleft() for _ in range(count))
            body = bytes(memoryview(received)[offset + _HEADER.size : end])
            frames.append(Frame(Kind(kind), call, service, body, descriptors))
            offset = end
        if offset:
            del received[:offset]
        return frames
