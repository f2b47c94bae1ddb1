"""One background process as the user process's threads see it: its channel, calls under way, its output and its end.

Not referred to by the objects that users hold alone: the receiving thread keeps it until the process has
ended.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import selectors
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

from shoal.errors import InvalidStateError, PeerProcessDied, ShoalError
from shoal.runtime import logs, pickling
from shoal.runtime.attendance import Attendance
from shoal.runtime.channel import Channel, Frame, Kind
from shoal.runtime.futures import MPFuture
from shoal.runtime.handlers import Handler, Handlers
from shoal.runtime.liveness import BEAT
from shoal.runtime.messages import UserProcessState
from shoal.runtime.workers import SerialThread

_TAIL_LINES = 40
_MAX_LOG_BACKLOG = 10_000
_TERMINATE_SECONDS = 0.5
_END_SECONDS = 2.0
_KILL_SECONDS = 10.0

_GRACE_SECONDS = 1.0
"""By so much an answer may come after the time that its call has: the process keeps that time itself."""


class _Call(NamedTuple):
    """A call under way; ``deadline`` is when its answer is due, by the steady clock."""

    future: MPFuture[Any]
    convert: Callable[[Any], Any] | None
    deadline: float | None


class ProcessLink:
    """See the module. Every method may be called on any thread."""

    def __init__(self, name: str, process: subprocess.Popen[bytes], sock: socket.socket, output: int) -> None:
        self.name = name
        self.pid = process.pid
        self.ready = threading.Event()
        self.ended = threading.Event()
        self.state: UserProcessState | None = None
        self.on_end: Callable[[ProcessLink], None] = lambda _: None
        self.exit_status: int | None = None
        self._process = process
        self._output = output
        self._output_line = b""
        self._selector = selectors.DefaultSelector()
        self._channel = Channel(sock, self._watch_writable)
        self._numbers = itertools.count(1)
        self._service_numbers = itertools.count(1)
        self._pending: dict[int, _Call] = {}
        self._handlers = Handlers(self._channel)
        self._tail: deque[str] = deque(maxlen=_TAIL_LINES)
        self._reemitter = logs.Reemitter(name)
        self._log_thread = SerialThread(f"{name}-logs")
        self._log_thread.start()
        self._attendance = Attendance(name, process.pid, self._log_thread.submit)
        self._callback_thread = SerialThread(f"{name}-callbacks")
        self._forked = False
        self._shutdown_begun = False
        self._dead = False
        self._exit_watch = _open_pidfd(process.pid)
        self._selector.register(self._channel, selectors.EVENT_READ, self._on_channel)
        self._selector.register(output, selectors.EVENT_READ, self._on_output)
        if self._exit_watch is not None:
            self._selector.register(self._exit_watch, selectors.EVENT_READ, self._on_exit)
        self._running = True
        self._thread = threading.Thread(target=self._serve, name=f"{name}-receive", daemon=True)
        self._thread.start()

    @classmethod
    def spawn(cls, name: str, python_path: str | None, setup: bytes) -> ProcessLink:
        """Start the process, and send it its first message.

        :raises InvalidStateError: this interpreter does not know its own executable
        """
        if not sys.executable:
            raise InvalidStateError(
                "sys.executable is empty: Shoal cannot start its background process without it"
            )
        ours, theirs = socket.socketpair()
        output, their_output = os.pipe()
        environment = os.environ if python_path is None else {**os.environ, "PYTHONPATH": python_path}
        arguments = [str(theirs.fileno()), str(os.getpid()), name]
        try:
            process = subprocess.Popen(  # noqa: S603 - our own interpreter and module
                [sys.executable, "-P", "-m", "shoal.runtime.child", *arguments],
                stdin=subprocess.DEVNULL,
                stdout=their_output,
                stderr=their_output,
                pass_fds=[theirs.fileno()],
                start_new_session=True,
                env=environment,
            )
        except BaseException:
            ours.close()
            os.close(output)
            raise
        finally:
            theirs.close()
            os.close(their_output)
        link = cls(name, process, ours, output)
        with contextlib.suppress(BrokenPipeError):  # ended at once: the receiving thread tells
            link.send(Kind.STATE, setup)
        return link

    @property
    def is_alive(self) -> bool:
        return not (self._forked or self._dead)

    @property
    def log_tail(self) -> str:
        return "\n".join(list(self._tail))

    def check_process(self) -> None:
        """Raise InvalidStateError in a forked child."""
        if self._forked:
            raise InvalidStateError(
                f"the background process {self.name!r} belongs to the parent of this process, "
                "which was forked from it; use it in the parent only, or make a new one here"
            )

    def check_usable(self) -> None:
        """Raise InvalidStateError where no call can be made because of what the caller did."""
        self.check_process()
        if self._shutdown_begun:
            raise InvalidStateError(f"the background process {self.name!r} was shut down")

    def raise_if_dead(self) -> None:
        if self._dead:
            raise self._death()

    def send(self, kind: Kind, body: bytes) -> None:
        self._channel.send(kind, body=body)

    def call(
        self,
        kind: Kind,
        service: int,
        body: bytes,
        descriptors: Sequence[int] = (),
        *,
        convert: Callable[[Any], Any] | None = None,
        timeout: float | None = None,
    ) -> MPFuture[Any]:
        """Begin a call; ``convert`` makes the future's result of what the process answered.

        :param timeout: seconds that the process has for the answer. It keeps them itself; only when it does not answer
            at all, the call fails here, a moment later
        """
        number = next(self._numbers)
        future: MPFuture[Any] = MPFuture(
            partial(self._cancel, number), self._dispatch, self._attendance.unresponsive
        )
        deadline = None if timeout is None else time.monotonic() + timeout
        self._pending[number] = _Call(future, convert, deadline)
        with contextlib.suppress(BrokenPipeError):
            self._channel.send(kind, call=number, service=service, body=body, descriptors=descriptors)
        # _finish marks the death before it fails what is pending, so that one of the two always does; also where the
        # socket still takes bytes, because a child of the process holds its other end.
        if self._dead:
            self._fail(number)
        return future

    def new_service(self, handler: Handler | None, name: str) -> int:
        """A number for a service, and a thread for its handler."""
        number = next(self._service_numbers)
        if handler is not None:
            self._handlers.add(number, handler, f"{self.name}-{name or number}")
        return number

    def forget_service(self, number: int) -> None:
        self._handlers.remove(number)

    def begin_shutdown(self, timeout: float) -> None:
        """Ask the process to end in order; does not wait."""
        if self._forked or self._shutdown_begun:
            return
        self._shutdown_begun = True
        with contextlib.suppress(BrokenPipeError):
            self.send(Kind.SHUTDOWN, pickling.dumps(timeout))

    def shutdown(self, timeout: float) -> None:
        """End the process: in order within ``timeout`` seconds, then by SIGTERM, then by SIGKILL."""
        if self._forked:
            return
        self.begin_shutdown(timeout)
        if self.ended.wait(timeout):
            return
        self._process.terminate()
        if not self.ended.wait(_TERMINATE_SECONDS):
            self.kill()
            # No longer: in a signal handler, this very thread may hold what the receiving thread needs for its end.
            self.ended.wait(_KILL_SECONDS)

    def kill(self) -> None:
        self._process.kill()

    def abandon(self) -> None:
        """In a forked child: drop what is the parent's, without locks that lost threads may hold."""
        self._forked = True
        self._channel.abandon()
        for descriptor in (self._output, self._exit_watch):
            if descriptor is not None:
                with contextlib.suppress(OSError):
                    os.close(descriptor)
        self._selector.close()  # closes our copy only; nothing may be unregistered, since the parent shares the set
        self._process.returncode = 0  # not a child of this process: nothing to wait for

    # The receiving thread

    def _serve(self) -> None:
        try:
            while self._running:
                for key, events in self._selector.select(BEAT):
                    key.data(events)
                self._fail_late_calls()
            self._drain()
        finally:
            self._finish()

    def _fail_late_calls(self) -> None:
        """Fail the calls that a process which does not answer has no more time for."""
        error = self._attendance.look(len(self._pending))
        if error is None:
            return
        now = time.monotonic()
        for number, call in list(self._pending.items()):
            if call.deadline is not None and now >= call.deadline + _GRACE_SECONDS:
                self._fail(number, error)
                with contextlib.suppress(BrokenPipeError):  # should it go on, it need not do this any more
                    self._channel.send(Kind.CANCEL, call=number)

    def _on_channel(self, events: int) -> None:
        try:
            if events & selectors.EVENT_WRITE:
                self._channel.flush()
            if events & selectors.EVENT_READ:
                frames = self._channel.receive()
                self._attendance.hear()
                for frame in frames:
                    self._receive(frame)
        except (EOFError, BrokenPipeError):
            self._selector.unregister(self._channel)
            self._running = False

    def _on_output(self, _: int) -> None:
        data = os.read(self._output, 65536)
        if not data:
            self._selector.unregister(self._output)
        *lines, self._output_line = (self._output_line + data).split(b"\n")
        if not data and self._output_line:
            lines, self._output_line = [self._output_line], b""
        for line in lines:
            text = line.decode(errors="replace").rstrip()
            self._tail.append(text)
            self._log_thread.submit(partial(logs.emit, self._reemitter.output_record(text, self.pid)))

    def _on_exit(self, _: int) -> None:
        assert self._exit_watch is not None
        self._selector.unregister(self._exit_watch)
        self._running = False

    def _drain(self) -> None:
        """Take what was sent and printed until the end; the process has exited, or is about to."""
        self._reap()
        while events := self._selector.select(0):
            for key, mask in events:
                if key.fileobj != self._exit_watch:
                    key.data(mask & ~selectors.EVENT_WRITE)
            if all(key.fileobj == self._exit_watch for key, _ in events):
                break

    def _reap(self) -> None:
        try:
            status = self._process.wait(_END_SECONDS)
        except subprocess.TimeoutExpired:  # it closed the channel, and does not end
            self._process.kill()
            status = self._process.wait()
        self.exit_status = status

    def _receive(self, frame: Frame) -> None:
        match frame.kind:
            case Kind.LOG:
                self._receive_log(frame.body)
            case Kind.RESULT | Kind.ERROR | Kind.CANCELLED:
                self._receive_answer(frame)
            case Kind.CALL:
                self._handlers.receive(frame)
            case Kind.CANCEL:
                self._handlers.cancel(frame.call)
            case Kind.READY:
                self.ready.set()
            case Kind.PING:
                with contextlib.suppress(BrokenPipeError):
                    self._channel.send(Kind.PONG)
            case _:
                raise AssertionError(f"the background process sent {frame.kind!r}")

    def _receive_answer(self, frame: Frame) -> None:
        call = self._pending.pop(frame.call, None)
        if call is None:
            return  # cancelled here meanwhile
        future, convert = call.future, call.convert
        if frame.kind is Kind.CANCELLED:
            future.cancel()
        if not future.set_running_or_notify_cancel():
            return
        if frame.kind is Kind.ERROR:
            future.set_exception(pickling.load_error(frame.body))
            return
        try:
            result = pickling.loads(frame.body)
            if convert is not None:
                result = convert(result)
        except Exception as error:  # noqa: BLE001 - a result whose class fails to load; its caller is told
            future.set_exception(error)
        else:
            future.set_result(result)

    def _receive_log(self, body: bytes) -> None:
        record = self._reemitter.record_from(body)
        self._tail.extend(logs.summarize(record).splitlines())
        if self._log_thread.backlog < _MAX_LOG_BACKLOG:
            self._log_thread.submit(partial(logs.emit, record))

    def _finish(self) -> None:
        """The last thing that the receiving thread does: tell everybody who waits, and give everything back."""
        if self._forked:
            return
        if self.exit_status is None:  # the loop itself failed, which is a bug: its traceback follows
            self._process.kill()
            self._reap()
        self._dead = True
        for number in list(self._pending):
            self._fail(number)
        self._channel.close()
        os.close(self._output)
        if self._exit_watch is not None:
            os.close(self._exit_watch)
        self._selector.close()
        self._handlers.remove_all()
        self._callback_thread.stop()
        self._log_thread.stop(1.0)  # so that every record is out when shutdown() returns
        self.on_end(self)
        self.ready.set()
        self.ended.set()

    # Helpers

    def _watch_writable(self, wanted: bool) -> None:
        events = selectors.EVENT_READ | (selectors.EVENT_WRITE if wanted else 0)
        self._selector.modify(self._channel, events, self._on_channel)

    def _dispatch(self, callback: Callable[[], None]) -> None:
        """Run a future's callback, but not on the receiving thread: it may wait for results itself."""
        if threading.current_thread() is self._thread:
            self._callback_thread.submit(callback)
        else:
            callback()

    def _cancel(self, number: int) -> bool:
        if self._pending.pop(number, None) is None:
            return False
        with contextlib.suppress(BrokenPipeError):
            self._channel.send(Kind.CANCEL, call=number)
        return True

    def _fail(self, number: int, error: ShoalError | None = None) -> None:
        call = self._pending.pop(number, None)
        if call is not None and call.future.set_running_or_notify_cancel():
            call.future.set_exception(self._death() if error is None else error)

    def _death(self) -> PeerProcessDied:
        status = self.exit_status
        if self._shutdown_begun and status == 0:
            return PeerProcessDied(
                f"the background process {self.name!r} was shut down meanwhile", status, self.log_tail
            )
        tail = f"; the end of its log:\n{self.log_tail}" if self._tail else "; it logged nothing"
        text = f"the background process {self.name!r} (pid {self.pid}) {_describe(status)}{tail}"
        return PeerProcessDied(text, status, self.log_tail)


def _describe(status: int | None) -> str:
    if status is not None and status < 0:
        try:
            return f"was killed by {signal.Signals(-status).name} (exit status {status})"
        except ValueError:
            return f"was killed by signal {-status} (exit status {status})"
    return f"ended with exit status {status}"


def _open_pidfd(pid: int) -> int | None:
    if not hasattr(os, "pidfd_open"):
        return None
    try:
        return os.pidfd_open(pid)
    except OSError:  # an old kernel, or a sandbox that forbids it: the end of the channel tells as well
        return None
