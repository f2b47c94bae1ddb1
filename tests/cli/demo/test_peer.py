from __future__ import annotations

from typing import Any

import pytest

from shoal.cli.demo.peer import latest_round


@pytest.mark.parametrize(
    ("gathered", "round_"),
    [
        ([{"round": 3, "newcomer": False}, {"round": 5, "newcomer": False}], 5),
        ([{"round": 3, "newcomer": False}, {"round": 0, "newcomer": True}], 3),
        ([{"round": 0, "newcomer": True}, {"round": 0, "newcomer": True}], None),
        # What others gather is theirs to choose.
        ([{"round": 3, "newcomer": False}, {"round": 10**9, "newcomer": False}], 3),
        ([{"round": 3, "newcomer": False}, {"round": -1, "newcomer": False}], 3),
        ([{"round": 3, "newcomer": False}, None, "x", {}, {"round": "9", "newcomer": False}], 3),
    ],
)
def test_the_round_is_that_of_the_most_advanced(gathered: list[Any], round_: int | None) -> None:
    assert latest_round(dict(enumerate(gathered)), rounds=100) == round_
