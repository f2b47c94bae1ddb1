"""Drives one core on an event loop: its timer, its queue of events, and who sees its turns."""

from __future__ import annotations

import asyncio
import math
from collections import deque
from collections.abc import Callable
from typing import Generic, TypeVar

from shoal.sansio import trace
from shoal.sansio.core import NEVER, Core, TimePassed

E = TypeVar("E")
F = TypeVar("F")

LATE = 0.1
"""A timer that fires so many seconds late was held up: the process was stopped, or its event loop busy."""


class Driver(Generic[E, F]):
    """The one caller of a core.

    :param core: may be read by others, but only the driver calls ``handle``
    :param carry_out: does what one effect asks for, without waiting. What happens at once on that is another event for
      :meth:`tell`, which comes to the core when all effects of this one are carried out.
    :param clock: the core's seconds; by default those of the event loop
    :param on_turn: called after each event whose effects are carried out
    :param slack: seconds by which the core may hear of a deadline late where events come in quick succession. It is
      asked for its deadline once in that time, since that costs as much as to take an event in.
    :param name: the kind of core, for the trace
    :param subject: which one, for the trace
    """

    def __init__(
        self,
        core: Core[E | TimePassed, F],
        carry_out: Callable[[F], None],
        *,
        clock: Callable[[], float] | None = None,
        on_turn: Callable[[], None] | None = None,
        slack: float = 0.0,
        name: str,
        subject: str = "",
    ) -> None:
        self.core = core
        self._carry_out = carry_out
        self._loop = asyncio.get_running_loop()
        self._clock = clock or self._loop.time
        self._on_turn = on_turn
        self._slack = slack
        self._name = name
        self._subject = subject
        self._queue: deque[E | TimePassed] = deque()
        self._is_busy = False
        self._timer: asyncio.TimerHandle | None = None
        self._due = NEVER
        """Of the timer. uvloop's handles do not know it, if it has come already."""
        self._asked_at = -math.inf
        """When the core was asked for its deadline last."""
        self._asking: asyncio.TimerHandle | None = None
        """Asks it again, where that was put off."""
        self._is_closed = False

    def tell(self, event: E | TimePassed) -> None:
        """Give the core an event, and carry out what follows from it.

        Called while effects are carried out, it returns at once, and the event waits for its turn.

        :raises ProtocolViolation: as the core; its state has not changed
        """
        self._queue.append(event)
        if self._is_busy:
            return
        self._is_busy = True
        try:
            while self._queue:
                self._take_turn(self._queue.popleft())
        finally:  # an event that breaks the protocol takes no deadline of others along
            self._is_busy = False
            self._look_at_deadline()

    def close(self) -> None:
        """Drop the timer: from now on the core hears only what it is told. Idempotent."""
        self._is_closed = True
        for timer in (self._timer, self._asking):
            if timer is not None:
                timer.cancel()
        self._timer = self._asking = None

    def _take_turn(self, event: E | TimePassed) -> None:
        now = self._clock()
        effects = self.core.handle(event, now)
        after = []
        if trace.is_watched():
            after = trace.publish(trace.Turn(self._name, self._subject, now, event, tuple(effects)))
        for effect in effects:
            self._carry_out(effect)
        for later in after:
            later()
        if self._on_turn is not None:
            self._on_turn()

    def _look_at_deadline(self) -> None:
        if self._asking is not None or self._is_closed:
            return
        may_ask_at = self._asked_at + self._slack
        if self._loop.time() < may_ask_at:
            self._asking = self._loop.call_at(may_ask_at, self._ask_again)
        else:
            self._set_timer()

    def _ask_again(self) -> None:
        self._asking = None
        self._set_timer()

    def _set_timer(self) -> None:
        """Have the core hear of its deadline. A timer that turns out to be early is kept: to set one again for each
        part that arrives would cost more.
        """
        self._asked_at = self._loop.time()
        deadline = self.core.deadline
        if self._is_closed or deadline == NEVER:
            return
        due = self._asked_at + max(0.0, deadline - self._clock())
        if self._timer is not None:
            if self._due <= due:
                return
            self._timer.cancel()
        self._timer, self._due = self._loop.call_at(due, self._on_timer), due

    def _on_timer(self) -> None:
        self._timer = None
        if self._clock() < self.core.deadline:
            self._set_timer()
            return
        late = self._loop.time() - self._due
        self.tell(TimePassed(late if late > LATE else 0.0))
