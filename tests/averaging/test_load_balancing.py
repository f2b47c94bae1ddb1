from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from shoal.averaging.load_balancing import load_balance_peers
from shoal.errors import AllreduceException, InvalidValueError

bandwidths = st.none() | st.just(0.0) | st.floats(1e-3, 1e6)


@given(
    st.integers(0, 10**12),
    st.lists(bandwidths, min_size=1, max_size=20),
    st.integers(0, 10**6),
    st.data(),
)
def test_sizes_sum_to_the_vector(vector_size, given_bandwidths, min_size, data):
    contributes = data.draw(
        st.lists(st.booleans(), min_size=len(given_bandwidths), max_size=len(given_bandwidths))
    )
    sizes = load_balance_peers(vector_size, given_bandwidths, min_size, contributes=contributes)
    assert sum(sizes) == vector_size
    assert all(size >= 0 for size in sizes)
    if any(b != 0 for b in given_bandwidths):
        assert all(size == 0 for size, b in zip(sizes, given_bandwidths, strict=True) if b == 0)


def slowest(sizes, speeds, vector_size):
    """The busiest link's time, as the model in load_balancing.py has it."""
    n = len(speeds)
    return max((1 + (n - 2) * size / vector_size) / speed for size, speed in zip(sizes, speeds, strict=True))


@given(st.lists(st.integers(1, 1000), min_size=2, max_size=8), st.data())
def test_nobody_can_move_a_piece_and_be_faster(speeds, data):
    vector_size = 10**9
    sizes = load_balance_peers(vector_size, speeds)
    best = slowest(sizes, speeds, vector_size)
    donor = data.draw(st.sampled_from([i for i, size in enumerate(sizes) if size > 0]))
    taker = data.draw(st.integers(0, len(speeds) - 1))
    piece = data.draw(st.integers(0, sizes[donor]))
    other = list(sizes)
    other[donor] -= piece
    other[taker] += piece
    assert slowest(other, speeds, vector_size) >= best * (1 - 1e-6)


@pytest.mark.parametrize(
    ("vector_size", "given_bandwidths", "expected"),
    [
        (60, [0.25, 0.25, 0.25, 0.25], (15, 15, 15, 15)),
        # Water levels worked out by hand: T = 2.5, 3.896, 2.878, 3.636
        (1024, [0.3, 0.5, 0.9, 0.6], (0, 128, 640, 256)),
        (60, [0.44, 0.33, 0.22], (43, 17, 0)),
        (60, [0.55, 0.44, 0.40], (35, 16, 9)),
        (1024 * 1024, [0.0, 0.5, 0.0, 0.6], (0, 428963, 0, 619613)),
        # Two members: in proportion
        (100, [1, 3], (25, 75)),
        (1, [1, 1], (1, 0)),
    ],
)
def test_known_optima(vector_size, given_bandwidths, expected):
    assert load_balance_peers(vector_size, given_bandwidths) == expected


def test_unknown_bandwidth_is_the_mean_of_those_given():
    assert load_balance_peers(900, [10, None, 20, 0]) == load_balance_peers(900, [10, 15, 20, 0])
    assert load_balance_peers(100, [None] * 5) == (20,) * 5
    assert load_balance_peers(100, [0, 0, 0, None, None]) == (0, 0, 0, 50, 50)


def test_all_zero_means_equal_spans_of_those_who_can():
    assert load_balance_peers(99, [0, 0, 0]) == (33, 33, 33)
    assert load_balance_peers(99, [0, 0, 0], can_own=[True, False, True]) == (50, 0, 49)


def test_who_cannot_be_dialed_owns_nothing():
    assert load_balance_peers(100, [1000, 1, 1], can_own=[False, True, True]) == (0, 50, 50)


def test_nobody_who_can_own_is_a_named_error():
    with pytest.raises(AllreduceException, match="client mode"):
        load_balance_peers(100, [1, None], can_own=[False, False])


def test_auxiliary_members_take_more():
    # Two of three contributors' equal links: 1 + s each; the auxiliary's: 3 s. Equal at s = 1/5 and 2/5.
    assert load_balance_peers(100, [1, 1, 1, 1], contributes=[True, True, True, False]) == (20, 20, 20, 40)


def test_small_spans_are_given_up():
    assert load_balance_peers(60, [0.55, 0.44, 0.40], min_size=10) == (40, 20, 0)
    assert load_balance_peers(60, [0.32, 0.55, 0.44], min_size=10) == (0, 40, 20)


def test_min_size_never_leaves_nobody():
    assert load_balance_peers(2, [0.55, 0.20, 0.44], min_size=10) == (1, 0, 1)
    assert load_balance_peers(0, [1, 1], min_size=10) == (0, 0)


@pytest.mark.parametrize("bad", [-1, math.nan, math.inf])
def test_bad_bandwidths(bad):
    with pytest.raises(InvalidValueError, match=r"bandwidths\[1\]"):
        load_balance_peers(10, [1, bad])


@pytest.mark.parametrize(
    ("args", "options"),
    [
        ((-1, [1]), {}),
        ((1, [1], -1), {}),
        ((1, []), {}),
        ((1, [1, 2]), {"can_own": [True]}),
        ((1, [1, 2]), {"contributes": [True]}),
    ],
)
def test_bad_arguments(args, options):
    with pytest.raises(InvalidValueError):
        load_balance_peers(*args, **options)


def test_numbers_of_numpy_do_not_overflow():
    ours = load_balance_peers(1 << 60, [10, 20, 30], 1 << 30)
    theirs = load_balance_peers(np.int64(1 << 60), np.array([10, 20, 30], dtype=np.int8), np.int64(1 << 30))
    assert theirs == ours
    assert {type(count) for count in theirs} == {int}
