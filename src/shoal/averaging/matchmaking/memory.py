"""Whom one peer has seen fail, and for how long it avoids them. Pure: the time is an argument.

What this peer saw itself counts for itself and that peer. What another member says counts once several members have
said it, since one alone may lie, or may have been at fault itself. Each further failure of a kind doubles the time
for which a peer is avoided. Failures fade, and a round that commits with a peer makes up for half of them.

What is remembered here is what the peer declares (:attr:`.Declaration.lost`): by :mod:`.apart` the plans of all peers
keep the two apart. So it steers whom a peer asks, and whom it accepts. Where no group at all would be left,
everybody stays together.
"""

from __future__ import annotations

import enum
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import NamedTuple

from shoal.averaging.group import MAX_LOST
from shoal.p2p.identity import PeerID

HALF_LIFE = 600.0
"""Seconds in which a failure comes to count half as much."""
AVOIDED_AT_MOST = 600.0
"""Seconds for which a peer is avoided at most, however often it failed."""
FORGOTTEN_BELOW = 0.1
"""What counts for less than this part of a failure is forgotten."""
SEVERAL = 2
"""As many members have to say that a peer failed before a peer believes what it has not seen."""
MAX_REMEMBERED = 1024
"""Of more peers than these, those are forgotten that failed longest ago."""


class PeerKey(NamedTuple):
    """Which peer: a process that is started again with the same identity is another one."""

    peer_id: PeerID
    incarnation: int | None = None
    """The number of its process; None: not known."""


class Fault(enum.Enum):
    """What a peer did; :data:`AVOIDED_FOR` says how bad that is."""

    UNREACHED = enum.auto()
    """There was no route to it, or the connection was lost."""
    STALLED = enum.auto()
    """It accepted this peer as a follower, and put its group off again and again."""
    SILENT = enum.auto()
    """It accepted this peer as a follower, and neither began nor postponed when its start time had come."""
    UNANSWERED = enum.auto()
    """It gave no answer to a request to join."""
    EXCLUDED = enum.auto()
    """A round went on without it: it gave up, was silent, or never joined."""

    @property
    def words(self) -> str:
        """What the peer did, for people."""
        return _WORDS[self]


_WORDS = {
    Fault.UNREACHED: "could not be reached",
    Fault.STALLED: "kept this peer waiting and did not begin",
    Fault.SILENT: "neither began nor postponed when its start time had come",
    Fault.UNANSWERED: "gave no answer",
    Fault.EXCLUDED: "was excluded from a round",
}


OF_THE_ROUTE = frozenset({Fault.UNREACHED, Fault.UNANSWERED})
"""Where there is no route there is no answer either: a connection that comes back makes up for both."""
HELD_ITS_FOLLOWER = frozenset({Fault.STALLED, Fault.SILENT})
"""What a leader does to all of its followers, each of which has to see it for itself."""
AVOIDED_FOR = {
    Fault.UNREACHED: 60.0,
    Fault.STALLED: 20.0,
    Fault.SILENT: 20.0,
    Fault.UNANSWERED: 5.0,
    Fault.EXCLUDED: 10.0,
}
"""Seconds for which a peer is avoided after it failed for the first time that counts."""

FORGIVEN_ONCE = {Fault.EXCLUDED: 0.0, Fault.SILENT: 2.0}
"""A peer that was stopped for a moment, or whose step was cancelled, is back at once: only a second time counts.
Seconds for which it is avoided the first time. Those that a silent leader held need some to gather without it."""


@dataclass
class _Seen:
    """How often a peer failed in one way."""

    score: float = 0.0
    scored_at: float = -math.inf
    until: float = -math.inf
    """When it is not avoided for that any more."""

    def faded(self, now: float) -> float:
        return self.score * math.pow(2.0, -max(0.0, now - self.scored_at) / HALF_LIFE)

    def add(self, fault: Fault, now: float) -> None:
        before = self.faded(now)
        self.score, self.scored_at = before + 1.0, now
        times = before
        if fault in FORGIVEN_ONCE:
            times = before - 1.0
            if before < 0.5:
                self.until = max(self.until, now + FORGIVEN_ONCE[fault])
                return
        # Failures fade, but how fast they can come is not bounded, and so neither is the score.
        seconds = AVOIDED_FOR[fault] * math.pow(2.0, min(times, 16.0))
        self.until = now + min(seconds, AVOIDED_AT_MOST)

    def forgive(self, now: float) -> None:
        self.score, self.scored_at, self.until = self.faded(now) / 2, now, -math.inf


@dataclass
class _Failures:
    """What is held against one peer."""

    seen: dict[Fault, _Seen] = field(default_factory=dict)
    told_by: dict[PeerID, float] = field(default_factory=dict)
    """Members that said it failed, and until when that counts."""
    is_gone: bool = False
    """Whether it was not connected at some time since it was not reached."""

    def add(self, fault: Fault, now: float) -> None:
        self.seen.setdefault(fault, _Seen()).add(fault, now)

    def forget_words(self, now: float) -> None:
        """Forget what others said long ago."""
        self.told_by = {member: until for member, until in self.told_by.items() if now < until}

    def ends_at(self, now: float) -> float:
        """When it is not avoided any more."""
        return max((seen.until for seen in self.seen.values()), default=now)


class FailureMemory:
    """Failures of other peers, as one peer remembers them.

    :param is_connected: whether a connection to a peer stands now
    :param incarnation: the number of the process that was last seen as a peer; None: not known
    """

    def __init__(
        self,
        is_connected: Callable[[PeerID], bool],
        incarnation: Callable[[PeerID], int | None],
    ) -> None:
        self._is_connected = is_connected
        self._incarnation = incarnation
        self._failures: dict[PeerKey, _Failures] = {}
        """The one that failed last is the last."""

    def note(self, peer: PeerID, fault: Fault, now: float) -> None:
        """This peer has seen ``peer`` fail."""
        failures = self._latest(peer)
        failures.add(fault, now)
        if fault in OF_THE_ROUTE:
            # A connection that still stands may be a dead one: only one that is made later is a good sign.
            failures.is_gone = not self._is_connected(peer)

    def hear(self, peer: PeerID, fault: Fault, now: float, *, told_by: PeerID) -> None:
        """``told_by`` says that ``peer`` failed: it counts as seen as soon as several members say so."""
        failures = self._latest(peer)
        failures.forget_words(now)
        failures.told_by[told_by] = now + HALF_LIFE
        if len(failures.told_by) >= SEVERAL:
            failures.told_by.clear()
            self.note(peer, fault, now)

    def forgive(self, peers: Iterable[PeerID], now: float) -> None:
        """A round has committed with these: they are avoided no more, but a next failure weighs more than a first."""
        wanted = set(peers)
        for peer, failures in self._failures.items():
            if peer.peer_id in wanted:
                failures.told_by.clear()
                for seen in failures.seen.values():
                    seen.forgive(now)

    def avoided(self, now: float) -> tuple[PeerID, ...]:
        """Whom to keep apart from: as many as a declaration names, those that are avoided longest first."""
        self._forget_former_processes()
        self._note_connections()
        self._fade(now)
        ends: dict[PeerID, float] = {}
        for peer, failures in self._failures.items():
            ends[peer.peer_id] = max(failures.ends_at(now), ends.get(peer.peer_id, now))
        peers = [peer for peer, end in ends.items() if end > now]
        peers.reverse()  # of equal ones the latest first
        return tuple(sorted(peers, key=lambda peer: -ends[peer])[:MAX_LOST])

    def avoids(self, peer: PeerID, fault: Fault, now: float) -> bool:
        """Whether this peer is kept apart from ``peer`` because of such a fault."""
        failures = self._failures.get(self._key(peer))
        return failures is not None and fault in failures.seen and now < failures.seen[fault].until

    def _key(self, peer: PeerID) -> PeerKey:
        """The process that is this peer now."""
        return PeerKey(peer, self._incarnation(peer))

    def _latest(self, peer: PeerID) -> _Failures:
        """What is held against ``peer``, which is now the last of all to be forgotten."""
        key = self._key(peer)
        failures = self._failures.pop(key, None) or _Failures()
        self._failures[key] = failures
        while len(self._failures) > MAX_REMEMBERED:
            del self._failures[next(iter(self._failures))]
        return failures

    def _forget_former_processes(self) -> None:
        """What an earlier process of a peer did is not held against the one that runs now."""
        self._forget(
            peer
            for peer in self._failures
            if peer.incarnation is not None
            and self._incarnation(peer.peer_id) not in (None, peer.incarnation)
        )

    def _note_connections(self) -> None:
        for peer, failures in self._failures.items():
            if not OF_THE_ROUTE & failures.seen.keys():
                continue
            is_connected = self._is_connected(peer.peer_id)
            if is_connected and failures.is_gone:
                for fault in OF_THE_ROUTE:
                    failures.seen.pop(fault, None)
            failures.is_gone |= not is_connected

    def _fade(self, now: float) -> None:
        """Forget what counts for nothing any more."""
        for failures in self._failures.values():
            failures.forget_words(now)
            failures.seen = {
                fault: seen
                for fault, seen in failures.seen.items()
                if now < seen.until or seen.faded(now) >= FORGOTTEN_BELOW
            }
        self._forget(
            peer for peer, failures in self._failures.items() if not failures.seen and not failures.told_by
        )

    def _forget(self, peers: Iterable[PeerKey]) -> None:
        for peer in list(peers):
            del self._failures[peer]
