"""Pairs of which one saw the other fail are kept apart: a route may be bad for two peers alone. Pure.

Each peer says whom it saw fail lately (:mod:`.memory`). Its word counts for groups with itself only, so that a liar can
isolate nobody else. Only a peer that most of the others name is shunned: kept apart from all, newcomers included, which
have seen nothing yet. If no group at all were left, everybody stays together: such a failure is often over by the next
attempt.

Rather than leave a peer alone, a plan has two followers of one group that are apart. A round can spare their route:
only a span's owner talks with its senders, so neither of the two owns anything (:func:`owns_nothing`).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence

from shoal.averaging.blame import Pair, worst_of
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
    a group with others that have none either, and with members of groups that are larger than they must be. Else it
    stays in a group whose round can spare the route, its own one first. Where there is none it is left over.
    """
    groups = [list(members) for members in slices]
    homes: dict[Candidate, Group] = {}
    for group in groups:
        # The later one goes: the first one leads, and others are on their way to it.
        for peer in sorted(group, reverse=True):
            if is_apart(peer, group) and not _exchange(peer, group, groups):
                group.remove(peer)
                homes[peer] = group
    out = list(homes)
    for peer in homes:
        if peer in out:
            _find_place(peer, groups, out, target, minimum)
    # Last of all: whatever changes a group may change its leader.
    for peer in out:
        _take_in(peer, (homes[peer], *groups), target)
    whole = [group for group in groups if _is_whole(group, minimum)]
    for group in groups:
        if group not in whole:
            for peer in sorted(group):
                _take_in(peer, whole, target)
    return [_leader_first(sorted(group)) for group in whole] or list(slices)


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


def _find_place(
    peer: Candidate, groups: list[Group], out: list[Candidate], target: int | None, minimum: int
) -> None:
    """Find a place for ``peer``, which is one of those that are ``out``, where nobody is apart from it."""
    for group in groups:
        if not is_apart(peer, group) and (target is None or len(group) < target):
            group.append(peer)
            out.remove(peer)
            return
    made: Group = [peer]
    homes: list[Group] = []
    for donor in (out, *sorted(groups, key=len, reverse=True)):
        for member in sorted(donor, reverse=True):
            if _is_whole(made, minimum) or len(made) == target:
                break
            rest = [one for one in donor if one is not member]
            is_spare = donor is out or _is_whole(rest, minimum)
            if is_spare and member is not peer and _is_of_use(member, made) and not is_apart(member, made):
                donor.remove(member)
                made.append(member)
                homes.append(donor)
    if _is_whole(made, minimum):
        groups.append(made)
        out.remove(peer)
        return
    for member, home in zip(made[1:], homes, strict=True):
        home.append(member)


def _take_in(peer: Candidate, groups: Iterable[Group], target: int | None) -> None:
    """Put ``peer`` into the first of these groups that has room, and whose round can spare the routes it lacks."""
    for group in groups:
        if (target is None or len(group) < target) and _is_bearable([*group, peer]):
            group.append(peer)
            return


def _is_bearable(group: Sequence[Candidate]) -> bool:
    """Whether a round of these can spare every route that they lack: none is the leader's, and nobody lacks several."""
    if not any(one.can_lead for one in group):
        return False
    leader, *followers = members = _leader_first(sorted(group))
    return not is_apart(leader, followers) and worst_of(_pairs_to_spare(members)) is None


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


# ---- pairs in one group; its leader is the first member


def owns_nothing(members: Sequence[Candidate]) -> set[int]:
    """Members that are not to own anything, so that no two that are apart have to exchange parts.

    A member of several pairs is at fault itself, and it alone owns nothing: one peer's word must not leave all work to
    few. The leader may always own.
    """
    at_fault, pairs = _judge(members)
    idle = set(at_fault)
    for one, other in map(sorted, pairs):
        if members[other].contributes:
            idle.add(one)
        if members[one].contributes:
            idle.add(other)
    return idle


def spared_routes(members: Sequence[Candidate]) -> list[Pair]:
    """Pairs that exchange nothing in the round, so that it shows nothing of their route."""
    return _judge(members)[1]


def _judge(members: Sequence[Candidate]) -> tuple[list[int], list[Pair]]:
    """Members that are at fault, and the pairs of the others."""
    pairs, at_fault = _pairs_to_spare(members), []
    while (worst := worst_of(pairs)) is not None:
        at_fault.append(worst)
        pairs = [pair for pair in pairs if worst not in pair]
    return at_fault, pairs


def _pairs_to_spare(members: Sequence[Candidate]) -> list[Pair]:
    """Pairs that are apart, and would exchange parts. Those of the leader do not count: a member has just joined it, so
    that there is a route, whatever was seen before.
    """
    places = {member.peer_id.to_bytes(): index for index, member in enumerate(members)}
    pairs = {
        frozenset((index, places[name]))
        for index, member in enumerate(members)
        for name in member.lost
        if index and places.get(name, 0) not in (0, index)
    }
    return [pair for pair in pairs if _exchange_parts(*(members[index] for index in pair))]


def _exchange_parts(one: Candidate, other: Candidate) -> bool:
    """Whether one of the two may own what the other one contributes."""
    return (one.can_lead or other.can_lead) and (one.contributes or other.contributes)
