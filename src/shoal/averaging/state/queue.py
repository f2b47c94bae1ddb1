"""Who gets a donor's state next: slots, a queue, and the life of the one copy that all joiners share. Pure.

Theory of operation. A request is *waiting* in the queue or *admitted* to one of ``max_uploads`` slots. The donor holds
one copy at a time, and a joiner gets one that was asked for after its own request. There is one exception: while a copy
is *in use*, a newer one cannot be made beside it, so newcomers share the one that is there, as long as that is not
older than ``max_age``. After that they wait until it is free, for ``MAX_PATIENCE`` at most: then they are refused, so
that one slow joiner does not keep them for ever.

A copy is in use while joiners download it, and for ``RESUME_SECONDS`` after one has lost its connection: joiners that
come back resume, and go to the front of the queue. A copy that nobody uses is kept for ``KEEP_SECONDS``, in case one
comes back later than that and nobody else has asked. A request keeps its slot until its connection reads the copy no
more. Else copies could stay in memory that this queue takes for dropped.

Copies take the averager's lock, and time of its cores. So after a copy the donor *rests* for ``REST_FACTOR`` times as
long, up to ``MAX_REST``: joiners that ask all the time wait for the same next copy. The first ``ALLOWANCE`` seconds of
copying after a quiet time need no rest.

:meth:`UploadQueue.handle` is the one entry point: events and ``now`` in, effects out. Whether the request that is next
gets a slot is decided by :func:`decide_next`, which changes nothing.
"""

from __future__ import annotations

import enum
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TypeAlias

from shoal.averaging.codes import AveragingCode
from shoal.p2p.identity import PeerID
from shoal.p2p.protocol.codes import ResetCode
from shoal.sansio.core import NEVER, TimePassed
from shoal.sansio.machine import Machine

MAX_UPLOADS = 4
MAX_WAITING = 32
MAX_REQUESTS_PER_PEER = 2
DEFAULT_MAX_AGE = 60.0
"""Seconds up to which newcomers share a copy that is in use."""
KEEP_SECONDS = 60.0
"""For how long a copy is kept after its last use."""
RESUME_SECONDS = 15.0
"""For how long a copy counts as in use after a joiner has lost its connection."""
MAX_PATIENCE = 120.0
"""For how long a newcomer waits for a copy that is too old, and in use, to be free."""
REST_FACTOR = 10.0
"""A donor rests so many seconds for each second of copying that goes beyond its allowance."""
ALLOWANCE = 3.0
"""Seconds of copying for which a donor that has rested long enough need not rest."""
MAX_REST = 30.0
"""Seconds for which a donor rests after a copy, at most."""
HOLD_OFF_SECONDS = 5.0
"""After a copy could not be made, nobody's request makes the donor try again for so long."""


@dataclass(frozen=True)
class RequestArrived:
    """``state_id``: of which state the joiner has a part already."""

    request: int
    peer: PeerID
    state_id: bytes | None


@dataclass(frozen=True)
class RequestEnded:
    """The joiner has got everything (``complete``), or is gone, wherever it was."""

    request: int
    complete: bool = False


@dataclass(frozen=True)
class CopyTaken:
    """The copy that was asked for is there."""

    state_id: bytes


@dataclass(frozen=True)
class CopyFailed:
    """The copy that was asked for could not be made."""

    reason: str


@dataclass(frozen=True)
class SharingSwitched:
    """The user has allowed sharing, or forbidden it."""

    allowed: bool


Event: TypeAlias = RequestArrived | RequestEnded | CopyTaken | CopyFailed | SharingSwitched | TimePassed


@dataclass(frozen=True)
class TakeCopy:
    """Have the user process make a copy of its state; answered by CopyTaken or CopyFailed."""


@dataclass(frozen=True)
class DropCopy:
    """Free the copy; a later TakeCopy makes another one."""


@dataclass(frozen=True)
class Serve:
    """Send the copy to the joiner."""

    request: int


@dataclass(frozen=True)
class Refuse:
    """Tell the joiner to go elsewhere; the request has ended."""

    request: int
    code: str
    reason: str


@dataclass(frozen=True)
class TellPosition:
    """Tell the joiner how many are served before it, itself included; 0: it waits for the copy alone."""

    request: int
    position: int


Effect: TypeAlias = TakeCopy | DropCopy | Serve | Refuse | TellPosition


class Copy(enum.Enum):
    """The donor's one copy of its state."""

    ABSENT = "absent"
    MAKING = "making"
    """It was asked for."""
    HELD = "held"


TRANSITIONS: dict[Copy, set[Copy]] = {
    Copy.ABSENT: {Copy.MAKING},
    Copy.MAKING: {Copy.HELD, Copy.ABSENT},
    Copy.HELD: {Copy.ABSENT},
}

_ALWAYS = (RequestArrived, RequestEnded, SharingSwitched, TimePassed)

HEARD: dict[Copy, frozenset[type]] = {
    Copy.ABSENT: frozenset(_ALWAYS),
    Copy.MAKING: frozenset({*_ALWAYS, CopyTaken, CopyFailed}),
    Copy.HELD: frozenset(_ALWAYS),
}
"""The events that may come in each state. Any other one is illegal."""


@dataclass
class Request:
    """One joiner's request."""

    request: int
    peer: PeerID
    state_id: bytes | None
    arrived: float
    told: int | None = None


class Turn(enum.Enum):
    """What becomes of the request that is next."""

    SERVE = enum.auto()
    """It gets the copy that there is."""
    JOIN = enum.auto()
    """It gets the copy that is being made."""
    COPY = enum.auto()
    """A new copy is made for it."""
    WAIT = enum.auto()
    REFUSE = enum.auto()


@dataclass(frozen=True)
class Decision:
    """What becomes of the request that is next, and why."""

    turn: Turn
    reason: str
    code: str = ""
    """Of a refusal."""


@dataclass(frozen=True)
class Situation:
    """What the donor knows when it looks at the request that is next."""

    now: float
    copy: Copy
    state_id: bytes | None
    """Of the copy that is held."""
    asked_at: float
    """When the copy was asked for: what is in it is not older."""
    is_in_use: bool
    """Somebody downloads the copy, or is expected back."""
    max_age: float | None
    rests_until: float
    hold_off_until: float
    failure: str
    """Why there was no copy when it was last asked for; matters until ``hold_off_until``."""

    @property
    def is_young(self) -> bool:
        """Whether newcomers may share the copy that is in use."""
        return self.max_age is None or self.now <= self.asked_at + self.max_age


def decide_next(first: Request, at: Situation) -> Decision:
    """Whether the request that is next gets a free slot, and with which copy."""
    if at.copy is Copy.MAKING:
        return Decision(Turn.JOIN, "the copy is being made")
    if at.copy is Copy.HELD:
        if first.state_id == at.state_id:
            return Decision(Turn.SERVE, "the joiner has a part of this copy")
        if first.arrived <= at.asked_at:
            return Decision(Turn.SERVE, "the copy is not older than the request")
        if at.is_in_use and at.is_young:
            return Decision(Turn.SERVE, "others use the copy, and it is young enough to be shared")
    if at.is_in_use:
        if at.now < first.arrived + MAX_PATIENCE:
            return Decision(Turn.WAIT, "the copy is too old to be shared, and in use")
        age = at.now - at.asked_at
        reason = f"others still download a copy of {age:.0f} s ago; max_state_age={at.max_age:g} s"
        return Decision(Turn.REFUSE, reason, ResetCode.BUSY)
    if at.now < at.hold_off_until:
        return Decision(Turn.REFUSE, at.failure, AveragingCode.STATE_FAILED)
    if at.now < at.rests_until:
        return Decision(Turn.WAIT, "the donor rests after a copy")
    return Decision(Turn.COPY, "there is no copy that this request may get")


class UploadQueue:
    """See the module."""

    def __init__(self, *, max_uploads: int = MAX_UPLOADS, max_age: float | None = DEFAULT_MAX_AGE) -> None:
        """``max_age``: seconds; None: a copy that is in use is shared however old it is."""
        self._max_uploads = max_uploads
        self._max_age = max_age
        self._allowed = True
        self._waiting: list[Request] = []
        self._admitted: dict[int, Request] = {}
        self._missing: dict[PeerID, float] = {}
        """Joiners that lost their connection, and until when the copy is kept in use for them."""
        self._machine = Machine(Copy.ABSENT, TRANSITIONS, HEARD)
        self._state_id: bytes | None = None
        self._asked_at = 0.0
        """When the copy was asked for: what is in it is not older."""
        self._used_at = 0.0
        self._rests_until = -math.inf
        self._unrested = 0.0
        """Seconds of copying for which the donor had not rested when the latest copy was made, or had failed,"""
        self._copied_at = -math.inf
        """which was then."""
        self._hold_off_until = -math.inf
        self._failure = ""

    @property
    def deadline(self) -> float:
        """When TimePassed is due."""
        times = [NEVER]
        if self._is_held and not self._admitted:
            times.append(self._used_at + KEEP_SECONDS)
        if self._waiting and len(self._admitted) < self._max_uploads and not self._is_copying:
            if self._is_in_use:
                times += [self._waiting[0].arrived + MAX_PATIENCE, *self._missing.values()]
            else:
                times.append(self._rests_until)
        return min(times)

    @property
    def uploads(self) -> int:
        """Requests that have a slot."""
        return len(self._admitted)

    def handle(self, event: Event, now: float) -> list[Effect]:
        """Take in an event; what has to be done comes back, in order.

        :raises IllegalTransition: a copy comes, or fails, that was not asked for
        """
        self._machine.hear(event, now)
        effects: list[Effect] = []
        self._missing = {peer: until for peer, until in self._missing.items() if until > now}
        match event:
            case RequestArrived(request, peer, state_id):
                effects += self._arrive(Request(request, peer, state_id, now))
            case RequestEnded(request, complete):
                self._end(request, complete, now)
            case CopyTaken(state_id):
                effects += self._take(state_id, now)
            case CopyFailed(reason):
                effects += self._fail(reason, now)
            case SharingSwitched(allowed):
                self._allowed = allowed
                if not allowed:
                    effects += self._refuse_waiting(
                        AveragingCode.NOT_SHARING, "this peer shares its state no longer"
                    )
            case TimePassed():
                pass
        effects += self._admit(now)
        effects += self._expire(now)
        effects += self._tell_positions()
        return effects

    @property
    def _is_copying(self) -> bool:
        return self._machine.state is Copy.MAKING

    @property
    def _is_held(self) -> bool:
        return self._machine.state is Copy.HELD

    def _arrive(self, new: Request) -> Iterator[Effect]:
        if not self._allowed:
            yield Refuse(new.request, AveragingCode.NOT_SHARING, "this peer does not share its state")
            return
        own = [one for one in (*self._admitted.values(), *self._waiting) if one.peer == new.peer]
        resumes = new.state_id is not None and new.state_id == self._state_id
        if resumes:
            # The joiner knows that its connection is gone; this side may take longer to notice.
            self._missing.pop(new.peer, None)
            for old in own:
                self._remove(old.request)
                yield Refuse(old.request, AveragingCode.REPLACED, "the same peer has asked again")
        elif len(own) >= MAX_REQUESTS_PER_PEER:
            yield Refuse(new.request, ResetCode.BUSY, f"{new.peer} has {len(own)} requests here already")
            return
        if not resumes and len(self._waiting) >= MAX_WAITING:
            yield Refuse(
                new.request, ResetCode.BUSY, f"{len(self._waiting)} others wait for this peer's state already"
            )
            return
        self._waiting.insert(0 if resumes else len(self._waiting), new)

    @property
    def _is_in_use(self) -> bool:
        """Whether somebody downloads the copy, or is expected back."""
        return self._is_held and bool(self._admitted or self._missing)

    def _end(self, request: int, complete: bool, now: float) -> None:
        admitted = self._remove(request)
        if admitted is not None:
            self._used_at = now
            if not complete and self._is_held:
                self._missing[admitted.peer] = now + RESUME_SECONDS

    def _remove(self, request: int) -> Request | None:
        """Forget a request; returns it if it had a slot."""
        self._waiting = [one for one in self._waiting if one.request != request]
        return self._admitted.pop(request, None)

    def _take(self, state_id: bytes, now: float) -> list[Effect]:
        self._machine.move(Copy.HELD)
        self._state_id, self._used_at = state_id, now
        self._rest_after_copy(now)
        return [Serve(request) for request in self._admitted]

    def _rest_after_copy(self, now: float) -> None:
        took, rested = now - self._asked_at, self._asked_at - self._copied_at
        unrested = max(0.0, self._unrested - rested / REST_FACTOR) + took
        self._unrested = min(unrested, ALLOWANCE + MAX_REST / REST_FACTOR)
        self._copied_at = now
        self._rests_until = now + REST_FACTOR * max(0.0, self._unrested - ALLOWANCE)

    def _fail(self, reason: str, now: float) -> Iterator[Effect]:
        self._machine.move(Copy.ABSENT)
        self._rest_after_copy(now)
        self._hold_off_until, self._failure = now + HOLD_OFF_SECONDS, reason
        for request in list(self._admitted):
            del self._admitted[request]
            yield Refuse(request, AveragingCode.STATE_FAILED, reason)

    def _refuse_waiting(self, code: str, reason: str) -> Iterator[Effect]:
        waiting, self._waiting = self._waiting, []
        if self._is_copying:  # nobody has got anything of it yet
            waiting += self._admitted.values()
            self._admitted = {}
        for one in waiting:
            yield Refuse(one.request, code, reason)

    def _admit(self, now: float) -> Iterator[Effect]:
        while self._waiting and len(self._admitted) < self._max_uploads:
            first = self._waiting[0]
            decision = decide_next(first, self._situation(now))
            match decision.turn:
                case Turn.WAIT:
                    return
                case Turn.REFUSE:
                    del self._waiting[0]
                    yield Refuse(first.request, decision.code, decision.reason)
                    continue
                case Turn.SERVE:
                    yield Serve(first.request)
                case Turn.COPY:
                    yield from self._ask_for_copy(now)
                case Turn.JOIN:
                    pass  # served with the others when the copy is there
            self._admitted[first.request] = self._waiting.pop(0)

    def _situation(self, now: float) -> Situation:
        return Situation(
            now=now,
            copy=self._machine.state,
            state_id=self._state_id,
            asked_at=self._asked_at,
            is_in_use=self._is_in_use,
            max_age=self._max_age,
            rests_until=self._rests_until,
            hold_off_until=self._hold_off_until,
            failure=self._failure,
        )

    def _ask_for_copy(self, now: float) -> Iterator[Effect]:
        if self._is_held:
            yield self._drop()
        self._machine.move(Copy.MAKING)
        self._asked_at = now
        yield TakeCopy()

    def _drop(self) -> Effect:
        self._machine.move(Copy.ABSENT)
        self._state_id = None
        return DropCopy()

    def _expire(self, now: float) -> Iterator[Effect]:
        is_kept = self._allowed and now < self._used_at + KEEP_SECONDS
        if self._is_held and not self._admitted and not is_kept:
            self._missing.clear()
            yield self._drop()

    def _tell_positions(self) -> Iterator[Effect]:
        copying = list(self._admitted.values()) if self._is_copying else []
        positions = [(one, 0) for one in copying] + [(one, n) for n, one in enumerate(self._waiting, 1)]
        for one, position in positions:
            if one.told != position:
                one.told = position
                yield TellPosition(one.request, position)
