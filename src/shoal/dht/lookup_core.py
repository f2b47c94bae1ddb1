"""One iterative search for the nodes nearest to an id (Kademlia, section 2.3), as a state machine. Pure.

:meth:`LookupCore.handle` takes what happened, and returns the nodes to ask now. The search is finished when the
``width`` nearest nodes that have not failed have all answered, or when there is nobody left to ask. A node that has
not answered for ``stall_timeout`` seconds is *stalled*: another one is asked beside it, and its answer still counts.

It terminates on any sequence of answers: each peer is asked at most once, and at most ``max_asked`` in all.
Its memory is bounded by ``max_asked + max_nodes_per_answer`` candidates: of more, the farthest that were not
asked are forgotten.
"""

from __future__ import annotations

import enum
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TypeAlias

from shoal.dht.ids import node_id
from shoal.p2p.identity import PeerID
from shoal.sansio.core import NEVER, TimePassed
from shoal.sansio.machine import Machine

FEWEST_NAMES = 10
"""A search for one node asks for the names of so many, since the nearest may be dead."""


@dataclass(frozen=True, slots=True)
class LookupBegan:
    """The search is to begin."""


@dataclass(frozen=True, slots=True)
class NodeAnswered:
    """A peer that was asked answered with the nodes it knows to be nearest."""

    peer: PeerID
    nodes: Sequence[PeerID]


@dataclass(frozen=True, slots=True)
class NodeFailed:
    """A peer that was asked could not be reached, or its answer was refused."""

    peer: PeerID


@dataclass(frozen=True, slots=True)
class LookupStopped:
    """Enough was found."""


Event: TypeAlias = LookupBegan | NodeAnswered | NodeFailed | LookupStopped | TimePassed


@dataclass(frozen=True, slots=True)
class AskNode:
    """Ask a peer for the nodes that it knows to be nearest; answered by NodeAnswered or NodeFailed."""

    peer: PeerID


class LookupState(enum.Enum):
    NEW = "new"
    SEARCHING = "searching"
    FINISHED = "finished"
    """Over: the nearest nodes have answered, or nobody is left to ask."""
    STOPPED = "stopped"
    """Over: enough was found before that."""


TRANSITIONS: dict[LookupState, set[LookupState]] = {
    LookupState.NEW: {LookupState.SEARCHING},
    LookupState.SEARCHING: {LookupState.FINISHED, LookupState.STOPPED},
    LookupState.FINISHED: set(),
    LookupState.STOPPED: set(),
}

_LATER = frozenset({NodeAnswered, NodeFailed, LookupStopped, TimePassed})

HEARD: dict[LookupState, frozenset[type]] = {
    LookupState.NEW: frozenset({LookupBegan}),
    LookupState.SEARCHING: _LATER,
    LookupState.FINISHED: _LATER,
    LookupState.STOPPED: _LATER,
}
"""The events that may come in each state; when the search is over, they change nothing. Any other one is illegal."""


class _Progress(enum.Enum):
    KNOWN = enum.auto()
    ASKED = enum.auto()
    STALLED = enum.auto()
    ANSWERED = enum.auto()
    FAILED = enum.auto()


@dataclass(slots=True)
class _Candidate:
    peer: PeerID
    distance: int
    state: _Progress


class LookupCore:
    """See the module. ``answered`` are peers that need not be asked, such as the searching node itself."""

    def __init__(
        self,
        target: int,
        *,
        width: int,
        parallel: int,
        stall_timeout: float = NEVER,
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
        self._has_failed = False
        self._asked = 0
        self._stall_timeout = stall_timeout
        self._machine = Machine(LookupState.NEW, TRANSITIONS, HEARD)
        self._stalls_at: dict[PeerID, float] = {}
        """When each peer that was asked, and has not answered, stalls; in this order."""
        for peer in answered:
            self._add(peer, _Progress.ANSWERED)
        for peer in seeds:
            self._add(peer, _Progress.KNOWN)
        self._sort()

    @property
    def state(self) -> LookupState:
        """What the search is doing."""
        return self._machine.state

    @property
    def finished(self) -> bool:
        """Whether the search has come to its end; one that was stopped has not."""
        return self._machine.state is LookupState.FINISHED

    @property
    def is_over(self) -> bool:
        """Whether nothing more is asked."""
        state = self._machine.state
        return (
            state is LookupState.FINISHED or state is LookupState.STOPPED
        )  # asked several times for each answer

    @property
    def names_wanted(self) -> int:
        """How many of the nearest nodes an answer shall name, those that are known already included.

        Few, as long as all whom this search asks are there. Where some have failed, those that others name may have
        died with them, and it takes more names to find the living.
        """
        if self._has_failed:
            return self.max_nodes_per_answer
        return min(max(FEWEST_NAMES, 2 * self.width), self.max_nodes_per_answer)

    @property
    def deadline(self) -> float:
        """When the next peer stalls."""
        return NEVER if self.is_over else next(iter(self._stalls_at.values()), NEVER)

    def handle(self, event: Event, now: float) -> list[AskNode]:
        """Take in what happened; returns whom to ask now. An answer of a peer that was not asked changes nothing.

        :raises IllegalTransition: the search has not begun yet, or begins twice
        """
        self._machine.hear(event, now)
        if self.is_over:
            return []
        match event:
            case LookupBegan():
                self._machine.move(LookupState.SEARCHING)
            case LookupStopped():
                self._machine.move(LookupState.STOPPED)
                return []
            case TimePassed():
                self._stall(now)
            case NodeAnswered(peer, nodes):
                if not self._settle(peer, _Progress.ANSWERED):
                    return []
                for node in nodes[: self.max_nodes_per_answer]:
                    self._add(node, _Progress.KNOWN)
                self._sort()
            case NodeFailed(peer):
                self._has_failed = True
                if not self._settle(peer, _Progress.FAILED):
                    return []
        return self._ask_next(now)

    def nearest_answered(self) -> list[PeerID]:
        """The nearest peers that answered, nearest first, at most ``width``."""
        found = [candidate.peer for candidate in self._sorted if candidate.state is _Progress.ANSWERED]
        return found[: self.width]

    def known(self, count: int) -> list[PeerID]:
        """The nearest peers that have been heard of, whatever became of them."""
        return [candidate.peer for candidate in self._sorted[:count]]

    def _settle(self, peer: PeerID, progress: _Progress) -> bool:
        """A peer that was asked has answered or failed; False if it was not asked."""
        candidate = self._candidates.get(peer)
        if candidate is None or candidate.state not in (_Progress.ASKED, _Progress.STALLED):
            return False
        if candidate.state is _Progress.ASKED:
            self._in_flight -= 1
            del self._stalls_at[peer]
        candidate.state = progress
        return True

    def _stall(self, now: float) -> None:
        for peer in [peer for peer, at in self._stalls_at.items() if at <= now]:
            del self._stalls_at[peer]
            self._candidates[peer].state = _Progress.STALLED
            self._in_flight -= 1

    def _add(self, peer: PeerID, state: _Progress) -> None:
        if peer not in self._candidates:
            candidate = _Candidate(peer, node_id(peer) ^ self.target, state)
            self._candidates[peer] = candidate
            self._sorted.append(candidate)

    def _sort(self) -> None:
        self._sorted.sort(key=lambda candidate: candidate.distance)
        excess = len(self._sorted) - self._max_candidates
        if excess <= 0:
            return
        farthest_unasked = [c for c in reversed(self._sorted) if c.state is _Progress.KNOWN][:excess]
        for candidate in farthest_unasked:
            del self._candidates[candidate.peer]
        self._sorted = [c for c in self._sorted if c.peer in self._candidates]

    def _ask_next(self, now: float) -> list[AskNode]:
        """The nearest known peers among the ``width`` nearest that may still answer, as many as ``parallel``
        allows.
        """
        effects: list[AskNode] = []
        considered = pending = 0
        for candidate in self._sorted:
            if considered == self.width:
                break
            if candidate.state in (_Progress.FAILED, _Progress.STALLED):
                continue
            considered += 1
            if candidate.state is _Progress.KNOWN and self._asked < self.max_asked:
                pending += 1
                if self._in_flight < self.parallel:
                    candidate.state = _Progress.ASKED
                    self._in_flight += 1
                    self._asked += 1
                    self._stalls_at[candidate.peer] = now + self._stall_timeout
                    effects.append(AskNode(candidate.peer))
            elif candidate.state is _Progress.ASKED:
                pending += 1
        if not pending and not self._only_stalled_left(considered):
            self._machine.move(LookupState.FINISHED)
        return effects

    def _only_stalled_left(self, considered: int) -> bool:
        """Fewer nodes than wanted, and some may answer yet: those are worth waiting for."""
        return considered < self.width and any(c.state is _Progress.STALLED for c in self._sorted)
