"""Groups of peers of which some only help: auxiliaries lead and average, but have nothing of their own to average.

Pure. A group of helpers alone would average nothing, so each one gets peers that contribute, two of them if there
are enough; what helpers are left, wait.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence

from shoal.averaging.matchmaking.candidate import Candidate
from shoal.p2p.identity import PeerID


def count_contributors(candidates: Iterable[Candidate]) -> int:
    """How many have something to average."""
    return sum(candidate.contributes for candidate in candidates)


def slice_with_helpers(waiting: list[Candidate], sizes: Sequence[int]) -> list[tuple[Candidate, ...]]:
    """Remove the members of groups of these ``sizes``, as :func:`.sizes.plan_with_helpers` plans them, from
    ``waiting``; leaders first.

    The earlier a peer is in the order, the earlier is its group, as far as every group keeps a leader and two
    contributors. Contributors are only left over if there are too few groups for them, then clients first.
    """
    full = [peer for peer in waiting if peer.contributes and peer.can_lead]
    clients = [peer for peer in waiting if not peer.can_lead]
    helpers = [peer for peer in waiting if not peer.contributes]
    led_by_helpers = max(0, len(sizes) - len(full))
    placed = min(len(full) + len(clients), sum(sizes) - led_by_helpers)
    clients = clients[: max(0, placed - len(full))]
    contributors = sorted((*full[:placed], *clients))
    counts = _contributors_of_each(sizes, led_by_helpers, placed)
    slices = []
    for index, (size, count) in enumerate(zip(sizes, counts, strict=True)):
        led_by_full = len(sizes) - max(index, led_by_helpers)
        spare = sum(peer.can_lead for peer in contributors) - led_by_full
        members = _take(contributors, count, spare, needs_leader=index >= led_by_helpers)
        members += helpers[: size - count]
        del helpers[: size - count]
        slices.append(_leader_first(members))
    taken = {member.peer_id for members in slices for member in members}
    waiting[:] = [peer for peer in waiting if peer.peer_id not in taken]
    return slices


def _contributors_of_each(sizes: Sequence[int], led_by_helpers: int, placed: int) -> list[int]:
    """How many contributors each group has; the first ``led_by_helpers`` ones have a helper among their members."""
    rooms = [size - (index < led_by_helpers) for index, size in enumerate(sizes)]
    counts: list[int] = []
    rest = placed
    for index, room in enumerate(rooms):
        later = rooms[index + 1 :]
        for_later = max(len(later), min(sum(min(2, other) for other in later), rest - min(2, room)))
        counts.append(min(room, rest - for_later))
        rest -= counts[-1]
    return counts


def _take(contributors: list[Candidate], count: int, spare: int, *, needs_leader: bool) -> list[Candidate]:
    """Remove the next ``count`` contributors; of those that can lead one, if it is needed, and ``spare`` more."""
    members: list[Candidate] = []
    if needs_leader:
        members.append(next(peer for peer in contributors if peer.can_lead))
    for peer in contributors:
        if len(members) == count:
            break
        if peer in members or (peer.can_lead and spare <= 0):
            continue
        spare -= peer.can_lead
        members.append(peer)
    contributors[:] = [peer for peer in contributors if peer not in members]
    return members


def _leader_first(members: Iterable[Candidate]) -> tuple[Candidate, ...]:
    ordered = sorted(members)
    leader = next(member for member in ordered if member.can_lead)
    return (leader, *(member for member in ordered if member is not leader))


def lack_contributors(
    candidates: Iterable[Candidate], members: Collection[PeerID], planned: Sequence[Candidate]
) -> bool:
    """Whether ``members`` hold fewer contributors than their leader's slice of the plan: helpers came first."""
    present = count_contributors(candidate for candidate in candidates if candidate.peer_id in members)
    return present < count_contributors(planned)


def makes_room(
    asker: Candidate, followers: Iterable[Candidate], planned: Sequence[Candidate], members: int, room: int
) -> bool:
    """Whether a group that is full takes in ``asker`` all the same, because followers planned elsewhere will leave
    for it: helpers for a contributor, and anybody where a pair is kept apart, for whom places are few.
    """
    places = {member.peer_id for member in planned}
    if not asker.contributes or asker.peer_id not in places:
        return False
    outside = [peer for peer in followers if peer.peer_id not in places]
    is_apart = any(peer.lost for peer in (asker, *planned, *outside))
    can_leave = sum(is_apart or not peer.contributes for peer in outside)
    return members - can_leave <= room


def why_no_average(candidates: Sequence[Candidate]) -> str | None:
    """Why these peers can make no group however many of them there are, in words; None: they can, or one is alone."""
    if len(candidates) < 2:
        return None
    count = len(candidates)
    if not any(candidate.can_lead for candidate in candidates):
        return (
            f"all {count} peers are clients, which others cannot dial, so that none can lead a group: one full or "
            "auxiliary peer is needed (one with host_maddrs that others can dial, and without client_mode=True)"
        )
    if not any(candidate.contributes for candidate in candidates):
        return (
            f"all {count} peers are auxiliary and have nothing to average: a peer without auxiliary=True is "
            "needed"
        )
    return None
