"""What the user process tells its background process about itself. Imported by both sides; imports nothing heavy."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class UserProcessState:
    """What may change in the user process while the process runs; sent first of all, and again after a change.

    :param path: the user process's ``sys.path``, absolute, so that what is sent by reference can be imported
    :param levels: levels of the root logger ("") and of Shoal's
    """

    path: tuple[str, ...]
    levels: tuple[tuple[str, int], ...]


@dataclass(frozen=True)
class Setup:
    """The first message to the process.

    :param preload: modules that it imports on a thread once its first service is made
    :param environment: variables to put back to the user process's values (None: it has none)
    """

    state: UserProcessState
    preload: tuple[str, ...]
    environment: tuple[tuple[str, str | None], ...]
