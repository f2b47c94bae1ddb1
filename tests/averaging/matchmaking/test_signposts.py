"""Of what leaders said of the grid, newcomers believe the latest word."""

from __future__ import annotations

import math

import msgspec
import pytest

from shoal.averaging.grid import ONE_GROUP, UNKNOWN_ROUND, Grid, Layout
from shoal.averaging.group import SCHEMA_HASH_BYTES, PeerMode
from shoal.averaging.matchmaking.messages import Declaration, DeclaredState
from shoal.averaging.matchmaking.signposts import (
    _SIGNPOSTS,
    RECENT,
    Signpost,
    are_there,
    choose_signpost,
    find_other_grid,
)
from shoal.errors import InvalidValueError
from shoal.testing.matchmaking_cores import core_peer_id

OLD = Grid(Layout(2, 9), 17, 18.0)
DISSOLVED = Grid(ONE_GROUP, 18, 16.2)


def test_signposts_of_a_grid_that_is_no_more_lead_nobody_there():
    assert choose_signpost([Signpost(OLD, 100.0), Signpost(DISSOLVED, 101.0)], 105.0) is None
    assert choose_signpost([Signpost(OLD, 100.0), Signpost(DISSOLVED, 300.0)], 400.0) is None


def test_a_new_grid_counts_though_its_rounds_are_fewer():
    new = Grid(Layout(3, 8), 1, 24.0)
    assert choose_signpost([Signpost(OLD, 100.0), Signpost(new, 400.0)], 405.0) == new


def test_of_grids_that_were_made_at_once_the_largest_counts():
    grids = [Grid(Layout(8, 32), 1, 256.0), Grid(Layout(4, 32), 1, 128.0)]
    assert choose_signpost([Signpost(one, 50.0) for one in grids], 51.0) == grids[0]


def test_a_time_in_the_future_counts_as_now():
    new = Grid(Layout(3, 8), 30, 24.0)
    assert choose_signpost([Signpost(OLD, 1e9), Signpost(new, 99.0)], 100.0) == new


def test_nobody_said_anything():
    assert choose_signpost([], 5.0) is None


@pytest.mark.parametrize("left_at", [math.nan, math.inf])
def test_a_signpost_without_a_time_is_refused(left_at):
    assert _SIGNPOSTS.decode(msgspec.msgpack.encode(Signpost(OLD, 7.0))) == Signpost(OLD, 7.0)
    with pytest.raises(InvalidValueError):
        _SIGNPOSTS.decode(msgspec.msgpack.encode(Signpost(OLD, left_at)))


def test_a_peer_that_gave_a_grid_up_follows_no_older_signpost():
    newer = Grid(Layout(8, 32), 1, 250.0)
    assert choose_signpost([Signpost(OLD, 100.0)], 105.0, after=101.0) is None
    assert choose_signpost([Signpost(OLD, 100.0), Signpost(newer, 104.0)], 105.0, after=101.0) == newer


OWN = Grid(Layout(8, 16), 20, 70.0)
OTHER = Grid(Layout(9, 15), 20, 60.0)


def said(*words: tuple[Grid, float]) -> dict:
    return {core_peer_id(number): Signpost(grid, at) for number, (grid, at) in enumerate(words)}


BOTH = said((OWN, 100.0), (OWN, 100.1), (OTHER, 100.2), (OTHER, 100.3))


def test_of_two_grids_in_the_same_round_the_larger_one_stays():
    assert find_other_grid(OWN, BOTH, 101.0, 16) == OTHER
    assert find_other_grid(OTHER, BOTH, 101.0, 16) is None


def test_of_two_grids_that_which_is_further_stays():
    further = msgspec.structs.replace(OWN, round=21)
    words = said((further, 100.0), (further, 100.1), (OTHER, 100.2), (OTHER, 100.3))
    assert find_other_grid(further, words, 101.0, 16) is None
    assert find_other_grid(OTHER, words, 101.0, 16) == further


@pytest.mark.parametrize(
    ("what", "own", "words"),
    [
        ("one peer says so", OWN, said((OTHER, 100.0), (OWN, 100.0))),
        ("one of two said so long before", OWN, said((OTHER, 99.0 - RECENT), (OTHER, 100.0))),
        ("the own grid changes to it", msgspec.structs.replace(OWN, next_layout=OTHER.layout, next_round=21), BOTH),
        ("it is much larger", OWN, said(*[(Grid(Layout(64, 16), 20, 1024.0), 100.0)] * 2)),
        ("its groups are too large", OWN, said(*[(Grid(Layout(9, 60), 20, 60.0), 100.0)] * 2)),
        ("nobody there knows the round", OWN, said(*[(Grid(Layout(9, 15), UNKNOWN_ROUND, 60.0), 100.0)] * 2)),
    ],
)  # fmt: skip
def test_a_peer_with_a_seat_stays_in_its_grid_if(what, own, words):
    assert find_other_grid(own, words, 101.0, 16) is None


@pytest.mark.parametrize("age", [0.0, 60.0, 300.0])
def test_the_parts_of_a_swarm_may_have_had_their_rounds_at_other_times(age):
    words = said((OWN, 100.0), (OWN, 100.1), (OTHER, 100.0 - age), (OTHER, 99.9 - age))
    assert find_other_grid(OWN, words, 101.0, 16) == OTHER


def test_a_peer_that_does_not_know_its_round_goes_to_those_that_do():
    assert find_other_grid(msgspec.structs.replace(OTHER, round=UNKNOWN_ROUND), BOTH, 101.0, 16) == OWN


def declared(*rounds: int) -> list[Declaration]:
    one = Declaration(5.0, DeclaredState.TAKEN, bytes(SCHEMA_HASH_BYTES), PeerMode.FULL, ())
    return [msgspec.structs.replace(one, swarm_round=number) for number in rounds]


@pytest.mark.parametrize(
    ("rounds", "are"), [((7,) * 4, True), ((7,) * 3, False), ((7, 7, 7, 0, 0, 0), False)]
)
def test_others_are_at_a_seat_if_some_are_declared_there_that_know_their_round(rounds, are):
    """Words alone move nobody: two liars may say that there is a grid, and a grid may have ended."""
    assert are_there(declared(*rounds), 16) is are
    assert not are_there([], 2)


def test_a_swarm_without_a_target_has_no_grid():
    assert find_other_grid(OWN, BOTH, 101.0, None) is None
