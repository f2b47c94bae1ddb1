"""Reading at the rate that the host may receive: one connection after the other.

All connections share the limit. Were all resumed when there is room, each would read a step before the first one has
paid. With 64 connections that is a burst of seconds.

Connections for calls are always read, else calls would wait behind a payload. Where a payload comes on such a one, the
credit for the next ones waits for its turn instead.
"""

from __future__ import annotations

import asyncio
import math
from collections import deque
from collections.abc import Callable
from typing import Protocol

from shoal.p2p.protocol import wire
from shoal.p2p.protocol.rate_limit import BURST_SECONDS, LEAST_QUANTUM, RateLimit

LATELY = 5.0
"""Seconds for which a connection counts as slow after it has waited: it waits again after its next step."""

ROUND_STEPS = 5
"""The more connections wait, the less each reads in its turn: a round has no more than so many full steps.
Else one of 64 connections would take seconds, and each would seem to its sender to stall.
"""


MAX_HELD_CREDITS = 4096
"""Of one connection. More than that are of streams that ended meanwhile, which a peer can open without end."""

CREDIT_STEPS = 5
"""Full steps that are paid for, at most, before a connection gives credit: as much as comes within a round trip."""

MOST_OWED = 100
"""Turns that a connection leaves to others at most, whatever has come there."""


class Waiting(Protocol):
    """Something that waits for its turn."""

    def begin_turn(self) -> None:
        """It is its turn now. Who needs another one asks again."""


class ReadingTurns:
    """The connections of one host that wait until they may read, or give credit."""

    def __init__(self, rate: float | None) -> None:
        """:param rate: bytes a second; None: no limit, and nobody waits"""
        self._limit = RateLimit(rate)
        self._waiting: deque[Waiting] = deque()
        self._timer: asyncio.TimerHandle | None = None

    @property
    def is_limited(self) -> bool:
        """Whether there is a limit."""
        return self._limit.is_limited

    @property
    def wait(self) -> float:
        """Seconds until more may be read; 0: now."""
        return self._limit.wait(asyncio.get_running_loop().time())

    @property
    def is_free(self) -> bool:
        """Whether something may be read now, and no connection waits for that."""
        return not self._waiting and self.wait == 0

    @property
    def quantum(self) -> int | None:
        """Bytes that one connection reads in its turn; None without a limit."""
        step = self._limit.quantum
        return step and max(LEAST_QUANTUM, step * ROUND_STEPS // max(ROUND_STEPS, len(self._waiting)))

    @property
    def credit_price(self) -> int:
        """Bytes that one connection pays for, at most, before it gives credit; 0 without a limit."""
        return CREDIT_STEPS * (self._limit.quantum or 0)

    def spend(self, nbytes: int) -> None:
        """So many bytes were read, or are about to be; negative: so many were paid for, and not read."""
        self._limit.spend(nbytes, asyncio.get_running_loop().time())
        if nbytes < 0:
            self._look_again()  # there is room earlier

    def ask(self, pace: Waiting) -> None:
        """Let ``pace`` know when it is its turn."""
        self._waiting.append(pace)
        self._look_again()

    def withdraw(self, pace: Waiting) -> None:
        """``pace`` waits no more."""
        if pace in self._waiting:
            self._waiting.remove(pace)
            self._look_again()

    def _look_again(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if self._waiting:
            self._timer = asyncio.get_running_loop().call_later(self.wait, self._serve)

    def _serve(self) -> None:
        while self._waiting and self.wait == 0:
            self._waiting.popleft().begin_turn()
        self._look_again()


class ReadingPace:
    """Pauses one connection while all of the host have read more than they may. What is not read stays with its
    sender: TCP tells it so.
    """

    def __init__(self, turns: ReadingTurns) -> None:
        """:param turns: of all connections of the host"""
        self._turns = turns
        self._loop = asyncio.get_running_loop()
        self._transport: asyncio.Transport | None = None
        self._is_paused = False
        self._waited_at = -math.inf
        self._paid = 0
        """Bytes that are paid for, and not read: this connection has its turn."""
        self._turn_end: asyncio.TimerHandle | None = None

    def connect(self, transport: asyncio.Transport) -> None:
        """Read from ``transport`` from now on."""
        self._transport = transport

    def disconnect(self) -> None:
        """Nothing more is read; others have the turn."""
        self._transport = None
        self._turns.withdraw(self)
        self._end_turn()

    @property
    def most(self) -> int | None:
        """So many bytes are to be read at once; None without a limit."""
        if self._paid:
            return self._paid
        if not self._turns.is_limited or self._is_paused or self._turns.is_free:
            return self._turns.quantum
        return 1  # it is not its turn. A transport must read something; then this waits

    @property
    def is_slow(self) -> bool:
        """Whether reading has waited for the rate lately."""
        return self._is_paused or self._loop.time() - self._waited_at < LATELY

    def note(self, nbytes: int) -> None:
        """So much was read."""
        if not self._turns.is_limited:
            return
        self._turns.spend(nbytes)
        self._end_turn()
        if not self._is_paused and self._transport is not None and not self._turns.is_free:
            self._is_paused = True
            self._transport.pause_reading()
            self._turns.ask(self)

    def begin_turn(self) -> None:
        """Read one step, which is paid for now: else the next one would have its turn before it is."""
        quantum = self._turns.quantum
        if self._transport is None or self._transport.is_closing() or quantum is None:
            return
        now = self._loop.time()
        self._is_paused, self._waited_at, self._paid = False, now, quantum
        self._turns.spend(quantum)
        # A peer that has sent nothing does not keep its turn.
        self._turn_end = self._loop.call_later(max(BURST_SECONDS, self._turns.wait), self._end_turn)
        self._transport.resume_reading()

    def _end_turn(self) -> None:
        """Give back what was paid for."""
        if self._turn_end is not None:
            self._turn_end.cancel()
            self._turn_end = None
        paid, self._paid = self._paid, 0
        if paid:
            self._turns.spend(-paid)


class CreditPace:
    """Holds back the credit that one connection gives while all of the host have read more than they may. So a sender
    waits with its next payload, and all else on that connection goes on.

    Payloads for which there was credit come at once. They may be many turns long: then others have as many turns before
    this gives credit again.
    """

    def __init__(self, turns: ReadingTurns, send: Callable[[int, bytes], None]) -> None:
        """:param turns: of all connections of the host
        :param send: puts a CREDIT on its way, given its stream and its body
        """
        self._turns = turns
        self._send = send
        self._held: deque[tuple[int, bytes]] = deque()
        self._paid = 0
        """Bytes that are paid for, and have not come."""
        self._owed = 0
        """Bytes that have come, and for which others have not had their turns."""

    def send(self, stream_id: int, body: bytes) -> None:
        """Send a CREDIT, after those that wait."""
        if not self._held and self._turns.is_free:
            self._owed = 0  # nobody waits
            self._send(stream_id, body)
            return
        if not self._held:
            self._turns.ask(self)
        self._held.append((stream_id, body))
        if len(self._held) > MAX_HELD_CREDITS:
            self._send(*self._held.popleft())

    def note(self, nbytes: int) -> None:
        """So many bytes of payloads have come."""
        paid = min(nbytes, self._paid)
        self._paid -= paid
        self._owed += nbytes
        if nbytes > paid:
            self._turns.spend(nbytes - paid)

    def begin_turn(self) -> None:
        """Give credit once. What comes for it is not known before a round trip. So a part is paid for now, else all
        connections would give credit at the same time. What does not come stays paid for, and is not paid for again.
        """
        quantum = self._turns.quantum
        assert quantum is not None, "without a limit nobody waits"
        self._owed = max(0, min(self._owed, MOST_OWED * quantum) - quantum)
        if not self._owed:
            stream_id, body = self._held.popleft()
            unpaid = min(self._turns.credit_price, wire.decode_credit(body)) - self._paid
            if unpaid > 0:
                self._paid += unpaid
                self._turns.spend(unpaid)
            self._send(stream_id, body)
        if self._held:
            self._turns.ask(self)

    def disconnect(self) -> None:
        """No credit is given any more; others have the turn."""
        self._turns.withdraw(self)
        self._held.clear()
        paid, self._paid = self._paid, 0
        if paid:
            self._turns.spend(-paid)
