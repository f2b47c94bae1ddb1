"""Whether a peer at its seat in a grid has missed rounds, and whether a group waits for those that may have."""

from __future__ import annotations

import pytest

from shoal.averaging.matchmaking.missed import Missed, find_missed, have_gone_on


@pytest.mark.parametrize(
    ("together", "rounds_ahead", "begun_before", "missed"),
    [
        (1, [], 0, None),
        (1, [6] * 7, 0, None),  # fewer than half of those that are expected
        (1, [6] * 8, 0, Missed(6, 0)),
        (1, [7, 9, 9, 8, 8, 8, 8, 1 << 40], 0, Missed(8, 0)),  # a liar counts once
        (1, [], 7, None),
        (1, [], 15, Missed(6, 15)),  # its own group of that round had begun when it came
        (1, [9] * 8, 15, Missed(9, 0)),
        (3, [], 13, Missed(6, 13)),
        (4, [], 12, None),  # so many that are late make a group of their own
        (4, [6] * 8, 0, None),
    ],
)
def test_what_a_peer_has_missed(together, rounds_ahead, begun_before, missed):
    assert find_missed(5, 16, together, rounds_ahead, begun_before) == missed


def test_in_a_small_group_one_word_is_not_enough():
    assert find_missed(5, 2, 1, [6], 0) is None
    assert find_missed(5, 2, 1, [6, 6], 0) == Missed(6, 0)
    assert not have_gone_on([6], 4)


def test_a_group_waits_until_a_quarter_has_gone_on():
    assert not have_gone_on([6] * 3, 16)
    assert have_gone_on([6] * 4, 16)
