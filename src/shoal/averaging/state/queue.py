"""Who gets a donor's state next: slots, a queue, and the life of the one copy that all joiners share. Pure.

Theory of operation. A request is *waiting* in the queue or *admitted* to one of ``max_uploads`` slots. The donor holds
one copy at a time: newcomers share it while it is fresh (``FRESH_SECONDS``). A stale copy is replaced as soon as nobody
downloads it any more; until then newcomers wait, so that there are never two copies, and whoever began gets the end of
what it began. One slow joiner does not stop the donor by that: who has waited for half of the copy's age, but at most
``MAX_PATIENCE``, gets the stale copy. So the pauses in which a copy may come to its end grow with its age. A copy that
nobody uses is kept for ``KEEP_SECONDS``, for joiners whose connection broke; they go to the front of the queue.

:meth:`UploadQueue.handle` is the one entry point: events and ``now`` in, effects out.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TypeAlias

from shoal.averaging.state.messages import BUSY, NOT_SHARING, REPLACED, STATE_FAILED
from shoal.p2p.identity import PeerID

MAX_UPLOADS = 4
MAX_WAITING = 32
MAX_REQUESTS_PER_PEER = 2
FRESH_SECONDS = 60.0
"""A newcomer shares a copy up to this old."""
KEEP_SECONDS = 60.0
"""For how long a copy is kept after its last use."""
MIN_PATIENCE = 30.0
MAX_PATIENCE = 120.0
"""Bounds of the time for which a newcomer waits for a fresh copy while others download a stale one."""
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
    """Served to the end, or the joiner is gone, wherever it was."""

    request: int


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


@dataclass(frozen=True)
class TimePassed:
    """:attr:`UploadQueue.deadline` may have come."""


Event: TypeAlias = RequestArrived | RequestEnded | CopyTaken | CopyFailed | SharingSwitched | TimePassed


@dataclass(frozen=True)
class TakeCopy:
    """Have the host make a copy of its state; answered by CopyTaken or CopyFailed."""


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


@dataclass
class _Request:
    request: int
    peer: PeerID
    state_id: bytes | None
    arrived: float
    told: int | None = None


class UploadQueue:
    """See the module."""

    def __init__(self, *, max_uploads: int = MAX_UPLOADS) -> None:
        self._max_uploads = max_uploads
        self._allowed = True
        self._waiting: list[_Request] = []
        self._admitted: dict[int, _Request] = {}
        self._copying = False
        self._state_id: bytes | None = None
        self._taken_at = 0.0
        self._used_at = 0.0
        self._hold_off_until: float | None = None
        self._failure = ""

    @property
    def deadline(self) -> float | None:
        """When TimePassed is due, if ever."""
        if self._state_id is None:
            return None
        if not self._admitted:
            return self._used_at + KEEP_SECONDS
        has_room = len(self._admitted) < self._max_uploads
        return self._patience_ends(self._waiting[0]) if self._waiting and has_room else None

    @property
    def uploads(self) -> int:
        """Requests that have a slot."""
        return len(self._admitted)

    def handle(self, event: Event, now: float) -> list[Effect]:
        """Take in an event; what has to be done comes back, in order."""
        effects: list[Effect] = []
        match event:
            case RequestArrived(request, peer, state_id):
                effects += self._arrive(_Request(request, peer, state_id, now))
            case RequestEnded(request):
                self._end(request, now)
            case CopyTaken(state_id):
                self._copying = False
                self._state_id, self._taken_at, self._used_at = state_id, now, now
                effects += [Serve(request) for request in self._admitted]
            case CopyFailed(reason):
                effects += self._fail(reason, now)
            case SharingSwitched(allowed):
                self._allowed = allowed
                if not allowed:
                    effects += self._refuse_waiting(NOT_SHARING, "this peer shares its state no longer")
            case TimePassed():
                pass
        effects += self._admit(now)
        effects += self._expire(now)
        effects += self._tell_positions()
        return effects

    def _arrive(self, new: _Request) -> Iterator[Effect]:
        if not self._allowed:
            yield Refuse(new.request, NOT_SHARING, "this peer does not share its state")
            return
        own = [one for one in (*self._admitted.values(), *self._waiting) if one.peer == new.peer]
        resumes = new.state_id is not None and new.state_id == self._state_id
        if resumes:
            # The joiner knows that its connection is gone; this side may take longer to notice.
            for old in own:
                self._remove(old.request)
                yield Refuse(old.request, REPLACED, "the same peer has asked again")
        elif len(own) >= MAX_REQUESTS_PER_PEER:
            yield Refuse(new.request, BUSY, f"{new.peer} has {len(own)} requests here already")
            return
        if not resumes and len(self._waiting) >= MAX_WAITING:
            yield Refuse(new.request, BUSY, f"{len(self._waiting)} others wait for this peer's state already")
            return
        self._waiting.insert(0 if resumes else len(self._waiting), new)

    def _end(self, request: int, now: float) -> None:
        if self._remove(request):
            self._used_at = now

    def _remove(self, request: int) -> bool:
        """Forget a request; true if it had a slot."""
        self._waiting = [one for one in self._waiting if one.request != request]
        return self._admitted.pop(request, None) is not None

    def _fail(self, reason: str, now: float) -> Iterator[Effect]:
        self._copying = False
        self._hold_off_until, self._failure = now + HOLD_OFF_SECONDS, reason
        for request in list(self._admitted):
            del self._admitted[request]
            yield Refuse(request, STATE_FAILED, reason)

    def _refuse_waiting(self, code: str, reason: str) -> Iterator[Effect]:
        waiting, self._waiting = self._waiting, []
        if self._copying:  # nobody has got anything of it yet
            waiting += self._admitted.values()
            self._admitted = {}
        for one in waiting:
            yield Refuse(one.request, code, reason)

    def _admit(self, now: float) -> Iterator[Effect]:
        while self._waiting and len(self._admitted) < self._max_uploads:
            first = self._waiting[0]
            if self._state_id is not None and self._is_served(first, now):
                yield Serve(first.request)
            elif self._copying:
                pass  # served with the others when the copy is there
            elif self._state_id is not None and self._admitted:
                return  # the copy is stale, and in use
            elif self._hold_off_until is not None and now < self._hold_off_until:
                yield Refuse(first.request, STATE_FAILED, self._failure)
                del self._waiting[0]
                continue
            else:
                if self._state_id is not None:
                    self._state_id = None
                    yield DropCopy()
                self._copying = True
                yield TakeCopy()
            self._admitted[first.request] = self._waiting.pop(0)

    def _is_served(self, one: _Request, now: float) -> bool:
        """Whether a request gets the copy that there is: it is fresh, or the joiner has a part of it, or it has waited
        enough for those who keep it from being replaced.
        """
        is_fresh = now <= self._taken_at + FRESH_SECONDS
        had_patience = bool(self._admitted) and now >= self._patience_ends(one)
        return is_fresh or one.state_id == self._state_id or had_patience

    def _patience_ends(self, one: _Request) -> float:
        age = one.arrived - self._taken_at
        return one.arrived + min(max(MIN_PATIENCE, age / 2), MAX_PATIENCE)

    def _expire(self, now: float) -> Iterator[Effect]:
        is_kept = self._allowed and now < self._used_at + KEEP_SECONDS
        if self._state_id is not None and not self._admitted and not is_kept:
            self._state_id = None
            yield DropCopy()

    def _tell_positions(self) -> Iterator[Effect]:
        copying = list(self._admitted.values()) if self._copying else []
        positions = [(one, 0) for one in copying] + [(one, n) for n, one in enumerate(self._waiting, 1)]
        for one, position in positions:
            if one.told != position:
                one.told = position
                yield TellPosition(one.request, position)
