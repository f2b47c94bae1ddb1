"""The estimate of how far apart members were: what is sampled, and what it costs."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from shoal.averaging.allreduce.spread import BLOCK, SpreadSample
from shoal.utils.dtypes import FLOAT32, FLOAT64

PART = 1 << 17


def sample(parts: int, make: object, count: int = PART) -> SpreadSample:
    one = SpreadSample(parts)
    for index in range(parts):
        if one.wants(index):
            values = [make(index).numpy() for _ in range(2)]  # type: ignore[operator]
            one.add(index, values, (values[0] + values[1]) / 2, FLOAT32)
    return one


def test_one_part_of_32_is_looked_at_in_a_long_span_and_8_in_a_short_one():
    for parts, looked_at in ((512, 16), (64, 8), (8, 8), (3, 3), (1, 1)):
        one = SpreadSample(parts)
        assert sum(map(one.wants, range(parts))) == looked_at


def test_the_estimate_comes_close_for_values_of_one_kind():
    generator = torch.Generator().manual_seed(1)
    one = sample(64, lambda index: torch.randn(PART, generator=generator) + 3)
    distance, average = one.total(64 * PART)
    assert distance is not None
    assert average is not None
    assert distance / (64 * PART) == pytest.approx(0.5, rel=0.05)  # half of the difference's variance
    assert average / (64 * PART) == pytest.approx(9.5, rel=0.05)


def test_blocks_lie_at_different_places_of_their_parts():
    starts = []
    for index in range(0, 512, 32):
        one = SpreadSample(512)
        one.add(index, [np.arange(PART, dtype=np.float64)], np.zeros(PART), FLOAT64)
        distance, _ = one.total(BLOCK)
        assert distance is not None
        starts.append(distance)
    assert len(set(starts)) == len(starts)


def test_sums_beyond_the_range_of_float64_are_unknown():
    one = SpreadSample(1)
    one.add(0, [np.full(100, 1e300)], np.zeros(100), FLOAT64)
    assert one.total(100) == (None, None)
    assert SpreadSample(0).total(0) == (None, None)
