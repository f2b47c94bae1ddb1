from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from shoal.compression import Float16Compression

WIDER = [torch.float32, torch.float64, torch.bfloat16]
CODEC = Float16Compression()


def there_and_back(values: torch.Tensor) -> torch.Tensor:
    return CODEC.decode(bytes(CODEC.encode(values)), values.dtype, len(values))


@pytest.mark.parametrize("dtype", WIDER, ids=str)
def test_overflow_is_clipped_never_infinite(dtype):
    largest = torch.finfo(dtype).max
    values = torch.tensor([65504, 65519.99, 65520, 1e30, largest, float("inf")], dtype=dtype)
    on_the_wire = torch.frombuffer(bytearray(CODEC.encode(torch.cat([values, -values]))), dtype=torch.float16)
    assert on_the_wire.tolist() == [65504.0] * 6 + [-65504.0] * 6


@pytest.mark.parametrize("dtype", WIDER, ids=str)
def test_nan_stays_nan(dtype):
    assert there_and_back(torch.tensor([float("nan")], dtype=dtype)).isnan().all()


@given(st.lists(st.floats(-65504, 65504, width=32), min_size=1, max_size=20))
def test_error_bound(numbers):
    values = torch.tensor(numbers, dtype=torch.float32)
    error = (there_and_back(values) - values).abs()
    assert bool((error <= torch.clamp(values.abs() * 2**-11, min=2**-25)).all())


def test_float16_passes_unchanged():
    values = torch.tensor([1.5, -0.0, 65504, 2**-24], dtype=torch.float16)
    assert CODEC.lossless(torch.float16)
    assert not CODEC.lossless(torch.float32)
    assert CODEC.is_raw(torch.float16)
    assert bytes(CODEC.encode(values)) == values.numpy().tobytes()


def test_input_is_not_changed():
    values = torch.tensor([1e9, 0.1])
    CODEC.encode(values)
    assert values.tolist() == torch.tensor([1e9, 0.1]).tolist()
