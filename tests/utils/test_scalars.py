"""Numbers of numpy and torch become Python's own."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from shoal.utils.scalars import plain
from shoal.utils.serializer import MSGPackSerializer


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (np.float32(0.5), 0.5),
        (np.float64(0.1), 0.1),
        (np.int64(1 << 62), 1 << 62),
        (np.uint8(200), 200),
        (np.bool_(True), True),
        (np.array(3), 3),
        (np.str_("run"), "run"),
        (torch.tensor(2.5), 2.5),
        (torch.tensor(7), 7),
    ],
    ids=repr,
)
def test_a_single_number_is_pythons_own(given, expected):
    assert plain(given) == expected
    assert type(plain(given)) is type(expected)


@pytest.mark.parametrize(
    "given", [None, True, 3, 0.5, "run", [1], np.zeros(1), torch.zeros(1), object], ids=repr
)
def test_anything_else_stays_as_it_is(given):
    assert plain(given) is given


def test_what_is_gathered_may_hold_numbers_of_numpy():
    gathered = {
        "loss": np.float32(0.5),
        "samples": np.int64(3),
        "ok": np.bool_(True),
        "last": torch.tensor(2.0),
    }
    back = MSGPackSerializer.loads(MSGPackSerializer.dumps(gathered))
    assert back == {"loss": 0.5, "samples": 3, "ok": True, "last": 2.0}
    assert [type(value) for value in back.values()] == [float, int, bool, float]
