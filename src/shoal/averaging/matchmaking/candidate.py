"""A peer as plans of groups see it. Pure."""

from __future__ import annotations

from typing import NamedTuple

from shoal.averaging.group import MemberInfo
from shoal.averaging.lineage import NO_LINEAGE, Lineage
from shoal.p2p.identity import PeerID


class Candidate(NamedTuple):
    """A peer that looks for a group. Candidates are ordered by start time, then peer id."""

    start_time: float
    peer_id: PeerID
    can_lead: bool
    grid_round: int = 0
    lineage: Lineage = NO_LINEAGE
    contributes: bool = True
    """Has something to average; False for auxiliaries, which only help."""
    lost: tuple[bytes, ...] = ()
    """Ids of peers that it could not reach lately."""
    swarm_round: int = 0
    """In which round of a large swarm's grid it is; 0: in none."""


def in_order(candidate: Candidate) -> tuple[float, bytes]:
    """What candidates are ordered by: as they compare, but quickly."""
    return candidate.start_time, candidate.peer_id.to_bytes()


def candidate_of(info: MemberInfo) -> Candidate:
    """What a peer that asks to join says of itself."""
    return Candidate(
        info.start_time,
        PeerID.from_bytes(info.peer_id),
        info.mode.can_lead,
        info.grid_round,
        info.lineage,
        info.mode.contributes,
        info.lost,
        info.grid.round,
    )
