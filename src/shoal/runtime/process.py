"""The user process's side of a background process: start it, call the services in it, and end it.

Changes no signal handler, and works on any thread, in a notebook and after any import. A process ends with
the last reference to it, with the interpreter, or by :meth:`BackgroundProcess.shutdown`; a forked child can
neither use nor end it.
"""

from __future__ import annotations

import contextlib
import logging
import os
import sys
import weakref
from collections.abc import Awaitable, Callable, Sequence
from concurrent.futures import Future
from typing import Any, NoReturn

from shoal.errors import DeadlineExceeded, InvalidTypeError
from shoal.runtime import lifetime, pickling
from shoal.runtime.channel import Kind
from shoal.runtime.futures import MPFuture
from shoal.runtime.handlers import Handler
from shoal.runtime.messages import Setup, UserProcessState
from shoal.runtime.process_link import ProcessLink
from shoal.runtime.service import Service, ServiceContext

ServiceFactory = Callable[[ServiceContext], Awaitable[Service]]


class BackgroundProcess:
    """A Python process beside the user process's, on whose event loop services live. Made by :meth:`start`."""

    def __init__(self, link: ProcessLink, *, daemon: bool) -> None:
        self._link = link
        self._daemon = daemon
        self._finalizer: Callable[[], object] = lambda: None
        if daemon:
            finalizer = weakref.finalize(self, lifetime.end_in_background, link)
            finalizer.atexit = False  # lifetime.py ends all processes then, and waits for them together

    @classmethod
    def start(
        cls, name: str, *, daemon: bool = True, preload: tuple[str, ...] = (), timeout: float = 30
    ) -> BackgroundProcess:
        """Start a process and wait until it runs.

        :param name: names the process in logs, errors and the system's list of processes
        :param daemon: if false, the user process's interpreter waits at its end until the process is shut down or
            Ctrl+C is pressed, and losing the last reference does not end it (as with :mod:`multiprocessing`)
        :param preload: modules that the process imports on a thread when its first service is ready
        :param timeout: seconds to wait
        :raises PeerProcessDied: the process ended at once; shows what it printed
        :raises DeadlineExceeded: it did not start in time, and was killed
        """
        state = _user_process_state()
        # Put back in the process: it is there to let its interpreter find this package, not for its own children.
        environment = (("PYTHONPATH", os.environ.get("PYTHONPATH")),)
        setup = Setup(state, preload, environment)
        link = ProcessLink.spawn(name, _python_path(), pickling.dumps(setup))
        link.state = state
        lifetime.add(link, daemon=daemon)
        if not link.ready.wait(timeout):
            link.shutdown(0.0)
            raise DeadlineExceeded(f"the background process {name!r} did not start within {timeout:g} s")
        link.raise_if_dead()
        return cls(link, daemon=daemon)

    def create_service(
        self, factory: ServiceFactory, *, name: str = "", handler: Handler | None = None
    ) -> MPFuture[ServiceHandle]:
        """Make a service in the process.

        :param factory: called there with a :class:`~shoal.runtime.service.ServiceContext`; imported there
            (functions of ``__main__``, lambdas and closures go by value), with arguments by
            :func:`functools.partial`
        :param name: by which other services of the process find this one
        :param handler: answers the service's own calls (``context.call_user``), in order, on a thread for
            this service; see :data:`~.handlers.Handler`
        :raises InvalidTypeError: the factory cannot be sent
        """
        link = self._usable()
        body = pickling.dumps((name, factory), "the service's factory")
        service_id = link.new_service(handler, name)

        def make_handle(_: object) -> ServiceHandle:
            return ServiceHandle(self, service_id)

        creation: MPFuture[ServiceHandle] = link.call(Kind.CREATE, service_id, body, convert=make_handle)

        def clean_up(creation: Future[ServiceHandle]) -> None:
            if creation.cancelled():
                # It may have been made already, and nobody will ever have its handle.
                link.call(Kind.CLOSE, service_id, b"")
            if creation.cancelled() or creation.exception() is not None:
                link.forget_service(service_id)

        # Past the dispatch of MPFuture: a callback of a user may be running there for long.
        creation.when_done(clean_up)
        return creation

    @property
    def name(self) -> str:
        return self._link.name

    @property
    def daemon(self) -> bool:
        return self._daemon

    @property
    def is_alive(self) -> bool:
        """Whether the process runs; false in a forked child, which has no part in it."""
        return self._link.is_alive

    @property
    def pid(self) -> int:
        return self._link.pid

    @property
    def exit_status(self) -> int | None:
        """None while it runs; as in :mod:`subprocess`, negative for a signal."""
        return self._link.exit_status

    @property
    def log_tail(self) -> str:
        """The last lines that the process logged or printed."""
        return self._link.log_tail

    def wait(self, timeout: float | None = None) -> bool:
        """Wait until the process has ended; false if it still runs after ``timeout`` seconds.

        :raises InvalidStateError: in a forked child, which would not hear of the end
        """
        self._link.check_process()
        return self._link.ended.wait(timeout)

    def shutdown(self, timeout: float = 3.0) -> None:
        """End the process: in order within ``timeout`` seconds, else by force. Idempotent, on any thread.

        In a forked child this does nothing: the process belongs to the parent.
        """
        self._link.shutdown(timeout)

    def _usable(self) -> ProcessLink:
        link = self._link
        link.check_usable()
        state = _user_process_state()
        if state != link.state:
            link.state = state
            with contextlib.suppress(BrokenPipeError):  # then the call that follows says what happened
                link.send(Kind.STATE, pickling.dumps(state))
        return link

    def __reduce__(self) -> NoReturn:
        raise InvalidTypeError(
            "a background process cannot be pickled or copied: it belongs to the process that started it"
        )


class ServiceHandle:
    """A service in the background process, as the user process sees it. Keeps the process alive."""

    def __init__(self, process: BackgroundProcess, service_id: int) -> None:
        self.process = process
        self.service_id = service_id

    def call(
        self, command: object, *, descriptors: Sequence[int] = (), timeout: float | None = None
    ) -> MPFuture[Any]:
        """Send a command to the service; any number may be under way. Cancelling the future cancels it there.

        The future raises what the service raised, or :class:`~shoal.errors.PeerProcessDied`.

        :param descriptors: file descriptors that the service receives copies of
        :param timeout: seconds that the service has for the command, and keeps. If the process itself does not answer,
            the future raises :class:`~shoal.errors.PeerProcessUnresponsive` a moment later
        :raises InvalidTypeError: the command cannot be sent; the message says because of what
        :raises InvalidStateError: the process was shut down, or belongs to the parent of this one
        """
        link = self.process._usable()
        return link.call(
            Kind.CALL, self.service_id, pickling.dumps(command, "the command"), descriptors, timeout=timeout
        )

    def close(self) -> MPFuture[None]:
        """Close the service alone: its commands are cancelled, then its ``close()`` runs. Idempotent."""
        link = self.process._usable()
        future: MPFuture[None] = link.call(Kind.CLOSE, self.service_id, b"")
        future.when_done(lambda _: link.forget_service(self.service_id))
        return future

    def __reduce__(self) -> NoReturn:
        raise InvalidTypeError(
            "a service cannot be pickled or copied: it belongs to the process that started it"
        )


def _user_process_state() -> UserProcessState:
    # An empty entry means the current folder, which is the user process's; it may change later.
    path = tuple(entry if entry else os.getcwd() for entry in sys.path)
    shoal = logging.getLogger("shoal").getEffectiveLevel()
    return UserProcessState(path, (("", logging.getLogger().getEffectiveLevel()), ("shoal", shoal)))


def _python_path() -> str | None:
    """PYTHONPATH with which a new interpreter finds this package, or None if it does without."""
    import site

    where = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
    given = os.environ.get("PYTHONPATH")
    folders = [*site.getsitepackages(), site.getusersitepackages()]
    if where in map(os.path.abspath, folders):
        return given  # in front of the standard library it could shadow parts of that
    return os.pathsep.join([where, given]) if given else where
