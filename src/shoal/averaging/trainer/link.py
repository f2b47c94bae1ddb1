"""The link between an averager and its service in the background process: how it comes to be, what the service asks
for, and how it ends. :mod:`.life` says which state follows which.

Holds no reference to the averager itself, so that an averager that nobody refers to any more is collected.
"""

from __future__ import annotations

import contextlib
import logging
import os
import threading
import time
import weakref
from collections.abc import Callable
from concurrent.futures import CancelledError, Future
from functools import partial
from typing import TYPE_CHECKING, Any

from shoal.averaging.commands import (
    ApplyAverage,
    AttachArena,
    AverageWritten,
    AwaitEnd,
    BoundByWord,
    DoubtSettled,
    ReachStage,
    TakeSnapshot,
)
from shoal.averaging.config import AveragerConfig, settle_modes
from shoal.averaging.group import PeerMode
from shoal.averaging.report import DoubtOutcome
from shoal.averaging.state_commands import StateCommand
from shoal.averaging.trainer.life import Life, LifeState
from shoal.averaging.trainer.pending import AverageWriter
from shoal.averaging.trainer.state_sharing import StateSharing
from shoal.averaging.trainer.steps import Steps
from shoal.averaging.trainer.transfer import Transfer
from shoal.errors import DeadlineExceeded, InvalidStateError, PeerProcessDied, PeerProcessUnresponsive
from shoal.runtime.futures import MPFuture
from shoal.runtime.startable import result_of_start
from shoal.utils.checks import check_number

if TYPE_CHECKING:
    from shoal.dht.commands import NodeDescription
    from shoal.dht.dht import DHT
    from shoal.runtime.process import BackgroundProcess, ServiceFactory, ServiceHandle

logger = logging.getLogger(__name__)

UNRESPONSIVE_TIMEOUT = 0.5
"""Seconds that the end of an averager waits for a background process that is stopped, or does not answer."""
START_LOOK_PERIOD = 1.0
"""Seconds between looks at a background process that has taken all the time that a call had for it to start."""

_SHUT_DOWN_EARLY = "the averager was shut down before it had started"


class Link:
    """Starts the service, answers it, and ends it. Methods may be called on any thread."""

    def __init__(
        self, config: AveragerConfig, writer: AverageWriter, steps: Steps, states: StateSharing
    ) -> None:
        self._config = config
        self._arena = writer.arena
        self._writer = writer
        self._steps = steps
        self._states = states
        self._pid = os.getpid()
        self._lock = threading.RLock()
        """Guards the state and what goes with it: the three that follow."""
        self.life = Life()
        self._call: MPFuture[Any] | None = None
        """What the start waits for now."""
        self._handle: ServiceHandle | None = None
        self._started: MPFuture[ServiceHandle] = MPFuture(explain=partial(_why_late, weakref.ref(self)))

    # the start

    def start(self, dht: DHT, factory: ServiceFactory) -> None:
        """Have the service made as soon as the DHT is ready; returns at once.

        :raises InvalidStateError: it was started before, another averager has its buffers, or the DHT is not running
        """
        self.life.check_new()
        create = partial(self._create, dht.background, factory)
        self._arena.transfer.claim(self._config.prefix)
        try:
            self._proceed(LifeState.WAITING_FOR_DHT, dht._describe_later(), create)
        except BaseException:
            self._arena.transfer.give_back()
            raise

    def _create(self, process: BackgroundProcess, factory: ServiceFactory, dht: NodeDescription) -> None:
        """The DHT is ready: what depends on it is settled, and the service can be made."""
        mode = settle_modes(self._config, dht.client_mode)
        self._states.settle(default=mode is PeerMode.FULL)
        creating = process.create_service(
            factory, name=f"averager {self._config.prefix}", handler=self.carry_out
        )
        if not self._proceed(LifeState.CREATING, creating, self._attach_soon) and not creating.cancel():
            creating.when_done(_close_unused)

    def _attach_soon(self, handle: ServiceHandle) -> None:
        """The service is made; its arena is made on the strand, since this thread receives what others wait for."""
        with self._lock:
            if not self._enter(LifeState.ATTACHING):
                return  # its end closes the service
            self._handle = handle
            self._call = None
        self._steps.strand.submit(partial(self._attempt, partial(self._attach, handle)))

    def _attach(self, handle: ServiceHandle) -> None:
        memory = self._arena.create_memory()
        self._states.attach(handle)
        self._writer.notify_written = partial(_notify_written, handle)
        self._steps.when_over = partial(_let_go, self._arena.transfer, handle)
        attach = AttachArena(memory.nbytes, self._arena.transfer.holds_values)
        attaching = handle.call(attach, descriptors=[memory.fd])
        with self._lock:
            self._call = attaching if self.life.state is LifeState.ATTACHING else None
        self._follow(attaching, lambda _: self._run(handle))

    def _run(self, handle: ServiceHandle) -> None:
        with self._lock:
            if self._enter(LifeState.RUNNING):
                self._call = None
                self._started.set_result(handle)

    def _enter(self, state: LifeState) -> bool:
        return self.life.enter(state, time.monotonic())

    def _proceed(self, state: LifeState, call: MPFuture[Any], then: Callable[[Any], None]) -> bool:
        """The start has come to ``state``, in which it waits for ``call``; False: the averager has ended."""
        with self._lock:
            if not self._enter(state):
                return False
            self._call = call
        self._follow(call, then)
        return True

    def _follow(self, call: MPFuture[Any], then: Callable[[Any], None]) -> None:
        # Past the dispatch of MPFuture: callbacks of users may be waiting on that thread for this very averager.
        call.when_done(lambda call: self._attempt(lambda: then(call.result())))

    def _attempt(self, part: Callable[[], None]) -> None:
        """A part of the start: if it fails, that does."""
        try:
            part()
        except CancelledError:
            self._fail(InvalidStateError(_SHUT_DOWN_EARLY))
        except BaseException as e:  # noqa: BLE001 - those that wait for the start get it
            self._fail(e)

    def _fail(self, error: BaseException) -> None:
        with self._lock:
            if self._enter(LifeState.FAILED):
                self._call = None
                self._started.set_exception(error)

    # readiness

    def wait(self, timeout: float | None = None) -> ServiceHandle:
        """The service, once it has started.

        :raises DeadlineExceeded: it was not ready in time; the start goes on
        :raises InvalidStateError: never started, or shut down before it was ready
        """
        timeout = check_timeout(timeout)
        self.life.check_started()
        return result_of_start(self._started, timeout, "averager")

    def ready(self, timeout: float | None = None) -> ServiceHandle:
        """The service, once it has started. A start takes the time that it takes, as long as its process lives.

        :raises PeerProcessUnresponsive: that does not, and ``timeout`` has passed
        :raises InvalidStateError: not started, or shut down
        """
        self.check_running()
        timeout = check_timeout(timeout)
        while True:
            try:
                return self.wait(timeout)
            except DeadlineExceeded as error:
                if self._started.done() or isinstance(error, PeerProcessUnresponsive):
                    raise
                timeout = START_LOOK_PERIOD

    @property
    def name(self) -> str:
        """What a printout calls the averager."""
        elements = self._arena.store.layout.numel
        return f"DecentralizedAverager {self._config.prefix!r} of {elements} elements"

    @property
    def was_started(self) -> bool:
        """Whether it was, whatever became of it since."""
        return self.life.was_started

    @property
    def is_alive(self) -> bool:
        """Whether the service runs, or may still come to that; False in a forked child."""
        return self._is_own_process and self.life.is_alive

    def check_running(self) -> None:
        """:raises InvalidStateError: not started, shut down, or in a forked child"""
        self.check_process()
        self.life.check_running()

    def check_process(self) -> None:
        """In a forked child the tensors are copies that are never averaged, and the locks may be held for ever."""
        if not self._is_own_process:
            raise InvalidStateError(
                f"this averager belongs to process {self._pid}, and this is process {os.getpid()}, which was forked "
                "from it; use it there, or make one here"
            )

    @property
    def _is_own_process(self) -> bool:
        return os.getpid() == self._pid

    # what the service asks for

    def carry_out(self, command: object) -> object:
        """Carry out a request of the service; runs on a thread of the averager, one request after the other."""
        match command:
            case ReachStage(step, stage):
                self._steps.reach(step, stage)
            case TakeSnapshot(step):
                control = self._steps.under_way(step)
                self._steps.late.note_snapshot(step)
                return self._arena.take_snapshot(step, control)
            case BoundByWord(step):
                self._steps.bind(step)
            case DoubtSettled():
                self._steps.late.settle(command)
            case ApplyAverage(step) if self._steps.late.is_open(step):
                # Given up here while the process did not answer: it comes late, and waits in the arena all the same.
                self._steps.late.settle(DoubtSettled(step, DoubtOutcome.COMMITTED))
                return True
            case ApplyAverage(step):
                # Of those that were cancelled in the moment when they got bound nobody awaits an average any more.
                self._steps.under_way(step)
                return self._writer.deliver(step)
            case StateCommand():
                return self._states.carry_out(command)
            case _:
                raise InvalidStateError(f"the user process has no command {type(command).__name__}")
        return None

    # the end

    def end(self, timeout: float = 5.0) -> None:
        """End the service in the background process, if it came to be and that still runs. Idempotent; does nothing
        before the start, or in a forked child.
        """
        if not self._is_own_process:
            return
        with self._lock:
            before, call, handle = self.life.state, self._call, self._handle
            if not self.life.end(time.monotonic()):
                return
            self._call = None
            if not self._started.done():
                self._started.set_exception(InvalidStateError(_SHUT_DOWN_EARLY))
        self._arena.stop_waiting()
        try:
            self._end_service(before, call, handle, timeout)
        except TimeoutError:
            logger.warning(
                "the averager did not end within %g s; it ends with its background process at the latest",
                timeout,
            )
        except (PeerProcessDied, InvalidStateError, CancelledError) as e:
            logger.debug("the averager's background process had ended before: %s", e)
        finally:
            self._states.close()
            self._writer.close()
            self._steps.late.drop("the averager was shut down")
            self._arena.close()

    def _end_service(
        self, before: LifeState, call: MPFuture[Any] | None, handle: ServiceHandle | None, timeout: float
    ) -> None:
        """:param before: the state in which the averager was ended, when ``call`` was what its start waited for"""
        closing: MPFuture[None] | None = None
        try:
            if call is not None:
                if call.why_late() is not None:
                    timeout = min(timeout, UNRESPONSIVE_TIMEOUT)
                # A service that was being made may be there in the moment when that is cancelled.
                if not call.cancel() and before is LifeState.CREATING and call.exception(timeout) is None:
                    handle = call.result()
            if handle is not None:
                closing = handle.close()
                closing.result(timeout)
        finally:
            give_back = self._arena.transfer.give_back
            if closing is None:
                give_back()
            else:  # and no earlier: a process that is stopped goes on with its round when it runs again
                closing.when_done(partial(_ignore_result, give_back))

    def end_in_background(self) -> None:
        """As :meth:`end`, for the garbage collector: it may run on the very thread that would receive the answer."""
        if not self._is_own_process or self.life.state in (LifeState.NEW, LifeState.ENDED):
            return
        with contextlib.suppress(
            RuntimeError
        ):  # the interpreter is ending, and the background process with it
            threading.Thread(target=self.end, name="shoal-averager-end", daemon=True).start()


def _why_late(link: weakref.ref[Link]) -> Exception | None:
    this = link()
    call = None if this is None else this._call
    return None if call is None else call.why_late()


def _let_go(transfer: Transfer, handle: ServiceHandle, step: int, is_sure: bool) -> None:
    """A step has ended here without an average: its tensors are free again, as soon as its round has ended."""
    if is_sure:
        transfer.release(step)
    elif transfer.is_read_by(step):
        # Cancelled, or given up since the process did not answer: there it may still be read for a moment.
        with contextlib.suppress(PeerProcessDied, InvalidStateError):
            handle.call(AwaitEnd(step)).when_done(partial(_release, transfer, step))


def _release(transfer: Transfer, step: int, ended: Future[Any]) -> None:
    # A service that is closing may not answer: its end frees the tensors then.
    if not ended.cancelled() and isinstance(ended.exception(), PeerProcessDied | None):
        transfer.release(step)


def check_timeout(timeout: float | None) -> float | None:
    """:raises InvalidValueError: not a number of seconds for which a thread can wait"""
    if timeout is None:
        return None
    return check_number("timeout", timeout, minimum=0, maximum=threading.TIMEOUT_MAX)


def _ignore_result(call: Callable[[], None], _: object) -> None:
    call()


def _close_unused(creating: Future[ServiceHandle]) -> None:
    """The averager has ended as its service was made: nobody will ever use it."""
    with contextlib.suppress(PeerProcessDied, InvalidStateError, CancelledError):
        creating.result().close()


def _notify_written(handle: ServiceHandle) -> None:
    with contextlib.suppress(
        PeerProcessDied, InvalidStateError
    ):  # it has ended, and nothing there waits any more
        handle.call(AverageWritten())
