"""One iterative search for the nodes nearest to an id (Kademlia, section 2.3), as a state machine. Pure.

The driver feeds it what happened (:class:`Answered`, :class:`Stalled`, :class:`Failed`) and gets back whom to
ask now; the search is over when the ``width`` nearest nodes that have not failed have all answered, or when
there is nobody left to ask.

It terminates on any sequence of answers: each peer is asked at most once, and at most ``max_asked`` in all.
Its memory is bounded by ``max_asked + max_nodes_per_answer`` candidates: of more, the farthest that were not
asked are forgotten.
"""

from __future__ import annotations

import enum
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from shoal.dht.ids import node_id
from shoal.p2p.identity import PeerID


@dataclass(frozen=True, slots=True)
class Answered:
    """A peer that was asked answered with the nodes it knows to be nearest."""

    peer: PeerID
    nodes: Sequence[PeerID]


@dataclass(frozen=True, slots=True)
class Stalled:
    """A peer that was asked has not answered for suspiciously long; it still may."""

    peer: PeerID


@dataclass(frozen=True, slots=True)
class Failed:
    """A peer that was asked could not be reached, or its answer was refused."""

    peer: PeerID


Event = Answered | Stalled | Failed


class _State(enum.Enum):
    KNOWN = enum.auto()
    ASKED = enum.auto()
    STALLED = enum.auto()
    ANSWERED = enum.auto()
    FAILED = enum.auto()


@dataclass(slots=True)
class _Candidate:
    peer: PeerID
    distance: int
    state: _State


class Lookup:
    """See the module. ``answered`` are peers that need not be asked, such as the searching node itself."""

    def __init__(
        self,
        target: int,
        *,
        width: int,
        parallel: int,
        seeds: Iterable[PeerID],
        answered: Iterable[PeerID] = (),
        max_asked: int = 100,
        max_nodes_per_answer: int = 20,
    ) -> None:
        self.target = target
        self.width = width
        self.parallel = parallel
        self.max_asked = max_asked
        self.max_nodes_per_answer = max_nodes_per_answer
        self._max_candidates = max_asked + max_nodes_per_answer
        self._candidates: dict[PeerID, _Candidate] = {}
        self._sorted: list[_Candidate] = []
        self._in_flight = 0
        self._asked = 0
        self._finished = False
        for peer in answered:
            self._add(peer, _State.ANSWERED)
        for peer in seeds:
            self._add(peer, _State.KNOWN)
        self._sort()

    @property
    def finished(self) -> bool:
        """Whether the search is over."""
        return self._finished

    def start(self) -> list[PeerID]:
        """Whom to ask first."""
        return self._next_to_ask()

    def handle(self, event: Event) -> list[PeerID]:
        """Take in what happened; returns whom to ask now. Events about peers that were not asked change
        nothing.
        """
        candidate = self._candidates.get(event.peer)
        if candidate is None or candidate.state not in (_State.ASKED, _State.STALLED):
            return []
        if candidate.state is _State.ASKED:
            self._in_flight -= 1
        match event:
            case Answered(_, nodes):
                candidate.state = _State.ANSWERED
                for peer in nodes[: self.max_nodes_per_answer]:
                    self._add(peer, _State.KNOWN)
                self._sort()
            case Stalled():
                candidate.state = _State.STALLED
            case Failed():
                candidate.state = _State.FAILED
        return self._next_to_ask()

    def nearest_answered(self) -> list[PeerID]:
        """The nearest peers that answered, nearest first, at most ``width``."""
        found = [candidate.peer for candidate in self._sorted if candidate.state is _State.ANSWERED]
        return found[: self.width]

    def known(self, count: int) -> list[PeerID]:
        """The nearest peers that have been heard of, whatever became of them."""
        return [candidate.peer for candidate in self._sorted[:count]]

    def _add(self, peer: PeerID, state: _State) -> None:
        if peer not in self._candidates:
            candidate = _Candidate(peer, node_id(peer) ^ self.target, state)
            self._candidates[peer] = candidate
            self._sorted.append(candidate)

    def _sort(self) -> None:
        self._sorted.sort(key=lambda candidate: candidate.distance)
        excess = len(self._sorted) - self._max_candidates
        if excess <= 0:
            return
        farthest_unasked = [c for c in reversed(self._sorted) if c.state is _State.KNOWN][:excess]
        for candidate in farthest_unasked:
            del self._candidates[candidate.peer]
        self._sorted = [c for c in self._sorted if c.peer in self._candidates]

    def _next_to_ask(self) -> list[PeerID]:
        """The nearest known peers among the ``width`` nearest that may still answer, as many as ``parallel``
        allows.
        """
        to_ask: list[PeerID] = []
        considered = pending = 0
        for candidate in self._sorted:
            if considered == self.width:
                break
            if candidate.state in (_State.FAILED, _State.STALLED):
                continue
            considered += 1
            if candidate.state is _State.KNOWN and self._asked < self.max_asked:
                pending += 1
                if self._in_flight < self.parallel:
                    candidate.state = _State.ASKED
                    self._in_flight += 1
                    self._asked += 1
                    to_ask.append(candidate.peer)
            elif candidate.state is _State.ASKED:
                pending += 1
        self._finished = not pending and not self._only_stalled_left(considered)
        return to_ask

    def _only_stalled_left(self, considered: int) -> bool:
        """Fewer nodes than wanted, and some may answer yet: those are worth waiting for."""
        return considered < self.width and any(c.state is _State.STALLED for c in self._sorted)
