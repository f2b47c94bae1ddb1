"""The background process's own side: one event loop, the services on it, and the channel to the user process.

Imports only what every such process needs: its start-up time and memory are measured, and a DHT alone must
not load torch or NumPy.
"""

from __future__ import annotations

import asyncio
import faulthandler
import itertools
import logging
import os
import signal
import socket
import sys
import time
import traceback
from collections.abc import Awaitable, Callable, Mapping
from typing import Any, NoReturn

from shoal.errors import InvalidStateError, InvalidTypeError, ShoalError
from shoal.runtime import pickling
from shoal.runtime.channel import Channel, Frame, Kind
from shoal.runtime.descriptors import WithDescriptors, close_descriptors
from shoal.runtime.liveness import BEAT, SUSPICIOUS_SECONDS, Liveness
from shoal.runtime.logs import ForwardingHandler, OutputWriter
from shoal.runtime.messages import Setup, UserProcessState
from shoal.runtime.preload import Preload
from shoal.runtime.presence import Presence
from shoal.runtime.processes import is_stopped
from shoal.runtime.service import Service
from shoal.runtime.userwatch import watch_user_process
from shoal.sansio import trace
from shoal.utils import figures

logger = logging.getLogger(__name__)

USER_GONE_SECONDS = 1.5
"""How long services may take to say goodbye when there is no user process any more."""

GOODBYE_SECONDS = 0.1
"""How long services of a process that ends at once may withdraw what they have told others, before all is cut off."""

_HARD_LIMIT_SECONDS = 0.3  # after which the process ends even if its event loop is stuck
_TERMINATED_SECONDS = 2.0
_FLUSH_SECONDS = 0.2


class Context:
    """The :class:`~shoal.runtime.service.ServiceContext` of one service."""

    def __init__(self, server: Server, service_id: int, name: str) -> None:
        self._server = server
        self.service_id = service_id
        self.name = name

    @property
    def services(self) -> Mapping[int, Service]:
        return self._server.services

    @property
    def is_closing(self) -> bool:
        return self._server.is_ending or self.service_id not in self._server.services

    def find(self, name: str) -> Service:
        for service_id, context in self._server.contexts.items():
            if context.name == name and service_id in self._server.services:
                return self._server.services[service_id]
        raise InvalidStateError(f"no service named {name!r} is open in this process")

    async def call_user(self, command: object) -> object:
        return await self._server.call_user(self.service_id, command)

    @property
    def user(self) -> Presence:
        return self._server.user

    async def modules_ready(self) -> None:
        await self._server.modules_ready()

    def fail(self, error: ShoalError) -> None:
        self._server.fail(error)

    def when_ending(self, callback: Callable[[], None]) -> None:
        self._server.when_ending.append(callback)

    def set_log_fields(self, **fields: str) -> None:
        self._server.log_handler.fields.update(fields)


class Server:
    """Reads frames from the user process, runs services and their commands, and ends everything in order."""

    def __init__(self, loop: asyncio.AbstractEventLoop, sock: socket.socket, user_pid: int) -> None:
        self.user = Presence()
        self._user_pid = user_pid
        self._liveness = Liveness(user_pid, loop.time())
        self._awaits_pong = False
        self.services: dict[int, Service] = {}
        self.contexts: dict[int, Context] = {}
        self.failed = False
        self.is_ending = False
        self.when_ending: list[Callable[[], None]] = []
        self._loop = loop
        self._channel = Channel(sock, self._watch_writable)
        self.log_handler = ForwardingHandler(self._send_log, lambda: self._channel.unsent_bytes)
        self._calls: dict[int, asyncio.Task[None]] = {}
        self._calls_of: dict[int, set[int]] = {}
        self._untaken: dict[
            int, tuple[int, ...]
        ] = {}  # descriptors of calls whose service has not got them yet
        self._user_calls: dict[int, asyncio.Future[object]] = {}
        self._user_call_numbers = itertools.count(1)
        self._preload = Preload(loop)
        self._stop_within: asyncio.Future[float] = loop.create_future()
        self._all_sent = asyncio.Event()
        self._all_sent.set()
        self._handlers: dict[Kind, Callable[[Frame], None]] = {
            Kind.STATE: self._receive_state,
            Kind.CREATE: lambda frame: self._begin(frame, self._create),
            Kind.CLOSE: lambda frame: self._begin(frame, self._close),
            Kind.CALL: lambda frame: self._begin(frame, self._call),
            Kind.CANCEL: self._receive_cancel,
            Kind.RESULT: self._receive_result,
            Kind.ERROR: self._receive_result,
            Kind.PONG: self._receive_pong,
            Kind.SHUTDOWN: lambda frame: self.stop(pickling.loads(frame.body)),
        }

    async def run(self) -> None:
        """Serve until the user process says stop or is gone; returns when everything is closed."""
        self._loop.add_reader(self._channel.fileno(), self._on_readable)
        self._channel.send(Kind.READY)
        attending = self._loop.create_task(self._attend())
        attending.add_done_callback(_log_failure)
        seconds = await self._stop_within
        attending.cancel()
        deadline = self._loop.time() + seconds
        try:
            async with asyncio.timeout_at(deadline):
                await self._close_all()
        except TimeoutError:
            left = figures.count(len(self.services), "service")
            logger.warning("%s did not close within %s", left, figures.duration(seconds))
        await self._flush()

    def stop(self, seconds: float) -> None:
        """Begin to end the process in order, within this many seconds; only the first call counts."""
        if not self._stop_within.done():
            self._stop_within.set_result(seconds)

    def end(self, seconds: float) -> None:
        """As :meth:`stop`, for a process that nobody waits for: others are told at once that it ends."""
        self.stop(seconds)
        self._loop.call_later(GOODBYE_SECONDS, self._say_goodbye)

    def _say_goodbye(self) -> None:
        for callback in self.when_ending:
            callback()

    def fail(self, error: ShoalError) -> None:
        """Begin to end the process in order; its user process learns of ``error`` by the end of the log."""
        logger.error("%s", error)
        self.failed = True
        self.stop(_TERMINATED_SECONDS)

    def user_is_gone(self) -> None:
        """Runs on the watching thread: ends the process in order, or by force if its loop is stuck."""
        self._loop.call_soon_threadsafe(self.end, USER_GONE_SECONDS)
        time.sleep(USER_GONE_SECONDS + _HARD_LIMIT_SECONDS)
        os._exit(1)

    async def call_user(self, service_id: int, command: object) -> object:
        number = next(self._user_call_numbers)
        body = pickling.dumps(command, "the command", "the user process")
        future: asyncio.Future[object] = self._loop.create_future()
        self._user_calls[number] = future
        after = []
        if trace.is_watched():
            after = trace.publish(trace.Turn("user", "", self._loop.time(), command, ()))
        try:
            self._channel.send(Kind.CALL, call=number, service=service_id, body=body)
            for later in after:
                later()
            return await future
        except asyncio.CancelledError:
            if not self._channel.closed:
                self._channel.send(Kind.CANCEL, call=number, service=service_id)
            raise
        finally:
            del self._user_calls[number]

    async def modules_ready(self) -> None:
        await self._preload.finished()

    # What the user process sends

    def _on_readable(self) -> None:
        try:
            frames = self._channel.receive()
        except EOFError:
            self._loop.remove_reader(self._channel.fileno())
            self.end(USER_GONE_SECONDS)
            return
        for frame in frames:
            self._handlers[frame.kind](frame)

    def _receive_state(self, frame: Frame) -> None:
        message = pickling.loads(frame.body)
        if isinstance(message, Setup):
            self._preload.names = message.preload
            for name, value in message.environment:
                if value is None:
                    os.environ.pop(name, None)
                else:
                    os.environ[name] = value
            message = message.state
        assert isinstance(message, UserProcessState)
        sys.path[:] = message.path
        for name, level in message.levels:
            logging.getLogger(name or None).setLevel(level)

    def _receive_cancel(self, frame: Frame) -> None:
        if (task := self._calls.get(frame.call)) is not None:
            task.cancel()

    def _receive_result(self, frame: Frame) -> None:
        future = self._user_calls.get(frame.call)
        attached = WithDescriptors(None, frame.descriptors)
        if future is None or future.done():
            return  # cancelled meanwhile
        if frame.kind is Kind.ERROR:
            future.set_exception(pickling.load_error(frame.body))
            return
        try:
            value = _load(frame.body, "an answer of the user process")
        except InvalidTypeError as error:
            future.set_exception(error)
            return
        attached.value = value
        future.set_result(attached if frame.descriptors else value)

    # Whether the user's process lives

    async def _attend(self) -> None:
        """Show the user process that this process lives, and notice when the user process does not."""
        while True:
            await asyncio.sleep(BEAT)
            # One at a time: a user process that does not read is not sent more and more of them.
            if not self._awaits_pong:
                self._awaits_pong = True
                try:
                    self._channel.send(Kind.PING)
                except BrokenPipeError:
                    self.end(USER_GONE_SECONDS)
                    return
            if self._liveness.look(self._loop.time()) < SUSPICIOUS_SECONDS:
                continue
            stopped = await asyncio.to_thread(is_stopped, self._user_pid)
            silence = self._liveness.silence(self._loop.time(), is_stopped=stopped)
            if silence.is_absence and self.user.absence is None:
                what = silence.describe("by Ctrl+Z, SIGSTOP or a debugger", "'fg' or ")
                self.user.update(f"user's process (pid {silence.pid}) {what}")
                logger.warning("the %s. Nothing that needs it goes on until then", self.user.absence)

    def _receive_pong(self, _: Frame) -> None:
        self._awaits_pong = False
        if self.user.absence is not None:
            seconds = self._liveness.silence(self._loop.time(), is_stopped=False).seconds
            logger.warning("the user's process (pid %d) answers again, after %.0f s", self._user_pid, seconds)
        self._liveness.hear(self._loop.time())
        self.user.update(None)

    # Calls from the user process

    def _begin(self, frame: Frame, method: Callable[[Frame], Awaitable[object]]) -> None:
        task = self._loop.create_task(self._answer(frame, method))
        self._calls[frame.call] = task
        self._calls_of.setdefault(frame.service, set()).add(frame.call)

        self._untaken[frame.call] = frame.descriptors

        def forget(task: asyncio.Task[None]) -> None:
            del self._calls[frame.call]
            self._calls_of[frame.service].discard(frame.call)
            close_descriptors(self._untaken.pop(frame.call, ()))
            if task.cancelled():
                self._reply(Kind.CANCELLED, frame.call, b"")
            elif (error := task.exception()) is not None:
                logger.error("a command could not be answered", exc_info=error)

        task.add_done_callback(forget)

    async def _answer(self, frame: Frame, method: Callable[[Frame], Awaitable[object]]) -> None:
        try:
            result = await method(frame)
            kind, body = Kind.RESULT, pickling.dumps(result, "the result", "the user process")
        except asyncio.CancelledError:
            raise
        except Exception as error:  # noqa: BLE001 - the task's outer edge: the user process raises it again
            kind, body = Kind.ERROR, pickling.dump_error(error)
        except BaseException as error:  # noqa: BLE001
            # SystemExit and the like, raised by code of users: it must neither end the process under everybody
            # else, nor leave the user process waiting.
            kind, body = Kind.ERROR, pickling.dump_error(ShoalError(f"the command raised {error!r}"))
        self._reply(kind, frame.call, body)

    def _reply(self, kind: Kind, call: int, body: bytes) -> None:
        if self.failed:  # what is cut off now says nothing: those who wait hear of the process's end
            return
        try:
            self._channel.send(kind, call=call, body=body)
        except BrokenPipeError:
            self.end(USER_GONE_SECONDS)

    async def _create(self, frame: Frame) -> None:
        # On a thread: the factory's module may import much.
        name, factory = await self._loop.run_in_executor(None, _load, frame.body, "the service's factory")
        context = Context(self, frame.service, name)
        try:
            self.services[frame.service] = await factory(context)
            self.contexts[frame.service] = context
        finally:
            self._preload.start()

    async def _call(self, frame: Frame) -> object:
        service = self.services.get(frame.service)
        if service is None:
            raise InvalidStateError("the service in the background process is closed")
        command = _load(frame.body, "a command")
        return await service.carry_out(command, self._untaken.pop(frame.call))

    async def _close(self, frame: Frame) -> None:
        service = self.services.pop(frame.service, None)
        self.contexts.pop(frame.service, None)
        # Among them may be the one that makes the service, whose end is awaited: nothing comes to be afterwards.
        await self._cancel_calls(self._calls_of.get(frame.service, set()) - {frame.call})
        if service is not None:
            await service.close()

    async def _cancel_calls(self, numbers: set[int]) -> None:
        tasks = [self._calls[number] for number in numbers if number in self._calls]
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks)

    # The end

    async def _close_all(self) -> None:
        self.is_ending = True
        await self._cancel_calls(set(self._calls))
        # The last made first: an averager before the DHT that it uses.
        for service_id in reversed(list(self.services)):
            service = self.services[service_id]
            try:
                await service.close()
            except Exception:  # one service's failure must not keep the others from closing
                logger.exception("%s failed to close", type(service).__name__)
            del self.services[service_id]

    async def _flush(self) -> None:
        try:
            async with asyncio.timeout(_FLUSH_SECONDS):
                await self._all_sent.wait()
        except TimeoutError:
            pass  # the user process does not read: nobody will miss the rest

    # Helpers

    def _send_log(self, record: bytes) -> None:
        self._channel.send(Kind.LOG, body=record)

    def _watch_writable(self, wanted: bool) -> None:
        self._loop.call_soon_threadsafe(self._set_writer, wanted)

    def _set_writer(self, wanted: bool) -> None:
        if self._channel.closed:
            return
        if wanted:
            self._all_sent.clear()
            self._loop.add_writer(self._channel.fileno(), self._on_writable)
        else:
            self._all_sent.set()
            self._loop.remove_writer(self._channel.fileno())

    def _on_writable(self) -> None:
        try:
            self._channel.flush()
        except BrokenPipeError:
            self._set_writer(False)
            self.end(USER_GONE_SECONDS)


def _log_failure(task: asyncio.Task[None]) -> None:
    if not task.cancelled() and (error := task.exception()) is not None:
        logger.error("the user process is watched no longer", exc_info=error)


def _load(data: bytes, what: str) -> Any:
    try:
        return pickling.loads(data)
    except Exception as error:  # anything may be raised by a module that is imported here
        raise InvalidTypeError(f"{what} could not be loaded in the background process: {error!r}") from error


def _new_event_loop() -> asyncio.AbstractEventLoop:
    try:
        import uvloop
    except ImportError:
        return asyncio.new_event_loop()
    return uvloop.new_event_loop()


def main() -> NoReturn:
    """Run the process: ``shoal.runtime.child DESCRIPTOR USER_PID NAME``."""
    descriptor, user_pid = int(sys.argv[1]), int(sys.argv[2])
    faulthandler.enable(file=2)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the user process decides what Ctrl+C means
    os.set_inheritable(descriptor, False)
    loop = _new_event_loop()
    asyncio.set_event_loop(loop)
    server = Server(loop, socket.socket(fileno=descriptor), user_pid)
    terminated = False

    def terminate() -> None:
        nonlocal terminated
        terminated = True
        logger.warning("the background process received SIGTERM: it ends")
        server.end(_TERMINATED_SECONDS)

    try:
        logging.getLogger().addHandler(server.log_handler)
        sys.stdout, sys.stderr = OutputWriter(logging.INFO), OutputWriter(logging.WARNING)
        loop.add_signal_handler(signal.SIGTERM, terminate)
        watch_user_process(user_pid, server.user_is_gone)
        loop.run_until_complete(server.run())
    except BaseException:  # noqa: BLE001 - the process's outer edge: the user process shows what is written to descriptor 2
        os.write(2, traceback.format_exc().encode())
        os._exit(1)
    if terminated:
        loop.remove_signal_handler(signal.SIGTERM)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        os.kill(os.getpid(), signal.SIGTERM)
    # Not sys.exit: threads of users, or an import that goes on, must not hold the process.
    os._exit(1 if server.failed else 0)
