"""Of what leaders said of the grid, newcomers believe the latest word."""

from __future__ import annotations

import math

import msgspec
import pytest

from shoal.averaging.grid import ONE_GROUP, Grid, Layout
from shoal.averaging.matchmaking.signposts import _SIGNPOSTS, Signpost, choose_signpost
from shoal.errors import InvalidValueError

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
