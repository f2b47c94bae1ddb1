"""Each codec loses no more than its docstring says."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from shoal.compression import (
    BFloat16Compression,
    BlockwiseQuantization,
    CompressionBase,
    Float16Compression,
    NoCompression,
    Quantile8BitQuantization,
    ScaledFloat16Compression,
    Uniform8BitQuantization,
)
from shoal.compression.base import FLOATING_DTYPES
from shoal.compression.codebooks import code_table, fit_codebook
from shoal.testing.codecs import error_bound

CODECS: list[CompressionBase] = [
    NoCompression(),
    Float16Compression(),
    BFloat16Compression(),
    ScaledFloat16Compression(),
    Uniform8BitQuantization(),
    Quantile8BitQuantization(),
    BlockwiseQuantization(),
]
codecs = pytest.mark.parametrize("codec", CODECS, ids=repr)


def normal(count: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(count, generator=torch.Generator().manual_seed(seed))


LAST = torch.tensor([-1])
DISTRIBUTIONS = {
    "normal": lambda n, seed: normal(n, seed),
    "heavy tails": lambda n, seed: normal(n, seed) / normal(n, seed + 1),
    "magnitudes": lambda n, seed: normal(n, seed) * torch.exp(3 * normal(n, seed + 1)),
    "constant and noise": lambda n, seed: 1 + 1e-3 * normal(n, seed),
    "almost constant": lambda n, seed: 1 + 1e-7 * normal(n, seed),
    "two values": lambda n, seed: normal(n, seed).sign(),
    "two narrow peaks": lambda n, seed: normal(n, seed).sign() + 1e-4 * normal(n, seed + 1),
    "sparse": lambda n, seed: normal(n, seed) * (normal(n, seed + 1) > 2.5),
    "one outlier": lambda n, seed: normal(n, seed).index_fill_(0, torch.tensor([n // 2]), 3e4),
    "positive": lambda n, seed: normal(n, seed).square(),
    "equal lowest values": lambda n, seed: (1e-3 * normal(n, seed)).relu().index_fill_(0, LAST, 1.0),
}


def there_and_back(codec: CompressionBase, values: torch.Tensor) -> torch.Tensor:
    return codec.decode(bytearray(codec.encode(values)), values.dtype, len(values))


def rms(codec: CompressionBase, values: torch.Tensor) -> float:
    return math.sqrt((there_and_back(codec, values) - values).double().square().mean().item())


@codecs
@pytest.mark.parametrize(
    ("dtype", "count"),
    [
        *[(dtype, count) for dtype in FLOATING_DTYPES.values() for count in (1, 5000)],
        *[(torch.float32, count) for count in (257, 300, 1025, 300_000)],
    ],
    ids=str,
)
@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
def test_no_error_beyond_the_bound(codec, dtype, distribution, count):
    values = DISTRIBUTIONS[distribution](count, 17).clamp(-6e4, 6e4).to(dtype)
    error = (there_and_back(codec, values).double() - values.double()).abs()
    excess = error - error_bound(codec, values)
    assert excess.max().item() <= 0, (error.max(), values[excess.argmax()])


@codecs
@settings(max_examples=100)
@given(
    numbers=st.lists(
        st.floats(-6e4, 6e4, width=32) | st.sampled_from([0.0, 1.0, 1e-30, 2.0**-149]),
        min_size=1,
        max_size=400,
    ),
    repeat=st.sampled_from([1, 20]),
)
def test_no_error_beyond_the_bound_for_any_numbers(codec, numbers, repeat):
    values = torch.tensor(numbers, dtype=torch.float32).repeat(repeat)
    error = (there_and_back(codec, values).double() - values.double()).abs()
    assert bool((error <= error_bound(codec, values)).all())


@pytest.mark.parametrize(
    ("codec", "distribution", "limit"),
    [
        # hivemind 1.1.12 on the same distributions, at as many bytes or more: see benchmarks/tensor_codecs.py
        (Uniform8BitQuantization(), "normal", 0.0086),  # 0.0157
        (Quantile8BitQuantization(), "normal", 0.0070),  # 0.0264
        (BlockwiseQuantization(), "normal", 0.0075),  # 0.0129
        (Uniform8BitQuantization(), "constant and noise", 0.0086e-3),
        (Quantile8BitQuantization(), "constant and noise", 0.0070e-3),
        (Quantile8BitQuantization(), "two narrow peaks", 0.0160e-4),  # where the table is too coarse
        (ScaledFloat16Compression(), "constant and noise", 0.0003e-3),
    ],
)
def test_typical_error(codec, distribution, limit):
    assert rms(codec, DISTRIBUTIONS[distribution](200_000, 3)) < limit


def test_uniform_levels_are_not_stretched_by_a_few_outliers():
    values = normal(262_144)
    plain = rms(Uniform8BitQuantization(), values)
    values[torch.arange(50) * 5000 + 77] = torch.linspace(-3e30, 3e30, 50)
    back = there_and_back(Uniform8BitQuantization(), values)
    assert torch.equal(back[values.abs() > 1e6], values[values.abs() > 1e6])
    error = (back - values).double().square().mean().sqrt().item()
    assert error < 1.3 * plain


@pytest.mark.parametrize("count", [4096, 4097, 5000, 262_144 + 4097])
def test_uniform_finds_outliers_wherever_they_are(count):
    codec, chunk = Uniform8BitQuantization(), Uniform8BitQuantization.chunk
    for place in {0, 127, 128, count // 2, min(count, chunk) - 1, count - 1}:
        values = normal(count)
        values[place] = 1e20
        back = there_and_back(codec, values)
        assert back[place] == values[place]
        assert (back - values).abs().max() < 0.05


def test_zeros_stay_zero_so_that_sparse_tensors_stay_sparse():
    values = DISTRIBUTIONS["sparse"](300_000, 1)
    for codec in (Uniform8BitQuantization(), BlockwiseQuantization()):
        assert bool((there_and_back(codec, values)[values == 0] == 0).all())


def test_256_values_or_fewer_are_their_own_quantile_levels():
    values = normal(256)
    assert torch.equal(there_and_back(Quantile8BitQuantization(), values), values)


@pytest.mark.parametrize(("part_size_bytes", "expected"), [(65536, 1.02), (4096, 1.33), (1024, 5.0)])
def test_quantile_levels_go_with_every_part_so_that_small_ones_cost_more(part_size_bytes, expected):
    codec = Quantile8BitQuantization()
    count = codec.max_count(torch.float32, part_size_bytes)
    assert codec.encoded_nbytes(torch.float32, count) / count == pytest.approx(expected, abs=0.005)


def test_quantile_levels_without_a_table_where_it_would_be_too_coarse():
    peaks = DISTRIBUTIONS["two narrow peaks"](100_000, 5)
    assert fit_codebook(peaks).scale == 0
    assert fit_codebook(normal(100_000)).scale > 0
    assert fit_codebook(1000 + normal(100_000)).centre > 900


def test_sampling_does_not_fall_in_step_with_rows():
    """A matrix in which each 16th column is small: a stride of a power of two would see nothing else."""
    matrix = normal(1 << 20).view(-1, 1024)
    matrix[:, ::16] *= 1e-3
    assert rms(Quantile8BitQuantization(), matrix.reshape(-1)) < 0.007


def test_scaled_float16_of_values_whose_distance_is_beyond_float32():
    values = torch.full((10,), 3e38)
    values[3] = -3e38
    error = (there_and_back(ScaledFloat16Compression(), values).double() - values.double()).abs()
    assert error.max() <= 2**-11 * 3e38


def test_code_table_counts_the_borders_below():
    borders = torch.tensor([-3.0, -0.5, 0.0, 0.25, 7.0])
    table = code_table(borders.double().numpy())
    halves = torch.arange(65536).to(torch.uint16).view(torch.float16).float()
    finite = halves.isfinite()
    assert torch.equal(table[finite].int(), torch.bucketize(halves, borders)[finite].int())


def test_halfway_points_of_every_block_are_not_further_than_half_a_level():
    """Blockwise: the worst case of the bound, values between any two levels."""
    codec = BlockwiseQuantization()
    for peak in (1.0, 50.0):
        values = torch.linspace(-1, 1, 4096) * (1 if peak == 1 else 0.02)
        values[0] = peak
        error = (there_and_back(codec, values) - values).abs()
        assert bool((error <= error_bound(codec, values)).all())


@pytest.mark.parametrize("exponent", [-149, -140, -130, -120, -110, -100, -80, -60, -30, 0, 60, 120])
@pytest.mark.parametrize("peak", [1.0, 20.0])
def test_blocks_of_tiny_and_huge_values_keep_their_bound(exponent: int, peak: float):
    codec = BlockwiseQuantization()
    values = normal(4096).clamp(-3, 3).index_fill_(0, LAST, 3 * peak)
    values = torch.cat([(values.double() * 2.0**exponent).float(), torch.zeros(4096)])
    back = there_and_back(codec, values)
    error = (back.double() - values.double()).abs()
    assert bool((error <= error_bound(codec, values)).all())
    largest = values.abs().max().item()
    assert back.abs().max().item() == pytest.approx(largest, rel=2**-22, abs=2**-134)


def test_the_levels_of_tiny_values_are_those_of_others():
    codec = BlockwiseQuantization()
    values = normal(5000)
    small = there_and_back(codec, values * 2.0**-80) * 2.0**80
    assert torch.equal(small, there_and_back(codec, values))


def test_bounds_are_not_far_from_what_happens():
    """So that the tests above can fail."""
    values = normal(262_144)
    for codec in CODECS[1:]:
        error = (there_and_back(codec, values).double() - values.double()).abs()
        assert (error / error_bound(codec, values)).max() > 0.15
