"""The turns of all cores of this process, for reports, tests and monitors.

A turn is one event that a core has taken in, with the effects that it asked for. A call to the user's process is shown
as a turn, too: the command is its event. Watchers see a turn before its effects are carried out, and, if they wish,
after that. So a test can stop, kill or cut off a process at a named phase of its protocol, without a hook in the code.
Nothing is made for a turn while nobody watches.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeAlias


@dataclass(frozen=True)
class Turn:
    """One event and what came of it."""

    core: str
    """The kind of core: "matchmaking", "allreduce", "uploads", ...; "user": a call to the user's process."""
    subject: str
    """Which one: a prefix, the id of a group."""
    now: float
    event: object
    effects: tuple[object, ...]


Watcher: TypeAlias = Callable[[Turn], Callable[[], None] | None]
"""Called on the event loop when a core has handled an event, before the effects are carried out. What it returns is
called when they are."""

_watchers: list[Watcher] = []


def is_watched() -> bool:
    """Whether there is anybody to show turns to."""
    return bool(_watchers)


def publish(turn: Turn) -> list[Callable[[], None]]:
    """Show a turn to all watchers; what is to be called after its effects."""
    return [later for watcher in list(_watchers) if (later := watcher(turn)) is not None]


def add_watcher(watcher: Watcher) -> Callable[[], None]:
    """Have every turn from now on shown to ``watcher``; call what is returned to end that."""
    _watchers.append(watcher)

    def remove() -> None:
        if watcher in _watchers:
            _watchers.remove(watcher)

    return remove


@contextmanager
def watching(watcher: Watcher) -> Iterator[None]:
    """As :func:`add_watcher`, for a block."""
    remove = add_watcher(watcher)
    try:
        yield
    finally:
        remove()
