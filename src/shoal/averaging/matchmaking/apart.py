"""Pairs of which one saw the other fail are kept apart: a route may be bad for two peers alone. Pure.

Each peer says whom it saw fail lately (:mod:`.memory`). Its word counts for groups with itself only, so that a liar can
isolate nobody else. Only a peer that most of the others name is shunned: kept apart from all, newcomers included, which
have seen nothing yet. If no group at all were left, everybody stays together: such a failure is often over by the next
attempt.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence

from shoal.averaging.matchmaking.candidate import Candidate
from shoal.averaging.matchmaking.memory import SEVERAL

Group = list[Candidate]


def are_apart(one: Candidate, other: Candidate) -> bool:
    """Whether one of the two could not reach the other, and has to: clients never connect to each other."""
    if not (one.can_lead or other.can_lead):
        return False
    return one.peer_id.to_bytes() in other.lost or other.peer_id.to_bytes() in one.lost


def is_apart(peer: Candidate, members: Iterable[Candidate]) -> bool:
    """Whether ``peer`` is to be kept apart from one of these."""
    return any(are_apart(peer, member) for member in members if member is not peer)


def shunned(candidates: Sequence[Candidate]) -> list[Candidate]:
    """Candidates that several of the others, and more than half of them, name."""
    named = Counter(peer for candidate in candidates for peer in set(candidate.lost))
    enough = max(SEVERAL, len(candidates) // 2 + len(candidates) % 2)
    return [candidate for candidate in candidates if named[candidate.peer_id.to_bytes()] >= enough]


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
        # The later one goes: the first one leads, and others are on their way to it.
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
