"""A finite state machine whose transitions are data, and which remembers what led to a state. Pure."""

from __future__ import annotations

import enum
from collections import deque
from collections.abc import Collection, Mapping
from typing import Any, Generic, NamedTuple, NoReturn, TypeVar

S = TypeVar("S", bound=enum.Enum)

HISTORY_LENGTH = 64


class Entry(NamedTuple):
    """One line of a history."""

    time: float
    state: str
    """In which the machine was when the event came."""
    event: object


class IllegalTransition(AssertionError):
    """An event that cannot happen in this state, or a transition that is not in the table: a bug in Shoal.

    ``history`` holds what led there, the latest last.
    """

    def __init__(self, what: str, history: Collection[Entry]) -> None:
        lines = [f"  {entry.time:.3f} {entry.state}: {entry.event!r}" for entry in history]
        super().__init__("\n".join([what, *lines]))
        self.history = tuple(history)


class Machine(Generic[S]):
    """The state of one core.

    :param start: the first state
    :param table: the states that each state may be followed by; one that is missing is final
    :param heard: the types of events that may come in each state, for :meth:`hear`
    :param length: how many events are remembered
    """

    def __init__(
        self,
        start: S,
        table: Mapping[S, Collection[S]],
        heard: Mapping[S, Collection[type]] | None = None,
        *,
        length: int = HISTORY_LENGTH,
    ) -> None:
        self.state = start
        self._table = table
        self._heard = heard or {}
        self._history: deque[Entry] = deque(maxlen=length)

    @property
    def history(self) -> tuple[Entry, ...]:
        """The latest events, each with its time and the state in which it came."""
        return tuple(self._history)

    @property
    def is_final(self) -> bool:
        """Whether no state follows this one."""
        return not self._table.get(self.state)

    def note(self, event: object, now: float) -> None:
        """Remember an event; called before the core takes it in."""
        self._history.append(Entry(now, self.state.name, event))

    def hear(self, event: object, now: float) -> None:
        """:meth:`note` an event, if its type may come in this state.

        :raises IllegalTransition: it may not
        """
        self.note(event, now)
        if type(event) not in self._heard.get(self.state, ()):
            self.refuse(f"{type(event).__name__} cannot happen")

    def move(self, to: S) -> None:
        """Enter the state ``to``.

        :raises IllegalTransition: the table does not have it
        """
        if to not in self._table.get(self.state, ()):
            self.refuse(f"{self.state.name} -> {to.name} is no transition")
        self.state = to

    def refuse(self, what: str) -> NoReturn:
        """Raise the one error of this machine: ``what`` cannot happen now."""
        raise IllegalTransition(f"{type(self.state).__name__}.{self.state.name}: {what}", self._history)


def mermaid(table: Mapping[Any, Collection[Any]]) -> str:
    """The table as a Mermaid state diagram, so that documentation cannot drift from the code."""
    lines = [
        f"    {one.name} --> {other.name}"
        for one in table
        for other in sorted(table[one], key=lambda s: s.name)
    ]
    return "\n".join(["stateDiagram-v2", *lines])
