"""What a service in the background process is, and what it is given. Imports nothing heavy."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

from shoal.errors import ShoalError
from shoal.runtime.presence import Presence


class Service(Protocol):
    """Something that lives in the background process and answers commands from the user process.

    Both methods run on the process's only event loop.
    """

    async def carry_out(self, command: object, descriptors: Sequence[int]) -> object:
        """Carry out one command and return its result, which has to be picklable.

        Any number of commands run at the same time. The task is cancelled when the user process cancels the call, and
        when the service closes. The service owns ``descriptors`` from now on and closes them. Whatever it
        raises is raised in the user process by the call's future.
        """

    async def close(self) -> None:
        """End everything that the service does, in order. Called once, after its commands ended.

        It has about as many seconds as the user process allowed for the shutdown, and 1.5 s when that is gone.
        """


class ServiceContext(Protocol):
    """What the factory of a service receives: its place in the background process."""

    @property
    def service_id(self) -> int:
        """The service's number in this process, never used again."""

    @property
    def services(self) -> Mapping[int, Service]:
        """Every open service of the process by its number, itself included once its factory has returned."""

    def find(self, name: str) -> Service:
        """The open service that was created under this name.

        :raises InvalidStateError: there is none (any more)
        """

    async def call_user(self, command: object) -> object:
        """Have the user process's handler of this service run with ``command``; its outcome is this call's. What it
        answers with file descriptors comes as a :class:`~.descriptors.WithDescriptors`.

        Handlers of one service run one after the other, in the order of the calls, on a thread of that
        service. Cancelling drops a call that has not begun; one that runs is left to finish and its result is
        dropped.
        """

    @property
    def user(self) -> Presence:
        """Whether the user's process is there, or is stopped or does not answer: then no call to it is answered."""

    @property
    def is_closing(self) -> bool:
        """Whether this service ends now, alone or with the process: commands are cancelled for that, not by a user."""

    async def modules_ready(self) -> None:
        """Wait until the modules to be preloaded are imported; begins with that if need be."""

    def fail(self, error: ShoalError) -> None:
        """End the process in order, because it can be of no more use: ``error`` is logged, and those that wait for the
        process get a PeerProcessDied that shows it.
        """

    def when_ending(self, callback: Callable[[], None]) -> None:
        """Call ``callback`` if the process has to end at once: its user process is gone, or it received SIGTERM.

        That is the moment to tell others, besides ``close()``, which may take its time.
        """

    def set_log_fields(self, **fields: str) -> None:
        """From now on every log record of the process carries these attributes, unless it has its own."""
