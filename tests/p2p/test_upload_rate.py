"""What a host's uplink takes: the highest sum over its paths, while one of them is full."""

from __future__ import annotations

import pytest

from shoal.averaging.matchmaking.peer import declared_bandwidth
from shoal.p2p.lanes.upload_rate import HALF_LIFE, UploadRate


def test_paths_that_send_at_the_same_time_are_added():
    rate = UploadRate()
    for second in range(5):
        for path, bytes_a_second in (("a", 1e6), ("b", 2e6), ("c", 0.5e6)):
            rate.note(path, bytes_a_second, second + 0.1 * ord(path[0]) / 100, is_full=True)
    assert rate.peak(5.0) == pytest.approx(3.5e6, rel=0.02)


def test_paths_that_send_one_after_the_other_are_not():
    rate = UploadRate()
    rate.note("a", 2e6, 0.0, is_full=True)
    rate.note("b", 2e6, 5.0, is_full=True)
    assert rate.peak(5.0) == pytest.approx(2e6, rel=0.02)


def test_a_path_that_is_not_full_shows_no_limit():
    rate = UploadRate()
    rate.note("a", 2e6, 0.0, is_full=False)
    assert rate.peak(0.0) == 0.0
    rate.note("b", 1e6, 0.5, is_full=True)
    assert rate.peak(0.5) == 3e6


def test_what_was_measured_fades():
    rate = UploadRate()
    rate.note("a", 8e6, 0.0, is_full=True)
    assert rate.peak(HALF_LIFE) == pytest.approx(4e6)
    rate.note("a", 5e6, HALF_LIFE, is_full=True)
    assert rate.peak(HALF_LIFE) == pytest.approx(5e6)


@pytest.mark.parametrize(
    ("given", "measured", "declared"),
    [(None, None, None), (50.0, 1e6, 50.0), (0.0, 1e6, 0.0), (None, 2.51e6, 20.0), (None, 24.6e6, 200.0)],
)
def test_the_users_word_counts_and_then_what_was_measured(
    given: float | None, measured: float | None, declared: float | None
):
    assert declared_bandwidth(given, measured) == declared
