"""Whether a peer at its seat in a grid has missed rounds, and whether a group waits for those that may have."""

from __future__ import annotations

import pytest

from shoal.averaging.matchmaking.missed import Missed, find_missed, have_gone_on


@pytest.mark.parametrize(
    ("together", "rounds_ahead", "begun_before", "missed"),
    [
        (1, [], {}, None),
        (1, [6] * 7, {}, None),  # fewer than half of those that are expected
        (1, [6] * 8, {}, Missed(6, 0)),
        (1, [7, 9, 9, 8, 8, 8, 8, 1 << 40], {}, Missed(7, 0)),  # so many are there at least
        (1, [], {5: 7}, None),
        (1, [], {5: 15}, Missed(6, 15)),  # its own group of that round had begun when it came
        (1, [], {5: 15, 6: 12, 8: 9, 1 << 40: 1}, Missed(9, 0)),
        (1, [9] * 8, {5: 15}, Missed(9, 0)),
        (1, [], {4: 16}, None),
        (3, [], {5: 13}, Missed(6, 13)),
        (4, [], {5: 12}, None),  # so many that are late make a group of their own
        (4, [6] * 8, {}, None),
    ],
)
def test_what_a_peer_has_missed(together, rounds_ahead, begun_before, missed):
    assert find_missed(5, 16, together, rounds_ahead, begun_before) == missed


def test_in_a_small_group_one_word_is_not_enough():
    assert find_missed(5, 2, 1, [6], {}) is None
    assert find_missed(5, 2, 1, [6, 6], {}) == Missed(6, 0)
    assert not have_gone_on([6], 4)


def test_a_group_waits_until_a_quarter_has_gone_on():
    assert not have_gone_on([6] * 3, 16)
    assert have_gone_on([6] * 4, 16)
