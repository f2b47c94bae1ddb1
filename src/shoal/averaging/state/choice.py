"""Which donor a joiner asks next, where it resumes, and when it gives up. Pure: no I/O, clock or randomness.

Theory of operation. Donors of the highest priority come first, in random order among equals (the caller shuffles by
``tiebreak``). A donor that puts the joiner into its queue is left at once for another one of the same priority that
was not asked yet; when all of them have a queue, the joiner waits at the shortest. A donor that has asked it to wait
for ``WAIT_PATIENCE``, or for ``FRONT_PATIENCE`` at the front of its queue, is left for any other one, whatever its
priority, that was not left so before; so is one that gives no sign for as long as :func:`~.policy.patience` says, also
while its connection is made again. After ``LAST_PATIENCE`` it has failed, though nobody else be left. A connection to a
donor that has answered is made again when it breaks, ``MAX_RESUMPTIONS`` times in a row without progress, unless its
process has ended and there is another donor; whatever else goes wrong, the next donor's turn comes. When nobody is
left, the DHT is asked once more for donors that have come meanwhile.

:meth:`DonorChoice.handle` is the one entry point: what has happened and ``now`` in, what to do now out; nothing: go on
with the donor that was asked. What to do is decided by :mod:`.policy`.
"""

from __future__ import annotations

import enum
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias

from shoal.averaging.state.policy import (
    LAST_PATIENCE,
    Candidate,
    Donor,
    has_alternative,
    patience,
    prefer,
    wait_or_go,
)
from shoal.p2p.identity import PeerID
from shoal.sansio.core import NEVER, TimePassed
from shoal.sansio.machine import Machine

MAX_RESUMPTIONS = 4
FIRST_BACKOFF = 0.25
"""Seconds before a broken connection is made again; doubled for each further try."""


@dataclass(frozen=True)
class StateWanted:
    """A state is wanted."""


@dataclass(frozen=True)
class DonorsFound:
    """The DHT was asked."""

    donors: tuple[Donor, ...]


@dataclass(frozen=True)
class LookFailed:
    """The DHT could not be asked."""

    reason: str


@dataclass(frozen=True)
class DonorBusy:
    """The donor that was asked has put the joiner at this place of its queue; 0: it is about to begin."""

    position: int


@dataclass(frozen=True)
class OfferReceived:
    """The donor that was asked has begun to send its state, from the start."""


@dataclass(frozen=True)
class ChunkReceived:
    """A piece of the state has come from the donor that was asked."""


@dataclass(frozen=True)
class AllChunksReceived:
    """What is still to come is the digest; the donor may have to compute it first."""


@dataclass(frozen=True)
class StateReceived:
    """The state is whole, and verified."""


@dataclass(frozen=True)
class ConnectionBroke:
    """The connection to the donor that was asked is gone, or could not be made. ``has_ended``: its process has ended,
    as it said itself, or as its machine says, where nobody listens any more.
    """

    reason: str
    has_ended: bool = False


@dataclass(frozen=True)
class DonorFailed:
    """The donor that was asked refuses, stalls, or sends what cannot be: there is nothing to be had from it."""

    reason: str


Event: TypeAlias = (
    StateWanted
    | DonorsFound
    | LookFailed
    | DonorBusy
    | OfferReceived
    | ChunkReceived
    | AllChunksReceived
    | StateReceived
    | ConnectionBroke
    | DonorFailed
    | TimePassed
)


@dataclass(frozen=True)
class LeaveDonor:
    """Ask the donor that was asked for nothing more. Another one is asked next."""

    peer: PeerID
    reason: str


@dataclass(frozen=True)
class AskDonor:
    """Ask this donor, ``delay`` seconds from now, for what is missing, and no other one any more."""

    donor: Donor
    delay: float = 0.0
    reason: str = ""
    """Why this one."""


@dataclass(frozen=True)
class LookForDonors:
    """Ask the DHT."""


@dataclass(frozen=True)
class GiveUp:
    """There is nobody left to ask, or nobody can be found."""

    reason: str = ""


Effect: TypeAlias = LeaveDonor | AskDonor | LookForDonors | GiveUp


class DownloadState(enum.Enum):
    NEW = "new"
    LOOKING = "looking"
    """Waits for the DHT."""
    ASKING = "asking"
    """A donor was asked, and may be sending."""
    DONE = "done"
    GIVEN_UP = "given up"


TRANSITIONS: dict[DownloadState, set[DownloadState]] = {
    DownloadState.NEW: {DownloadState.LOOKING},
    DownloadState.LOOKING: {DownloadState.ASKING, DownloadState.GIVEN_UP},
    DownloadState.ASKING: {DownloadState.ASKING, DownloadState.LOOKING, DownloadState.DONE},
    DownloadState.DONE: set(),
    DownloadState.GIVEN_UP: set(),
}

HEARD: dict[DownloadState, frozenset[type]] = {
    DownloadState.NEW: frozenset({StateWanted}),
    DownloadState.LOOKING: frozenset({DonorsFound, LookFailed, TimePassed}),
    DownloadState.ASKING: frozenset(
        {
            DonorBusy, OfferReceived, ChunkReceived, AllChunksReceived, StateReceived, ConnectionBroke, DonorFailed,
            TimePassed,
        }
    ),
    DownloadState.DONE: frozenset({TimePassed}),
    DownloadState.GIVEN_UP: frozenset({TimePassed}),
}  # fmt: skip
"""The events that may come in each state. Any other one is illegal."""


class DonorChoice:
    """See the module. ``next_chunk_timeout``: seconds between two chunks that the user allows; None: no limit."""

    def __init__(self, next_chunk_timeout: float | None = None) -> None:
        self._next_chunk_timeout = next_chunk_timeout
        self._machine = Machine(DownloadState.NEW, TRANSITIONS, HEARD)
        self._candidates: dict[PeerID, Candidate] = {}
        self._current: Candidate | None = None
        self._failed: set[PeerID] = set()
        self._has_settled = False
        self._heard_at = self._waits_since = 0.0
        """When there was a sign of the donor, and since when nothing of the state has come."""
        self._offered_at: float | None = None
        """When it began to send its state."""
        self._has_sent_all = False
        self._silent_at = NEVER

    @property
    def state(self) -> DownloadState:
        """What the joiner is doing."""
        return self._machine.state

    @property
    def deadline(self) -> float:
        """When the donor, without a further sign, has been silent for too long."""
        return self._silent_at if self.state is DownloadState.ASKING else NEVER

    @property
    def has_alternative(self) -> bool:
        """Whether there is a donor to go to that was neither left before nor has failed."""
        return has_alternative(self._current, self._left())

    def handle(self, event: Event, now: float) -> list[Effect]:
        """Take in what has happened, and say what to do now; nothing: go on with the donor that was asked.

        :raises IllegalTransition: the event cannot come now
        """
        self._machine.hear(event, now)
        match event:
            case StateWanted():
                return self._look()
            case DonorsFound(donors):
                return self._add(donors, now)
            case LookFailed(reason):
                self._machine.move(DownloadState.GIVEN_UP)
                return [GiveUp(reason)]
            case DonorBusy(position):
                return self._hear_position(position, now)
            case OfferReceived() | ChunkReceived() | AllChunksReceived() | StateReceived():
                self._get_on(event, now)
            case ConnectionBroke(reason, has_ended):
                return self._reconnect(reason, has_ended, now)
            case DonorFailed(reason):
                return self._next_after_failure(reason, now)
            case TimePassed():
                return self._on_time(now)
        return []

    def story(self) -> str:
        """What each donor answered, for people."""
        told = []
        for one in self._candidates.values():
            name = f"{one.donor.peer} (priority {one.donor.priority:g})"
            where = f"place {one.position} in its queue" if one.position else "no answer yet"
            told.append(f"{name}: {'; '.join(one.answers) or (where if one.was_asked else 'not asked')}")
        return ". ".join(told)

    def _look(self) -> list[Effect]:
        self._machine.move(DownloadState.LOOKING)
        return [LookForDonors()]

    def _add(self, donors: Sequence[Donor], now: float) -> list[Effect]:
        new = [donor for donor in donors if donor.peer not in self._candidates]
        self._candidates |= {donor.peer: Candidate(donor) for donor in new}
        if new:
            return self._choose(now)
        self._machine.move(DownloadState.GIVEN_UP)
        return [GiveUp()]

    def _get_on(
        self, event: OfferReceived | ChunkReceived | AllChunksReceived | StateReceived, now: float
    ) -> None:
        match event:
            case OfferReceived():
                self._offered_at = now
                self._hear(now)
            case ChunkReceived():
                current = self._asked()
                current.has_answered, current.resumptions = True, 0
                self._waits_since = now
                self._hear(now)
            case AllChunksReceived():
                self._has_sent_all, self._heard_at = True, now
                self._silent_at = now + self._last_patience
            case StateReceived():
                self._machine.move(DownloadState.DONE)

    def _hear(self, now: float) -> None:
        """There is a sign of the donor."""
        self._heard_at = now
        self._be_patient(now)

    def _be_patient(self, now: float) -> None:
        invested = 0.0 if self._offered_at is None else now - self._offered_at
        allowed = patience(invested, self._next_chunk_timeout)
        self._silent_at = self._heard_at + (allowed if self.has_alternative else self._last_patience)

    @property
    def _last_patience(self) -> float:
        """For how many seconds a donor may be silent though there is nobody else to ask."""
        return max(LAST_PATIENCE, self._next_chunk_timeout or 0.0)

    def _on_time(self, now: float) -> list[Effect]:
        if now < self.deadline:
            return []
        silence = f"no sign of it for {now - self._heard_at:.1f} s"
        if self.has_alternative and not self._has_sent_all:
            return self._leave(f"{silence}, and there are others to ask", now)
        return [LeaveDonor(self._asked().donor.peer, silence), *self._next_after_failure(silence, now)]

    def _hear_position(self, position: int, now: float) -> list[Effect]:
        current = self._asked()
        current.hear_position(position, now)
        self._hear(now)
        decision = wait_or_go(
            current,
            self._left(),
            waited=now - self._waits_since,
            at_front=current.at_front(now),
            has_settled=self._has_settled,
        )
        if decision.has_failed:
            return [
                LeaveDonor(current.donor.peer, decision.reason),
                *self._next_after_failure(decision.reason, now),
            ]
        if decision.leaves:
            return self._leave(decision.reason, now)
        self._has_settled = decision.has_settled
        return [] if decision.go_to is None else self._ask(decision.go_to, decision.reason, now)

    def _leave(self, reason: str, now: float) -> list[Effect]:
        """Try others first; this one may be asked again when nobody else is left."""
        current = self._asked()
        current.was_left, self._has_settled = True, False
        current.answers.append(reason)
        return [LeaveDonor(current.donor.peer, reason), *self._choose(now)]

    def _reconnect(self, reason: str, has_ended: bool, now: float) -> list[Effect]:
        current = self._asked()
        # A firewall may say, too, that nobody listens: where nobody else is left, it is worth a few tries.
        if not current.has_answered or (has_ended and self.has_alternative):
            return self._next_after_failure(reason, now)
        current.resumptions += 1
        self._has_sent_all = False
        if current.resumptions > MAX_RESUMPTIONS:
            return self._next_after_failure(f"{reason}, also in {MAX_RESUMPTIONS} further tries", now)
        delay = FIRST_BACKOFF * 2 ** (current.resumptions - 1)
        self._be_patient(now + delay)  # what it has sent counts, and its silence goes on
        self._silent_at = max(self._silent_at, now + delay)
        return [AskDonor(current.donor, delay, "its connection broke")]

    def _next_after_failure(self, reason: str, now: float) -> list[Effect]:
        current = self._asked()
        current.answers.append(reason)
        self._failed.add(current.donor.peer)
        self._has_settled = False
        return self._choose(now)

    def _choose(self, now: float) -> list[Effect]:
        candidate, reason = prefer(self._left())
        return self._look() if candidate is None else self._ask(candidate, reason, now)

    def _ask(self, candidate: Candidate, reason: str, now: float) -> list[Effect]:
        self._machine.move(DownloadState.ASKING)
        self._current = candidate
        candidate.was_asked = True
        candidate.has_answered = False
        candidate.front_since = None
        self._waits_since, self._offered_at, self._has_sent_all = now, None, False
        self._hear(now)
        return [AskDonor(candidate.donor, reason=reason)]

    def _left(self) -> list[Candidate]:
        return [one for peer, one in self._candidates.items() if peer not in self._failed]

    def _asked(self) -> Candidate:
        assert self._current is not None, "nobody was asked"
        return self._current
