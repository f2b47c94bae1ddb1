"""Seats: after every committed round each member knows which group of the grid it is in next."""

from __future__ import annotations

import random
from collections import Counter, defaultdict
from dataclasses import replace
from fractions import Fraction

import msgspec
import pytest

from shoal.averaging.grid import NO_GRID, UNKNOWN_ROUND, Grid, Layout, grid_problem
from shoal.averaging.group import (
    SCHEMA_HASH_BYTES,
    GroupInfo,
    MemberInfo,
    PeerMode,
    group_key,
    order_members,
    seat_key,
)
from shoal.averaging.matchmaking.group_keys import GroupKeys
from shoal.averaging.matchmaking.missed import Missed
from shoal.averaging.matchmaking.seats import (
    Seat,
    choose_layout,
    first_place,
    first_seat,
    next_seat,
    rounds_to_all,
    seat_after_missed,
    steps_to_all,
)
from shoal.testing.matchmaking_cores import core_peer_id


def form(
    numbers: list[int],
    grids: list[Grid],
    key: str,
    group_id: bytes,
    seen: int = 0,
    before: int = 0,
) -> GroupInfo:
    leader = core_peer_id(numbers[0])
    infos = [
        MemberInfo(
            peer_id=core_peer_id(number).to_bytes(),
            leader=leader.to_bytes(),
            key=key,
            schema_hash=bytes(SCHEMA_HASH_BYTES),
            mode=PeerMode.FULL,
            bandwidth=None,
            addresses=(),
            gather=b"",
            start_time=0.0,
            signed_at=0.0,
            nonce=bytes(16),
            grid=grid,
        )
        for number, grid in zip(numbers, grids, strict=True)
    ]
    return GroupInfo(group_id, key, order_members(leader, infos), seen, before)


class Swarm:
    """Peers that all find each other: whoever has one seat makes one group."""

    def __init__(self, count: int, target: int) -> None:
        self.target = target
        self.rng = random.Random(f"{count} {target}")
        self.seats = [first_seat(count, rank, target) for rank in range(count)]
        self.absent: set[int] = set()

    def round(self) -> list[list[int]]:
        """The groups of one round, after which everybody has moved on."""
        by_key: dict[str, list[int]] = defaultdict(list)
        for number, seat in enumerate(self.seats):
            if number in self.absent:
                continue
            by_key[seat.key("swarm")].append(number)
        for key, numbers in by_key.items():
            group = form(
                numbers, [self.seats[one].grid for one in numbers], key, self.rng.randbytes(16), len(numbers)
            )
            places = {peer_id: index for index, peer_id in enumerate(group.peer_ids)}
            for number in numbers:
                self.seats[number] = next_seat(group, places[core_peer_id(number)], self.target)
        return list(by_key.values())


@pytest.mark.parametrize(
    ("count", "target", "rounds"), [(64, 4, 3), (64, 8, 2), (27, 3, 3), (81, 10, 2), (64, 32, 2), (32, 2, 5)]
)
def test_exact_grids_give_everybody_the_exact_average(count, target, rounds):
    swarm = Swarm(count, target)
    parts = [{number: Fraction(1)} for number in range(count)]
    for _ in range(rounds):
        for group in swarm.round():
            total: Counter[int] = Counter()
            for member in group:
                total.update(parts[member])
            for member in group:
                parts[member] = {one: share / len(group) for one, share in total.items()}
    assert all(part == dict.fromkeys(range(count), Fraction(1, count)) for part in parts)


@pytest.mark.parametrize(("count", "target"), [(97, 32), (333, 32), (150, 16), (500, 32), (101, 4)])
def test_groups_stay_even_where_the_grid_is_not_full(count, target):
    swarm = Swarm(count, target)
    for _ in range(8):
        sizes = [len(group) for group in swarm.round()]
        assert max(sizes) <= target + 2
        assert min(sizes) >= max(sizes) - 4


@pytest.mark.parametrize(
    ("peers", "target", "layout"),
    [
        (32, 32, Layout(1, 0)),
        (33, 32, Layout(2, 17)),
        (900, 32, Layout(30, 30)),
        (1024, 32, Layout(32, 32)),
        (512, 4, Layout(128, 4)),
        (97, 32, Layout(4, 25)),
        (65, 2, Layout(32, 2)),
        (3, 2, Layout(1, 0)),
    ],
)
def test_a_layout_has_few_groups_unless_some_more_make_it_exact(peers, target, layout):
    assert choose_layout(peers, target) == layout


def test_exact_layouts_are_known():
    assert steps_to_all(30, 30) == 1
    assert steps_to_all(128, 4) == 4
    assert steps_to_all(4, 25) is None
    assert rounds_to_all(Layout(32, 32)) == 2


def test_empty_places_lead_to_different_groups():
    for layout in (Layout(4, 25), Layout(4, 32), Layout(16, 4), Layout(30, 30)):
        missing = Counter(
            (number * layout.size + (first_place(layout, number) - 1) % layout.size) % layout.groups
            for number in range(layout.groups)
        )
        assert max(missing.values()) <= 2


@pytest.mark.parametrize("missed", [1, 2, 5])
def test_a_peer_that_was_away_takes_the_place_that_is_empty_without_it(missed):
    swarm = Swarm(64, 8)
    away, seat = 17, swarm.seats[17]
    swarm.absent = {away}
    for _ in range(missed):
        swarm.round()
    swarm.absent = set()
    swarm.seats[away] = seat_after_missed(seat, Missed(seat.grid.round + missed, 7 if missed == 1 else 0), 0)
    assert [len(group) for group in swarm.round()] == [8] * 8


def test_peers_that_missed_one_round_take_different_places_that_are_empty_without_them():
    seat = first_seat(64, 17, 8)
    numbers = {seat_after_missed(seat, Missed(seat.grid.round + 1, 5), draw).number for draw in range(9)}
    assert len(numbers) == 3


def test_who_was_away_follows_a_change_of_the_layout():
    grid = Grid(Layout(8, 8), 5, 48.0, Layout(6, 8), 7)
    after = seat_after_missed(Seat(grid, 3), Missed(8, 0), 0)
    assert after.grid == Grid(Layout(6, 8), 8, 48.0)
    assert after.number < 6
    assert seat_after_missed(Seat(grid, 3), Missed(6, 0), 0).grid == Grid(
        Layout(8, 8), 6, 48.0, Layout(6, 8), 7
    )


def test_newcomers_take_the_round_of_those_that_they_meet():
    layout, key = Layout(8, 8), seat_key("swarm", 8, 3)
    unknown = Grid(layout, UNKNOWN_ROUND, 64.0)
    mixed = form([0, 1, 2, 3], [unknown, unknown, unknown, Grid(layout, 5, 64.0)], key, bytes(16))
    assert {next_seat(mixed, one, 8).grid.round for one in range(4)} == {6}
    alone = form([0, 1], [unknown] * 2, key, bytes(16))
    assert next_seat(alone, 0, 8).grid.round == UNKNOWN_ROUND


def test_two_groups_of_one_key_are_dealt_different_places():
    grid, key = Grid(Layout(8, 8), 5, 66.0), seat_key("swarm", 8, 3)
    first = form(list(range(5)), [grid] * 5, key, bytes(16), seen=9, before=0)
    second = form(list(range(5, 9)), [grid] * 4, key, bytes(15) + b"2", seen=9, before=5)
    numbers = Counter(
        next_seat(group, one, 8).number for group in (first, second) for one in range(len(group))
    )
    assert sorted(numbers.values()) == [1] * 7 + [2]


PLANNED = Grid(Layout(8, 8), 6, 64.0, Layout(9, 8), 7)
"""A change for the round after the next one."""


def after(grids: list[Grid]) -> Grid:
    """What the members of a group with these grids know after its round."""
    numbers = list(range(len(grids)))
    group = form(numbers, grids, seat_key("swarm", 8, 3), bytes(16), seen=len(grids))
    return next_seat(group, 0, 8).grid


def test_a_change_of_which_one_member_has_heard_spreads():
    grid = Grid(Layout(8, 8), 5, 64.0)
    one = msgspec.structs.replace(PLANNED, round=5)
    spread = after([grid] * 7 + [one])
    assert (spread.next_layout, spread.next_round) == (Layout(9, 8), 7)


@pytest.mark.parametrize(("informed", "layout"), [(1, Layout(8, 8)), (5, Layout(9, 8))])
def test_a_change_that_is_due_counts_if_most_have_heard_of_it(informed, layout):
    """One of which few know would split the swarm, whoever planned it."""
    ignorant = Grid(Layout(8, 8), 6, 64.0)
    assert after([ignorant] * (8 - informed) + [PLANNED] * informed).layout == layout


@pytest.mark.parametrize("swarm", [45.0, 90.0])
def test_peers_that_do_not_know_their_round_plan_no_change(swarm):
    newcomers = [Grid(Layout(8, 8), UNKNOWN_ROUND, swarm)] * 8
    assert after(newcomers).next_round == 0
    heard = [msgspec.structs.replace(PLANNED, round=UNKNOWN_ROUND)]
    assert after(newcomers[:7] + heard).next_round == 7


@pytest.mark.parametrize("seen", [2, 1000])
def test_a_group_of_peers_that_know_of_no_grid_makes_none(seen):
    """Its leader's count is no agreement: each group would make a grid of its own."""
    group = form([0, 1], [NO_GRID] * 2, group_key("swarm"), bytes(16), seen)
    assert next_seat(group, 0, 32) == Seat()
    assert next_seat(group, 0, None) == Seat()


def test_a_grid_that_has_lost_most_of_its_peers_is_given_up():
    swarm = Swarm(128, 16)
    swarm.seats = swarm.seats[:24]
    rounds = 0
    while any(seat.is_dealt for seat in swarm.seats):
        swarm.round()
        rounds += 1
    assert rounds <= 2


def test_all_change_the_layout_in_the_same_round():
    """One group finds that there are too many; the others hear of it before the round that it names."""
    swarm = Swarm(64, 8)
    many = [
        replace(seat, grid=msgspec.structs.replace(seat.grid, swarm=90.0)) if seat.number == 0 else seat
        for seat in swarm.seats
    ]
    swarm.seats = many
    changed = []
    for _ in range(6):
        swarm.round()
        changed.append({seat.grid.layout.groups for seat in swarm.seats})
    assert all(len(groups) == 1 for groups in changed), changed
    assert changed[-1] != {8}


def test_a_liar_moves_the_estimate_by_little():
    honest = Grid(Layout(8, 8), 5, 64.0)
    group = form(
        list(range(8)), [*[honest] * 7, Grid(Layout(8, 8), 1 << 40, 1e9, Layout(9999, 8), 6)], seat_key("swarm", 8, 3),
        bytes(16), 10**6,
    )  # fmt: skip
    seat = next_seat(group, 0, 8)
    assert seat.grid.swarm < 75
    assert seat.grid.round == 6
    assert seat.grid.layout == Layout(8, 8)
    assert seat.grid.next_layout.groups < 12


def test_who_finds_too_few_looks_where_all_meet_and_then_at_its_seat_again():
    keys = GroupKeys(core_peer_id(0))
    assert keys.may_spread
    assert not keys.found_too_few(1)
    assert keys.spread(64, 5, 32)
    assert keys.key("swarm") == seat_key("swarm", 2, 1)
    assert (keys.expects, keys.may_spread) == (32, False)
    assert keys.found_too_few(1)
    assert (keys.key("swarm"), keys.expects) == (group_key("swarm"), 0)
    assert keys.found_too_few(1)
    assert keys.is_seated
    keys.found_too_few(1)
    keys.search_ended()
    assert keys.is_seated


def test_given_bits_have_nothing_to_do_with_seats():
    keys = GroupKeys(core_peer_id(0), "01")
    assert keys.key("swarm") == group_key("swarm", "01")
    assert not keys.spread(1000, 1, 4)
    assert not keys.join_grid(Grid(Layout(8, 8), 5, 64.0), 5)
    assert not keys.found_too_few(1)
    assert (keys.expects, keys.may_spread, keys.grid) == (0, False, NO_GRID)


def test_a_round_of_bits_that_were_taken_back_gives_no_seat():
    keys = GroupKeys(core_peer_id(0), "01")
    group = form([0, 1], [NO_GRID] * 2, keys.key("swarm"), bytes(16), 99)
    keys.set_bits("")
    keys.round_committed(group, 2)
    assert not keys.is_seated


def test_a_newcomer_takes_a_seat_in_the_grid_that_there_is():
    keys = GroupKeys(core_peer_id(0))
    grid = Grid(Layout(8, 8), 5, 64.0)
    assert keys.join_grid(grid, 5)
    assert keys.grid == Grid(Layout(8, 8), UNKNOWN_ROUND, 64.0)
    assert not keys.join_grid(grid, 5)


@pytest.mark.parametrize(
    "grid",
    [
        Grid(Layout(0, 8)),
        Grid(Layout(8, 1 << 30)),
        Grid(next_layout=Layout(1 << 30, 8)),
        Grid(round=-1),
        Grid(next_round=1 << 60),
        Grid(swarm=float("nan")),
        Grid(swarm=-1.0),
    ],
)
def test_a_grid_out_of_bounds_is_refused(grid):
    assert "grid" in (grid_problem(grid) or "")
