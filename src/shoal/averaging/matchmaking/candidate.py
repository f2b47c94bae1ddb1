"""A peer as plans of groups see it. Pure."""

from __future__ import annotations

from typing import NamedTuple

from shoal.averaging.group import MemberInfo
from shoal.p2p.identity import PeerID


def in_order(candidate: Candidate) -> tuple[float, bytes]:
    """The key by which candidates are sorted; their own order, and faster."""
    return candidate.start_time, candidate.peer_id.to_bytes()


class Candidate(NamedTuple):
    """A peer that looks for a group. Candidates are ordered by start time, then peer id."""

    start_time: float
    peer_id: PeerID
    can_lead: bool
    grid_round: int = 0
    swarm_round: int = 0
    """In which round of the automatic grid it is."""
    contributes: bool = True
    """Has something to average; False for auxiliaries, which only help."""
    lost: tuple[bytes, ...] = ()
    """Ids of peers that it could not reach lately."""


def candidate_of(info: MemberInfo) -> Candidate:
    """What a peer that asks to join says of itself."""
    return Candidate(
        info.start_time,
        PeerID.from_bytes(info.peer_id),
        info.mode.can_lead,
        info.grid_round,
        info.grid.round,
        info.mode.contributes,
        info.lost,
    )
