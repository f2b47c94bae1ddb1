"""Which group of the grid a peer is in next, where no group bits are given and the swarm is large. Pure.

Theory of operation. In each round a swarm of N peers makes Q groups, each under a key of its own. Group ``g`` of a
round has the ranks from ``g * size`` on; each of its members is dealt one of them, and goes to group ``rank mod Q``
next. Since ranks that follow each other go to groups that do, every group gets one member from each of as many groups
as it has members: that is the generalised de Bruijn graph of Imase and Itoh (1981). After d rounds each of N = size^d
peers has met all others, directly or through others, along exactly one path, and holds the exact average. Other
numbers of peers come nearer to it by almost ``size`` squared in each further round.

Nobody assigns these places. All members compute them from the group, which is equal at all of them: its key says which
of the Q groups it was, the leader how many peers there were, and each member what it knows of the grid
(:class:`~shoal.averaging.grid.Grid`). Peers that are new look under the key without a number, and so do those that are
alone.

**When.** A grid begins when more than :data:`SPREAD_ABOVE` peers look for a group at the same time under the key
without a number (:mod:`.spreading`). Fewer stay there, and their lineages keep apart those that have mixed
(:mod:`.mixing`). A grid that has come below :data:`GATHER_BELOW` is given up.

**How many groups.** The number of peers is estimated from group to group, as the tensors are averaged. Where it calls
for another layout, the group that finds this plans one for a round that is so far ahead that all have heard of it:
in d rounds every group has a member that met it. So all change in the same round.
"""

from __future__ import annotations

import hashlib
import math
import statistics
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import msgspec

from shoal.averaging.grid import NO_GRID, ONE_GROUP, UNKNOWN_ROUND, Grid, Layout
from shoal.averaging.group import GroupInfo, group_key, seat_key, seat_of_key
from shoal.averaging.matchmaking.missed import Missed

LEARN_PEERS = 96
"""A group's own number of peers counts in its estimate of all like its members among so many others, or among all
others if they are fewer: the number of a small group varies much by chance."""
NO_CHANCE = 1 / 8
"""That it has more or fewer peers than it should have, by more than this part and more than one, is no chance."""
LEARN_GROWTH = 32
"""If it has so many more, its own number counts like its members among so many others. If it lacks so many, it counts
half: how many have come is the leader's word, and who is there has signed."""
MAX_CHANGE = 0.5
"""Any one word changes the estimate by this part of it at most: a member, or the leader, may lie."""
SPREAD_ABOVE = 48
"""More peers than this under one key make a grid. That many mix as well there where they run free and a few are slow
(``tests/averaging/matchmaking/test_grid_swarms.py``); fewer have not been shown to."""
GATHER_BELOW = 32
"""Fewer peers than this give their grid up. Less than what makes one, so that a number of peers that varies a little
does not send them to and fro."""
LEFT_OVER_PART = 0.25
"""By this, peers that were left over lower their estimate: there may be fewer than they think. A few of them are put
right by the others of their next group."""
GROW_ABOVE = 1.02
"""A layout gives way to a larger one when there are this many times as many peers as its groups may hold."""
SHRINK_BELOW = 0.9
"""... and to a smaller one that has this part of its groups or fewer."""
PLAUSIBLE = 1.5
"""A layout that another peer has planned counts if it fits the swarm within this factor."""
EXTRA_GROUPS = 8
"""A layout may have a part of 1 / this more groups than are needed, if it mixes exactly then: 900 peers mix in 2 rounds
as 30 groups of 30."""
MAX_STEPS = 16


def choose_layout(peers: int, target: int, minimum: int = 2) -> Layout:
    """How to divide so many peers into groups of ``target`` members at most, and ``minimum`` at least: exact grids
    first, then few groups.
    """
    fewest = min(-(-peers // target), peers // minimum)
    if fewest <= 1:
        return ONE_GROUP
    exact: list[tuple[int, int]] = []
    for groups in range(fewest, fewest + fewest // EXTRA_GROUPS + 1):
        size, rest = divmod(peers, groups)
        steps = steps_to_all(groups, size)
        if not rest and steps is not None:
            exact.append((steps, groups))
    groups = min(exact)[1] if exact else fewest
    return Layout(groups, min(target, -(-peers // groups)))


def steps_to_all(groups: int, size: int) -> int | None:
    """After how many rounds more a group's average is in all ``groups`` to equal parts; None: never exactly."""
    if size < 2:
        return None
    reached = 1 % groups
    for steps in range(MAX_STEPS):
        if reached == 0:
            return steps
        reached = reached * size % groups
    return None


def rounds_to_all(layout: Layout) -> int:
    """Within how many rounds every group has a member that has met a given one, by others."""
    return 1 + math.ceil(math.log(layout.groups, max(2, layout.size)) - 1e-9)


@dataclass(frozen=True)
class Seat:
    """A peer's place in the grid: what it knows, and the number of its group in the next round."""

    grid: Grid = NO_GRID
    number: int = 0

    @property
    def is_dealt(self) -> bool:
        """Whether this peer has a group of its own to go to."""
        return self.grid.layout.groups > 1

    def key(self, prefix: str) -> str:
        """Where to look for the group."""
        layout = self.grid.layout
        return seat_key(prefix, layout.groups, self.number) if self.is_dealt else group_key(prefix)

    @property
    def expects(self) -> int:
        """How many peers are expected there, this one included; 0: that is not known."""
        if not self.is_dealt:
            return 0
        layout = self.grid.layout
        return max(1, min(layout.size, int(self.grid.swarm / layout.groups + 0.02)))


NO_SEAT = Seat()


def first_seat(peers: int, rank: int, target: int, minimum: int = 2) -> Seat:
    """Where the one of so many peers with this rank begins that know of no grid."""
    layout = choose_layout(peers, target, minimum)
    if layout.groups <= 1:
        return NO_SEAT
    return Seat(Grid(layout, 1, float(peers)), rank % layout.groups)


def seat_after_missed(seat: Seat, missed: Missed, draw: int) -> Seat:
    """Where a peer goes that has missed rounds: each group that lacks a member leaves the last of its places empty. Of
    several empty ones ``draw``, a random number, chooses.
    """
    grid, number = seat.grid, seat.number
    empty = max(1, grid.layout.size - missed.begun) if missed.begun else 1
    while grid.round < missed.round:
        layout = grid.layout
        place = (first_place(layout, number) + layout.size - 1 - draw % empty) % layout.size
        rank = number * layout.size + place
        grid = _next_round(grid)
        number, empty = rank % grid.layout.groups, 1
    return Seat(grid, number)


def _next_round(grid: Grid) -> Grid:
    """The grid one round later; in the layout that was planned for it, if it is its turn."""
    number = grid.round + 1
    if grid.next_round and number >= grid.next_round:
        return Grid(grid.next_layout, number, grid.swarm)
    return msgspec.structs.replace(grid, round=number)


def next_seat(group: GroupInfo, index: int, target: int | None, minimum: int = 2) -> Seat:
    """Where the member with this index goes after a committed round of ``group``."""
    if target is None:
        return NO_SEAT
    number = seat_of_key(group.key)
    known = [member.grid for member in group.members if member.grid.layout.groups > 1]
    if not known or (number is None and 2 * len(known) < len(group)):
        return NO_SEAT
    layout = _layout_of(group, known)
    swarm = _estimate(group, known, layout, is_seated=number is not None)
    is_lost = _has_lost_most(group, known, layout) if number is not None else swarm <= GATHER_BELOW
    if is_lost:
        return NO_SEAT
    rounds = [grid.round for grid in known if grid.round != UNKNOWN_ROUND]
    number_after = 1 + statistics.median_low(rounds) if rounds else UNKNOWN_ROUND
    grid = _plan(Grid(layout, number_after, swarm), known, target, minimum)
    rank = _rank(group, index, layout, number)
    if grid.next_round and grid.round >= grid.next_round:
        after = grid.next_layout
        if after.groups <= 1:
            return NO_SEAT
        grid = Grid(after, grid.round, grid.swarm)
    return Seat(grid, rank % grid.layout.groups)


def _layout_of(group: GroupInfo, known: Sequence[Grid]) -> Layout:
    """The one that most members use, who may have been left over in different ones."""
    counts = Counter((grid.layout.groups, grid.layout.size) for grid in known)
    most = max(counts, key=lambda layout: (counts[layout], layout))
    return Layout(*most)


def _estimate(group: GroupInfo, known: Sequence[Grid], layout: Layout, *, is_seated: bool) -> float:
    middle = statistics.median([grid.swarm for grid in known])
    limit = MAX_CHANGE * middle

    def change(word: float) -> float:
        return min(max(word - middle, -limit), limit)

    # fsum: all members get the same to the last bit, in whatever order
    before = middle + math.fsum(change(grid.swarm) for grid in known) / len(known)
    if not is_seated:
        return LEFT_OVER_PART * before
    own = max(group.seen, len(group)) * layout.groups
    return before + (middle + change(own) - before) * _weight(len(group), own, before, layout)


def _has_lost_most(group: GroupInfo, known: Sequence[Grid], layout: Layout) -> bool:
    """Whether a group has seen so few peers, of those that were dealt to its key, that there is a grid no more.

    If only this group was unlucky, its members learn of the grid that there is like newcomers. So do those that were
    left over from a small one.
    """
    seen = max(group.seen, len(group))
    expected = statistics.median([grid.swarm for grid in known]) / layout.groups
    return 2 * seen < expected and seen * layout.groups < GATHER_BELOW


def _weight(members: int, own: float, before: float, layout: Layout) -> float:
    """How much it counts that a group saw ``own`` peers for all groups, where ``before`` were expected."""
    surplus, expected = (own - before) / layout.groups, before / layout.groups
    is_chance = abs(surplus) <= max(1.0, NO_CHANCE * expected)
    if surplus > 0:
        return members / (members + (LEARN_PEERS if is_chance else LEARN_GROWTH))
    others = max(0.0, min(LEARN_PEERS, before - members))
    return members / (members + others) if is_chance else 0.5


def _plan(grid: Grid, known: Sequence[Grid], target: int, minimum: int) -> Grid:
    """The change that the members have heard of, if it makes sense, or one of their own."""
    heard = Counter(
        (one.next_round, -one.next_layout.groups, one.next_layout.size)
        for one in known
        if one.next_round > max(0, grid.round - rounds_to_all(grid.layout))
        and _is_plausible(one.next_layout, grid.swarm, target)
    )
    # Once it is due, all have heard of a change; one of which few know then would split the swarm.
    changes = [change for change, count in heard.items() if change[0] > grid.round or 2 * count >= len(known)]
    if changes:
        at, groups, size = min(changes)
        return Grid(grid.layout, grid.round, grid.swarm, Layout(-groups, size), at)
    if grid.round == UNKNOWN_ROUND:
        return grid  # in which round all others would change is not known
    wanted = ONE_GROUP
    if grid.swarm >= GATHER_BELOW:
        wanted = choose_layout(round(grid.swarm), target, minimum)
    grows = grid.swarm > GROW_ABOVE * target * grid.layout.groups
    shrinks = wanted.groups <= SHRINK_BELOW * grid.layout.groups
    if not grows and not shrinks:
        return grid
    at = grid.round + rounds_to_all(grid.layout) + 1
    return Grid(grid.layout, grid.round, grid.swarm, wanted, at)


def _is_plausible(layout: Layout, swarm: float, target: int) -> bool:
    """Whether that is a layout for about so many peers."""
    if layout.groups <= 1:
        return swarm <= PLAUSIBLE * max(target, GATHER_BELOW)
    return layout.size <= PLAUSIBLE * target and 1 / PLAUSIBLE <= layout.places / swarm <= PLAUSIBLE


def _rank(group: GroupInfo, index: int, layout: Layout, number: int | None) -> int:
    """The member's rank among all peers of the round."""
    place = _order(group)[index]
    if number is None:
        # Peers that were left over make groups where they meet; where these would have been is nobody's to know.
        return _draw(group.group_id) % layout.places + place
    # Groups before this one have been dealt the places before these.
    places, place = max(layout.size, len(group)), group.before + place
    return number * layout.size + (first_place(layout, number) + place) % places


def first_place(layout: Layout, number: int) -> int:
    """To which of its places group ``number`` deals its first member. The order goes on from there, full peers first.

    It leads to another group from each of those that deal to the same ones. So the places that stay empty do, too, and
    no group lacks a member, or a leader, from all of them.
    """
    groups, size = layout.groups, layout.size
    return (number - number * size) % groups if size >= groups else number * size // groups


def _order(group: GroupInfo) -> list[int]:
    """For each member its place in an order: by what it does in a group, and drawn from the group's id."""

    def key(one: int) -> tuple[bool, bool, bytes]:
        mode, peer_id = group.members[one].mode, group.members[one].peer_id
        return not mode.can_lead, not mode.contributes, hashlib.sha256(group.group_id + peer_id).digest()

    drawn = sorted(range(len(group)), key=key)
    places = [0] * len(group)
    for place, one in enumerate(drawn):
        places[one] = place
    return places


def _draw(seed: bytes) -> int:
    return int.from_bytes(hashlib.sha256(seed).digest()[:8], "big")
