"""Which donor a joiner asks next, where it resumes, and when it gives up. Pure: no I/O, clock or randomness.

Theory of operation. Donors of the highest priority come first, in random order among equals (the caller shuffles by
``tiebreak``). A donor that puts the joiner into its queue is left at once for another one of the same priority that
was not asked yet; when all of them have a queue, the joiner waits at the shortest. A donor that has asked it to wait
for ``WAIT_PATIENCE`` is left for any other one, whatever its priority, that was not left so before; so is one that
gives no sign for :func:`patience`, also while its connection is made again. A connection to a donor that has answered
is made again when it breaks, ``MAX_RESUMPTIONS`` times in a row without progress; whatever else goes wrong, the next
donor's turn comes. When nobody is left, the DHT is asked once more for donors that have come meanwhile.

:meth:`DonorChoice.handle` is the one entry point: what has happened in, what to do now out.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TypeAlias

from shoal.p2p.identity import PeerID
from shoal.utils import figures

MAX_RESUMPTIONS = 4
WAIT_PATIENCE = 120.0
"""Seconds without a chunk at a donor that says that it lives; what it says costs a liar nothing."""
SILENCE = 6.0
"""Seconds without a chunk, or another sign, after which a donor is left while there is another one to ask. A link that
takes longer for a chunk (1.4 Mbit/s) leaves each donor once, and then stays.
"""
INVESTED_SHARE = 0.25
MAX_SILENCE = 60.0
"""Leaving costs what has come: so a donor may be silent for this share of the time that it has taken, up to a limit."""
FIRST_BACKOFF = 0.25
"""Seconds before a broken connection is made again; doubled for each further try."""


@dataclass(frozen=True)
class Donor:
    """A peer that has declared that it shares its state."""

    peer: PeerID
    priority: float
    tiebreak: float
    addresses: tuple[str, ...] = ()


@dataclass(frozen=True)
class DonorsFound:
    """The DHT was asked."""

    donors: tuple[Donor, ...]


@dataclass(frozen=True)
class DonorBusy:
    """The donor that was asked has put the joiner at this place of its queue; 0: it is about to begin. For ``waited``
    seconds it has sent nothing of the state.
    """

    position: int
    waited: float = 0.0


@dataclass(frozen=True)
class ChunkReceived:
    """A piece of the state has come from the donor that was asked."""


@dataclass(frozen=True)
class ConnectionBroke:
    """The connection to the donor that was asked is gone, or could not be made."""

    reason: str


@dataclass(frozen=True)
class DonorFailed:
    """The donor that was asked refuses, stalls, or sends what cannot be: there is nothing to be had from it."""

    reason: str


@dataclass(frozen=True)
class DonorSilent:
    """The donor that was asked has given no sign for ``seconds``, and :attr:`DonorChoice.has_alternative`."""

    seconds: float

    @property
    def reason(self) -> str:
        return f"no sign of it for {self.seconds:.1f} s, and there are others to ask"


Event: TypeAlias = DonorsFound | DonorBusy | ChunkReceived | ConnectionBroke | DonorFailed | DonorSilent


@dataclass(frozen=True)
class AskDonor:
    """Ask this donor, ``delay`` seconds from now, for what is missing."""

    donor: Donor
    delay: float = 0.0


@dataclass(frozen=True)
class Stay:
    """Go on with the donor that was asked."""


@dataclass(frozen=True)
class LookForDonors:
    """Ask the DHT again."""


@dataclass(frozen=True)
class GiveUp:
    """There is nobody left to ask."""


Action: TypeAlias = AskDonor | Stay | LookForDonors | GiveUp


@dataclass
class _Candidate:
    donor: Donor
    was_asked: bool = False
    position: int | None = None
    """Its place in this donor's queue, as last heard."""
    has_answered: bool = False
    was_left: bool = False
    """It made the joiner wait too long; it is asked again only when nobody else is left."""
    resumptions: int = 0
    answers: list[str] = field(default_factory=list)


def patience(invested: float, next_chunk_timeout: float | None) -> float:
    """For how many seconds a donor may be silent while there is another one to ask.

    :param invested: seconds since it began to send its state
    """
    allowed = min(max(SILENCE, INVESTED_SHARE * invested), MAX_SILENCE)
    return allowed if next_chunk_timeout is None else min(allowed, max(next_chunk_timeout / 2, SILENCE / 2))


class DonorChoice:
    """See the module."""

    def __init__(self) -> None:
        self._candidates: dict[PeerID, _Candidate] = {}
        self._current: _Candidate | None = None
        self._failed: set[PeerID] = set()
        self._has_settled = False

    def handle(self, event: Event) -> Action:
        """Take in what has happened, and say what to do now."""
        match event:
            case DonorsFound(donors):
                return self._add(donors)
            case DonorBusy(position, waited):
                return self._hear_position(position, waited)
            case ChunkReceived():
                current = self._asked()
                current.has_answered, current.resumptions = True, 0
                return Stay()
            case ConnectionBroke(reason):
                return self._reconnect(reason)
            case DonorFailed(reason):
                return self._next_after_failure(reason)
            case DonorSilent():
                return self._leave(event.reason)

    @property
    def has_alternative(self) -> bool:
        """Whether there is a donor to go to that was neither left before nor has failed."""
        return any(one is not self._current and not one.was_left for one in self._left())

    def story(self) -> str:
        """What each donor answered, for people."""
        told = []
        for one in self._candidates.values():
            name = f"{one.donor.peer} (priority {one.donor.priority:g})"
            where = f"place {one.position} in its queue" if one.position else "no answer yet"
            told.append(f"{name}: {'; '.join(one.answers) or (where if one.was_asked else 'not asked')}")
        return ". ".join(told)

    def _add(self, donors: Sequence[Donor]) -> Action:
        new = [donor for donor in donors if donor.peer not in self._candidates]
        self._candidates |= {donor.peer: _Candidate(donor) for donor in new}
        return self._choose() if new else GiveUp()

    def _hear_position(self, position: int, waited: float) -> Action:
        current = self._asked()
        current.position, current.has_answered = position, True
        if waited >= WAIT_PATIENCE and self.has_alternative:
            return self._leave(f"nothing but place {position} in its queue for {figures.duration(waited)}")
        if position == 0:
            return Stay()
        if self._has_settled or current.resumptions:
            return Stay()
        equals = [
            one
            for one in self._left()
            if (one.donor.priority, one.was_left) == (current.donor.priority, current.was_left)
        ]
        # Leaving a queue costs the place in it: one round through all of them, and then patience.
        self._has_settled = all(one.was_asked for one in equals)
        shortest = min(equals, key=_wait)
        return Stay() if shortest is current else self._ask(shortest)

    def _leave(self, reason: str) -> Action:
        """Try others first; this one may be asked again when nobody else is left."""
        current = self._asked()
        current.was_left, self._has_settled = True, False
        current.answers.append(reason)
        return self._choose()

    def _reconnect(self, reason: str) -> Action:
        current = self._asked()
        if not current.has_answered:
            return self._next_after_failure(reason)
        current.resumptions += 1
        if current.resumptions > MAX_RESUMPTIONS:
            return self._next_after_failure(f"{reason}, also in {MAX_RESUMPTIONS} further tries")
        return AskDonor(current.donor, FIRST_BACKOFF * 2 ** (current.resumptions - 1))

    def _next_after_failure(self, reason: str) -> Action:
        current = self._asked()
        current.answers.append(reason)
        self._failed.add(current.donor.peer)
        self._has_settled = False
        return self._choose()

    def _choose(self) -> Action:
        left = self._left()
        if not left:
            return LookForDonors()
        return self._ask(min(left, key=lambda one: (one.was_left, -one.donor.priority, *_wait(one))))

    def _ask(self, candidate: _Candidate) -> Action:
        self._current = candidate
        candidate.was_asked = True
        candidate.has_answered = False
        return AskDonor(candidate.donor)

    def _left(self) -> list[_Candidate]:
        return [one for peer, one in self._candidates.items() if peer not in self._failed]

    def _asked(self) -> _Candidate:
        assert self._current is not None, "nobody was asked"
        return self._current


def _wait(candidate: _Candidate) -> tuple[int, float]:
    """How long a donor's queue is as far as known; unknown ones first."""
    return (candidate.position or 0, candidate.donor.tiebreak)
