"""NaN and infinity are found while a snapshot is taken, wherever they are, and named by the tensor."""

from __future__ import annotations

import math

import pytest
import torch

from shoal.averaging.partition import Layout
from shoal.averaging.trainer import finite_scan
from shoal.averaging.trainer.finite_scan import BLOCK_NBYTES, MOST_NBYTES, FiniteScan
from shoal.averaging.trainer.tensors import TensorStore
from shoal.compression.base import FLOATING_DTYPES

dtypes = pytest.mark.parametrize("dtype", FLOATING_DTYPES.values(), ids=str)


def scan(*tensors: torch.Tensor) -> int | None:
    """What a snapshot of these tensors finds."""
    layout = Layout.from_tensors(tensors)
    return TensorStore(tensors, layout).snapshot(bytearray(layout.nbytes), checks_finite=True)


def test_the_first_tensor_of_several_dtypes_is_named():
    tensors = [torch.zeros(3), torch.zeros(2, dtype=torch.float64), torch.zeros(100_000), torch.zeros(0)]
    assert scan(*tensors) is None
    tensors[2][99_999] = math.nan
    assert scan(*tensors) == 2
    tensors[1][0] = -math.inf
    assert scan(*tensors) == 1


def test_small_tensors_that_share_a_block_are_told_apart():
    tensors = [torch.zeros(size) for size in (0, 2, 0, 1, 3, 0)]
    for index in (4, 3, 1):
        tensors[index][-1] = math.nan
        assert scan(*tensors) == index


@dtypes
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_one_element_is_found_at_the_borders_of_blocks(dtype: torch.dtype, value: float):
    block = BLOCK_NBYTES // dtype.itemsize
    for place in (0, block - 1, block, 2 * block, 2 * block + 4):
        tensor = torch.ones(2 * block + 5, dtype=dtype)
        tensor[place] = value
        assert scan(torch.ones(3, dtype=dtype), tensor) == 1


@dtypes
def test_finite_elements_whose_sum_overflows_are_finite(dtype: torch.dtype):
    assert scan(torch.full((1000,), torch.finfo(dtype).max, dtype=dtype)) is None


def test_infinities_that_cancel_are_found():
    assert scan(torch.tensor([math.inf, 1.0, -math.inf])) == 0


def test_tensors_that_are_copied_as_a_whole_are_looked_at():
    tensor = torch.zeros(6, 4)
    tensor[5, 3] = math.nan
    assert scan(torch.zeros(2), tensor.t()) == 1


def test_nothing_is_said_of_it_unless_asked():
    tensor = torch.tensor([math.nan])
    store = TensorStore([tensor], Layout.from_tensors([tensor]))
    assert store.snapshot(bytearray(store.layout.nbytes)) is None


@dtypes
@pytest.mark.parametrize("value", [math.nan, -math.inf])
def test_the_end_of_a_large_area_is_looked_at(dtype: torch.dtype, value: float):
    tensor = torch.ones(2 * MOST_NBYTES // dtype.itemsize + 5, dtype=dtype)
    assert scan(tensor) is None
    tensor[-1] = value
    assert scan(tensor) == 0


def test_all_is_looked_at_once_and_as_soon_as_a_block_is_filled(monkeypatch: pytest.MonkeyPatch):
    looks: list[int] = []
    tensor = torch.zeros((4 * BLOCK_NBYTES + MOST_NBYTES) // 2, dtype=torch.bfloat16)
    monkeypatch.setattr(
        finite_scan, "is_finite", lambda values, dtype, at_once: looks.append(values.nbytes) or True
    )
    following = FiniteScan(Layout.from_tensors([tensor]), tensor.view(torch.uint8))
    seen = []
    for stop in (
        BLOCK_NBYTES - 1,
        BLOCK_NBYTES,
        2 * BLOCK_NBYTES + 1,
        3 * BLOCK_NBYTES,
        4 * BLOCK_NBYTES + MOST_NBYTES,
    ):
        following.follow(stop)
        seen.append(sum(looks))
    assert following.finish() is None
    assert seen == [0, BLOCK_NBYTES, 2 * BLOCK_NBYTES, 3 * BLOCK_NBYTES, 4 * BLOCK_NBYTES + MOST_NBYTES]
    assert sum(looks) == tensor.nbytes
    assert max(looks) <= MOST_NBYTES
