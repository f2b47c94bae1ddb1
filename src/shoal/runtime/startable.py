"""What :class:`shoal.DHT` and :class:`shoal.DecentralizedAverager` have in common: a start, readiness, an end, and what
they are in a ``with`` block, in a printout and in a pickle.
"""

from __future__ import annotations

from types import TracebackType
from typing import NoReturn, Protocol, Self, TypeVar

from shoal.errors import DeadlineExceeded, InvalidTypeError, PeerProcessUnresponsive
from shoal.runtime.futures import MPFuture

T = TypeVar("T")


class ServiceLink(Protocol):
    """How such an object is linked to its service in the background process."""

    @property
    def name(self) -> str:
        """What a printout calls the object."""

    @property
    def was_started(self) -> bool:
        """Whether it was, whatever became of it since."""

    def wait(self, timeout: float | None = None) -> object:
        """Wait for the service.

        :raises InvalidStateError: it was never started
        :raises DeadlineExceeded: it was not ready in time; the start goes on
        """


class Startable:
    """Something that is started once, and lives in a background process until its end. A context manager.

    Users subclass what is made of it, with metaclasses of their own. So it has no metaclass: its abstract methods
    raise. It keeps nothing under a name that they might use, and calls what they may override.

    :param instead_of_a_copy: the error of those who try to pickle or copy it
    """

    def __init__(self, link: ServiceLink, *, instead_of_a_copy: str) -> None:
        self.__service_link = link
        self.__instead_of_a_copy = instead_of_a_copy

    def run_in_background(self, await_ready: bool = True, timeout: float | None = None) -> None:
        """Start it, once."""
        raise NotImplementedError

    def wait_until_ready(self, timeout: float | None = None) -> None:
        """Wait until it can be used, for up to ``timeout`` seconds."""
        self.__service_link.wait(timeout)

    def is_alive(self) -> bool:
        """Whether it can be used, or will be."""
        raise NotImplementedError

    def shutdown(self) -> None:
        """End it. Idempotent; does nothing in a forked child."""
        raise NotImplementedError

    def __enter__(self) -> Self:
        if not self.__service_link.was_started:
            self.run_in_background()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.shutdown()

    def __repr__(self) -> str:
        state = "alive" if self.is_alive() else "ended" if self.__service_link.was_started else "not started"
        return f"<{self.__service_link.name}, {state}>"

    def __reduce__(self) -> NoReturn:
        raise InvalidTypeError(self.__instead_of_a_copy)


def wait_or_end(thing: Startable, timeout: float | None) -> None:
    """Wait until ``thing`` is ready. If the wait fails or is interrupted, it is shut down."""
    try:
        thing.wait_until_ready(timeout)
    except BaseException:
        thing.shutdown()
        raise


def result_of_start(started: MPFuture[T], timeout: float | None, what: str) -> T:
    """The result of a start, once it is there. ``what``: what is started, for people.

    :raises DeadlineExceeded: it was not ready in time
    :raises PeerProcessUnresponsive: it will not be, since its process does not answer
    """
    try:
        return started.result(timeout)
    except TimeoutError as error:
        if started.done() or isinstance(error, PeerProcessUnresponsive):
            raise  # the start's own failure, or the reason why it takes so long
        raise DeadlineExceeded(f"the {what} was not ready after {timeout:g} s") from error
