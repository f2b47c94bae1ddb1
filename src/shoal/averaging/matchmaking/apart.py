"""Pairs that could not reach each other are kept apart: a route may be bad for two peers alone. Pure.

Each peer says whom it could not reach lately. Its word counts for groups with itself only, so that a liar can isolate
nobody else. If no group at all were left, everybody stays together: such a failure is often over by the next attempt.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

from shoal.averaging.group import MAX_LOST
from shoal.averaging.matchmaking.candidate import Candidate
from shoal.p2p.identity import PeerID

Group = list[Candidate]

APART_FOR = 60.0
"""Seconds for which peers are kept apart of which one could not reach the other."""


class LostPeers:
    """Whom one peer could not reach lately. A peer that was gone and is connected again is lost no more.

    :param is_connected: whether a connection to a peer stands now
    :param incarnation: the number of the process that was last seen as a peer
    """

    def __init__(
        self, is_connected: Callable[[PeerID], bool], incarnation: Callable[[PeerID], int | None]
    ) -> None:
        self._is_connected = is_connected
        self._incarnation = incarnation
        self._lost_as: dict[PeerID, int | None] = {}
        self._until: dict[PeerID, float] = {}
        """The latest last."""
        self._gone: set[PeerID] = set()
        """Those that were not connected at some time since."""

    def __contains__(self, peer: object) -> bool:
        return peer in self._until

    def add(self, peers: Iterable[PeerID], now: float) -> None:
        """These could not be reached. A connection that still stands may be a dead one."""
        for peer in peers:
            self._until.pop(peer, None)
            self._until[peer] = now + APART_FOR
            self._lost_as[peer] = self._incarnation(peer)
            self._gone.discard(peer)
            if not self._is_connected(peer):
                self._gone.add(peer)
        self._forget(list(self._until)[:-MAX_LOST])

    def ids(self, now: float) -> tuple[bytes, ...]:
        """Those that this peer says it could not reach, as bytes."""
        connected = {peer for peer in self._until if self._is_connected(peer)}
        self._forget(peer for peer, until in list(self._until.items()) if now >= until)
        self._forget(connected & self._gone)
        # Another process than the one that was lost: the connection to that one may never have been seen to end.
        self._forget([peer for peer in self._until if self._incarnation(peer) != self._lost_as[peer]])
        self._gone |= self._until.keys() - connected
        return tuple(peer.to_bytes() for peer in self._until)

    def _forget(self, peers: Iterable[PeerID]) -> None:
        for peer in peers:
            self._until.pop(peer, None)
            self._lost_as.pop(peer, None)
            self._gone.discard(peer)


def are_apart(one: Candidate, other: Candidate) -> bool:
    """Whether one of the two could not reach the other, and has to: clients never connect to each other."""
    if not (one.can_lead or other.can_lead):
        return False
    return one.peer_id.to_bytes() in other.lost or other.peer_id.to_bytes() in one.lost


def is_apart(peer: Candidate, members: Iterable[Candidate]) -> bool:
    """Whether ``peer`` is to be kept apart from one of these."""
    return any(are_apart(peer, member) for member in members if member is not peer)


def separate(
    slices: Sequence[tuple[Candidate, ...]], target: int | None, minimum: int
) -> list[tuple[Candidate, ...]]:
    """The planned groups, changed so that no pair is together that is to be kept apart; leaders first.

    The later one of a pair changes places with a peer of another group, else it joins one that has room, else it gets
    a group with members of others that are larger than they must be, else it is left over.
    """
    groups = [list(members) for members in slices]
    out: list[Candidate] = []
    for group in groups:
        for peer in sorted(group, reverse=True):
            if is_apart(peer, group) and not _exchange(peer, group, groups):
                group.remove(peer)
                out.append(peer)
    for peer in out:
        _find_place(peer, groups, target, minimum)
    whole = [sorted(group) for group in groups if _is_whole(group, minimum)]
    return [_leader_first(group) for group in whole] or list(slices)


def _exchange(peer: Candidate, group: Group, groups: Sequence[Group]) -> bool:
    for other in groups:
        for partner in sorted(other, reverse=True):
            if other is group or _kind(partner) != _kind(peer):
                continue
            here = [member for member in group if member is not peer]
            there = [member for member in other if member is not partner]
            if not is_apart(partner, here) and not is_apart(peer, there):
                group[group.index(peer)], other[other.index(partner)] = partner, peer
                return True
    return False


def _find_place(peer: Candidate, groups: list[Group], target: int | None, minimum: int) -> None:
    for group in groups:
        if not is_apart(peer, group) and (target is None or len(group) < target):
            group.append(peer)
            return
    made: Group = [peer]
    homes: list[Group] = []
    for donor in sorted(groups, key=len, reverse=True):
        for member in sorted(donor, reverse=True):
            if _is_whole(made, minimum) or len(made) == target:
                break
            rest = [one for one in donor if one is not member]
            if _is_whole(rest, minimum) and _is_of_use(member, made) and not is_apart(member, made):
                donor.remove(member)
                made.append(member)
                homes.append(donor)
    if _is_whole(made, minimum):
        groups.append(made)
        return
    for member, home in zip(made[1:], homes, strict=True):
        home.append(member)


def _is_whole(group: Sequence[Candidate], minimum: int) -> bool:
    can_average = any(one.can_lead for one in group) and any(one.contributes for one in group)
    return can_average and len(group) >= minimum


def _is_of_use(peer: Candidate, group: Sequence[Candidate]) -> bool:
    """Whether ``peer`` makes a group whole, or larger if all that lacks is its size."""
    if not any(one.can_lead for one in group):
        return peer.can_lead
    return peer.contributes or any(one.contributes for one in group)


def _kind(peer: Candidate) -> tuple[bool, bool]:
    return peer.can_lead, peer.contributes


def _leader_first(ordered: Sequence[Candidate]) -> tuple[Candidate, ...]:
    leader = next(member for member in ordered if member.can_lead)
    return (leader, *(member for member in ordered if member is not leader))
