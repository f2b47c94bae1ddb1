"""How peers that look for a group are cut into groups: pure functions over sorted peers, each with its
reason.

Peers with equal views cut them equally, without a word between them. Sizes come first (:mod:`.sizes`),
then who leads and who follows whom (:func:`cut_groups`), then whether a full group may begin without waiting
for its start time (:func:`may_begin_early`).
"""

from __future__ import annotations

import enum
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from typing import NamedTuple

from shoal.averaging.matchmaking.apart import separate, shunned
from shoal.averaging.matchmaking.candidate import Candidate
from shoal.averaging.matchmaking.helping import count_contributors, lack_contributors, slice_with_helpers
from shoal.averaging.matchmaking.sizes import plan_groups, plan_with_helpers, stays_full
from shoal.p2p.identity import PeerID


@dataclass(frozen=True)
class PlannedGroup:
    """A slice of the candidates: its leader first, then the others in order."""

    members: tuple[Candidate, ...]
    is_complete: bool
    """Has at least the minimum size; others only gather behind a leader in the hope that more will come."""
    newcomers_cannot_change_it: bool
    """However many later peers appear, this slice keeps the target size."""

    @property
    def leader(self) -> PeerID:
        return self.members[0].peer_id


@dataclass(frozen=True)
class Cut:
    """All candidates as groups; ``left_over`` are those in no complete group."""

    groups: tuple[PlannedGroup, ...]
    left_over: tuple[Candidate, ...]
    reason: str
    shunned: frozenset[PeerID] = frozenset()
    """Those of the peers that are left over that most of the others have seen fail."""

    def group_of(self, peer_id: PeerID) -> PlannedGroup | None:
        """The group that ``peer_id`` is planned for; None if nobody can lead it."""
        return self._places.get(peer_id)

    @cached_property
    def _places(self) -> dict[PeerID, PlannedGroup]:
        return {member.peer_id: group for group in self.groups for member in group.members}


def cut_groups(
    candidates: Sequence[Candidate],
    target: int | None,
    minimum: int,
) -> Cut:
    """Cut ``candidates`` (sorted, each peer once) into groups, each led by the first of its members that can.

    So a peer that can lead only ever follows one that is earlier in the order: no two peers wait for each
    other. What is left over gathers in one incomplete group, if anybody there can lead.
    """
    out = shunned(candidates)
    if out:
        cut = _cut(tuple(one for one in candidates if one not in out), target, minimum)
        if any(group.is_complete for group in cut.groups):
            reason = f"{cut.reason}; most have seen {', '.join(str(one.peer_id) for one in out)} fail"
            return replace(
                cut,
                left_over=(*cut.left_over, *out),
                reason=reason,
                shunned=frozenset(one.peer_id for one in out),
            )
    return _cut(tuple(candidates), target, minimum)


@lru_cache(maxsize=64)
def _cut(candidates: tuple[Candidate, ...], target: int | None, minimum: int) -> Cut:
    leaders = sum(candidate.can_lead for candidate in candidates)
    contributors = count_contributors(candidates)
    all_contribute = contributors == len(candidates)
    sizes = _sizes_for(candidates, target, minimum)
    waiting = list(candidates)
    if all_contribute:
        slices = [
            _take_slice(waiting, size, later_groups=len(sizes) - index - 1)
            for index, size in enumerate(sizes)
        ]
    else:
        slices = slice_with_helpers(waiting, sizes)
    has_lost = any(candidate.lost for candidate in candidates)
    if has_lost:
        slices = separate(slices, target, minimum)
        planned = {member.peer_id for members in slices for member in members}
        waiting = [candidate for candidate in candidates if candidate.peer_id not in planned]
        sizes = tuple(map(len, slices))
    groups = []
    for index, members in enumerate(slices):
        is_simple = all_contribute and not has_lost
        fixed = is_simple and stays_full(index, len(candidates), target, minimum)
        groups.append(PlannedGroup(members, is_complete=True, newcomers_cannot_change_it=fixed))
    left_over = tuple(waiting)
    if any(candidate.can_lead for candidate in waiting):
        members = _take_slice(waiting, len(waiting), later_groups=0)
        groups.append(PlannedGroup(members, is_complete=False, newcomers_cannot_change_it=False))
    why = "" if leaders == len(candidates) else " (clients never lead)"
    what = "" if all_contribute else f" and {contributors} contribute (auxiliaries only help)"
    reason = f"{len(candidates)} in all, of which {leaders} can lead{why}{what}, "
    if sizes:
        reason += f"make groups of {', '.join(map(str, sizes))}; {len(left_over)} left over"
    else:
        reason += f"make no group of {minimum} or more"
    return Cut(tuple(groups), left_over, reason)


def _sizes_for(candidates: Sequence[Candidate], target: int | None, minimum: int) -> tuple[int, ...]:
    leaders = sum(candidate.can_lead for candidate in candidates)
    contributors = count_contributors(candidates)
    if contributors == len(candidates):
        return plan_groups(len(candidates), target, minimum, leaders)
    helpers = len(candidates) - contributors
    return plan_with_helpers(leaders - helpers, len(candidates) - leaders, helpers, target, minimum)


def _take_slice(waiting: list[Candidate], size: int, *, later_groups: int) -> tuple[Candidate, ...]:
    """Remove the next ``size`` candidates from ``waiting``, leaving a leader for each later group."""
    leader = next(candidate for candidate in waiting if candidate.can_lead)
    spare_leaders = sum(candidate.can_lead for candidate in waiting) - 1 - later_groups
    members = [leader]
    for candidate in waiting:
        if len(members) == size:
            break
        if candidate is leader or (candidate.can_lead and spare_leaders == 0):
            continue
        spare_leaders -= candidate.can_lead
        members.append(candidate)
    taken = {member.peer_id for member in members}
    waiting[:] = [candidate for candidate in waiting if candidate.peer_id not in taken]
    return tuple(members)


def count_left_over(candidates: Sequence[Candidate], target: int | None, minimum: int) -> int:
    """How many of ``candidates`` are in no complete group, however they are cut."""
    return len(candidates) - sum(_sizes_for(candidates, target, minimum))


def takes_too_many_leaders(
    candidates: Sequence[Candidate], members: Collection[PeerID], planned: PlannedGroup
) -> bool:
    """Whether ``members`` hold more peers that can lead than their leader's slice of the plan does.

    Where some peers cannot lead, others may lack a leader then. Where all can, it does not matter who is where.
    """
    if all(candidate.can_lead for candidate in candidates):
        return False
    taken = sum(candidate.can_lead for candidate in candidates if candidate.peer_id in members)
    return taken > sum(member.can_lead for member in planned.members)


class EarlyBegin(enum.Enum):
    """Whether a leader may begin before its start time."""

    NO = "no"
    IF_SETTLED = "if settled"
    """Peers that are not visible yet could change the plan: make sure first that there are none."""
    YES = "yes"


class EarlyBeginDecision(NamedTuple):
    verdict: EarlyBegin
    reason: str


def may_begin_early(
    candidates: Sequence[Candidate],
    members: Collection[PeerID],
    leader: PeerID,
    target: int | None,
    minimum: int,
    everybody: Sequence[Candidate] | None = None,
    cut: Cut | None = None,
) -> EarlyBeginDecision:
    """Whether ``leader`` may begin at once with ``members`` (itself included), given all visible
    ``candidates``.

    ``everybody``: the candidates and those who have full groups elsewhere, which can still become smaller.
    ``cut``: the plan for the candidates, if it is not one of slices.
    Only a full group may, and only if no more peers are left over than by the plan. Several leaders decide
    this at the same time: each fills no more than its own planned slice, so their decisions add up to the
    plan.
    """
    if target is None or len(members) < target:
        return EarlyBeginDecision(EarlyBegin.NO, why_not_full(len(members), target))
    cut = cut_groups(candidates, target, minimum) if cut is None else cut
    group = cut.group_of(leader)
    if group is None or group.leader != leader:
        return EarlyBeginDecision(EarlyBegin.NO, f"the plan has this peer follow another: {cut.reason}")
    if not group.is_complete or lack_contributors(candidates, members, group.members):
        return EarlyBeginDecision(EarlyBegin.NO, f"peers that contribute are still to come: {cut.reason}")
    if len(group.members) < target:
        return EarlyBeginDecision(EarlyBegin.NO, f"a full group would strand others: {cut.reason}")
    if takes_too_many_leaders(candidates, members, group):
        return EarlyBeginDecision(EarlyBegin.NO, f"others need its members as leaders: {cut.reason}")
    for visible in (candidates, everybody or candidates):
        peers = [candidate for candidate in visible if candidate.peer_id not in cut.shunned]
        rest = [candidate for candidate in peers if candidate.peer_id not in members]
        stranded = count_left_over(rest, target, minimum)
        if stranded > count_left_over(peers, target, minimum):
            return EarlyBeginDecision(EarlyBegin.NO, f"beginning would strand {stranded}: {cut.reason}")
    takes_leaders = sum(candidate.can_lead for candidate in candidates if candidate.peer_id in members) > 1
    leaders_may_be_scarce = takes_leaders and not all(candidate.can_lead for candidate in candidates)
    if group.newcomers_cannot_change_it and not leaders_may_be_scarce:
        return EarlyBeginDecision(EarlyBegin.YES, f"full, and newcomers change nothing: {cut.reason}")
    return EarlyBeginDecision(EarlyBegin.IF_SETTLED, f"full: {cut.reason}")


def why_not_full(members: int, target: int | None) -> str:
    """What a group of so many lacks to be full, in words."""
    if target is None:
        return f"members: {members}, and a group without target_group_size begins at its start time"
    return f"members: {members} of {target}"
