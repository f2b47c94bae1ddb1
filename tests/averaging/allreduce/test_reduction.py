from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from shoal.averaging import elements
from shoal.averaging.allreduce import reduction
from shoal.averaging.allreduce.reduction import (
    CHUNK_NBYTES,
    OutOfRangeError,
    encode_difference,
)
from shoal.averaging.codec_formats import CodecFormat
from shoal.averaging.elements import elements_in
from shoal.compression import CompressionBase, Float16Compression, ScaledFloat16Compression
from shoal.compression.base import FLOATING_DTYPES, tensor_bytes
from shoal.errors import InvalidValueError
from shoal.utils.dtypes import dtype_of

CHUNK = CHUNK_NBYTES // 4
"""Elements of a sum in float32 that are worked on at a time."""

DTYPES = list(FLOATING_DTYPES.values())
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)


def of(tensor):
    """The elements of a tensor, in its own memory."""
    data = tensor_bytes(tensor)
    return elements_in(data, dtype_of(tensor)) if len(data) else elements.empty(dtype_of(tensor), 0)


def reduce_part(parts, weights, out):
    assert (
        reduction.reduce_part([of(part) for part in parts], weights, target := of(out), dtype_of(out))
        is target
    )
    return out


def reduce_wide(parts, weights, out):
    reduction.reduce_wide([of(part) for part in parts], weights, of(out), dtype_of(out))
    return out


def apply_difference(local, difference, out):
    reduction.apply_difference(of(local), of(difference), of(out), dtype_of(out))
    return out


def differences(codec: CompressionBase, average, decoded):
    return encode_difference(CodecFormat(dtype_of(average), codec), of(average), of(decoded))


def is_finite(part):
    """In pieces, and in one go: both say the same."""
    result = elements.is_finite(of(part), dtype_of(part))
    assert elements.is_finite(of(part), dtype_of(part), at_once=max(1, len(part))) == result
    return result


def exact(parts, weights):
    """The average in float64, and the mean of the absolute inputs."""
    wide = torch.stack([part.double() for part in parts])
    w = torch.tensor(weights, dtype=torch.float64).unsqueeze(1)
    return (wide * w).sum(0) / w.sum(), wide.abs().mean(0)


def reduced(parts, weights):
    return reduce_part(parts, weights, torch.full_like(parts[0], math.nan))


def random_parts(seed, senders, count, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(count, generator=generator, dtype=torch.float64).to(dtype) for _ in range(senders)]


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**32),
    weights=st.lists(st.floats(1e-3, 1e3), min_size=1, max_size=16)
    | st.integers(1, 24).map(lambda n: [1.0] * n),
    exponent=st.integers(-30, 30),
)
def test_float32_is_exact_to_a_millionth_of_the_mean_input_at_every_element(seed, weights, exponent):
    parts = [part * 2.0**exponent for part in random_parts(seed, len(weights), 2000)]
    expected, mean_input = exact(parts, weights)
    error = (reduced(parts, weights).double() - expected).abs()
    assert bool((error <= 1e-6 * mean_input).all())


def test_exact_even_where_one_input_is_all_of_the_result():
    # The worst case for the bound: the heaviest of 16 senders alone has large values. Sums in float32 fail here.
    parts = random_parts(1, 16, 100_000)
    parts[0] *= 1e4
    weights = [997.1] + [0.0013 * (i + 1) for i in range(15)]
    expected, mean_input = exact(parts, weights)
    error = (reduced(parts, weights).double() - expected).abs()
    assert bool((error <= 1e-6 * mean_input).all())


@dtypes
@pytest.mark.parametrize("weights", [[1, 1], [1, 1, 1], [0.5, 2, 30], [3]])
def test_result_is_within_one_rounding_of_the_dtype(dtype, weights):
    parts = random_parts(2, len(weights), 1000, dtype)
    expected, mean_input = exact(parts, weights)
    relative = {torch.float16: 2**-11, torch.bfloat16: 2**-8, torch.float32: 1e-6, torch.float64: 1e-14}[
        dtype
    ]
    error = (reduced(parts, weights).double() - expected).abs()
    assert bool(
        (error <= relative * expected.abs() + 1e-6 * (dtype != torch.float64) * mean_input + 1e-14).all()
    )


def test_two_equal_weights_are_the_correctly_rounded_mean():
    first, second = random_parts(3, 2, 1000)
    assert torch.equal(reduced([first, second], [0.3, 0.3]), ((first.double() + second.double()) / 2).float())


@dtypes
@pytest.mark.parametrize("weights", [[1, 1, 1], [0.1, 7, 1], [3, 0, 3]])
def test_chunks_do_not_matter(dtype, weights):
    parts = random_parts(4, 3, 2 * CHUNK + 5, dtype)
    whole = reduced(parts, weights)
    edge = CHUNK + 3
    pieces = [reduced([part[a:b].clone() for part in parts], weights) for a, b in ((0, edge), (edge, None))]
    assert bytes(tensor_bytes(torch.cat(pieces))) == bytes(tensor_bytes(whole))


def test_operations_round_once_so_that_every_machine_gets_the_same_bits():
    parts, weights = random_parts(5, 3, 10_000), [1.0, 1.0, 1.0]
    by_numpy = ((parts[0].numpy() + parts[1].numpy()) + parts[2].numpy()) / 3
    assert torch.equal(reduced(parts, weights), torch.from_numpy(by_numpy))
    weights = [4.0, 1.7, 0.3]
    wide = [part.double().numpy() for part in parts]
    total = (wide[0] + wide[1] * (1.7 / 4)) + wide[2] * (0.3 / 4)
    divisor = math.fsum([1.0, 1.7 / 4, 0.3 / 4])
    assert torch.equal(reduced(parts, weights), torch.from_numpy(total * (1 / divisor)).float())


@dtypes
@pytest.mark.parametrize("position", [0, 1, 2])
@pytest.mark.parametrize("weights", [[1, 1, 1], [0.1, 7, 1]])
def test_output_may_be_an_input(dtype, position, weights):
    parts = random_parts(6, 3, CHUNK + 7, dtype)
    expected = reduced(parts, weights)
    assert torch.equal(reduce_part(parts, weights, parts[position]), expected)


@dtypes
def test_one_sender(dtype):
    (part,) = random_parts(7, 1, 100, dtype)
    assert torch.equal(reduced([part], [0.37]), part)


def test_inputs_stay():
    parts = random_parts(8, 3, 100)
    copies = [part.clone() for part in parts]
    reduced(parts, [1, 2, 3])
    assert all(torch.equal(part, copy) for part, copy in zip(parts, copies, strict=True))


def test_weight_zero_is_left_out():
    parts = [torch.ones(3), torch.full((3,), math.nan), torch.full((3,), 3.0)]
    assert reduced(parts, [1, 0, 1]).tolist() == [2.0] * 3


def test_large_and_small_weights_neither_overflow_nor_vanish():
    parts = [torch.full((2,), 1e38), torch.full((2,), 1e38)]
    assert reduced(parts, [1e300, 1e300]).isfinite().all()
    assert torch.equal(reduced(parts, [1e-300, 1e-300]), parts[0])


@dtypes
@pytest.mark.parametrize("weights", [[1.0] * 5, [4.0, 0.0, 1.7, 0.3, 1e-300]])
def test_where_a_sum_overflows_the_average_is_still_that_of_the_values(dtype, weights):
    largest = torch.finfo(dtype).max
    parts = [part.clamp_(-1, 1) * largest for part in random_parts(11, 5, CHUNK + 9, dtype)]
    for part in parts:
        part[-2:] = largest
    by_shares = sum(
        part.double() * (weight / sum(weights)) for part, weight in zip(parts, weights, strict=True)
    )
    result = reduce_wide(parts, weights, torch.full_like(parts[0], math.nan))
    assert result.isfinite().all()
    assert result[-1] >= (1 - 2 * torch.finfo(dtype).eps) * largest
    bound = torch.finfo(dtype).eps * largest
    assert (result.double() - by_shares.clamp(-largest, largest)).abs().max() <= bound


@dtypes
def test_a_wide_average_is_that_of_the_usual_sum(dtype):
    parts = random_parts(12, 3, 1000, dtype)
    wide = reduce_wide(parts, [1.0, 2.0, 0.5], torch.empty_like(parts[0]))
    assert torch.allclose(wide, reduced(parts, [1.0, 2.0, 0.5]), rtol=2 * torch.finfo(dtype).eps, atol=1e-7)


@dtypes
def test_empty_part(dtype):
    assert reduced([torch.empty(0, dtype=dtype)] * 2, [1, 2]).numel() == 0


@pytest.mark.parametrize("weights", [[0, 0], [1, -1], [1, math.nan], [1, math.inf], [1]])
def test_bad_weights(weights):
    with pytest.raises(InvalidValueError, match="weight"):
        reduce_part([torch.zeros(1)] * 2, weights, torch.zeros(1))


@dtypes
def test_is_finite(dtype):
    part = torch.ones(1000, dtype=dtype)
    assert is_finite(part)
    for bad in (math.nan, math.inf, -math.inf):
        part[777] = bad
        assert not is_finite(part)
    part[3], part[777] = math.inf, -math.inf
    assert not is_finite(part)


@dtypes
def test_is_finite_when_the_sum_overflows(dtype):
    assert is_finite(torch.full((1000,), torch.finfo(dtype).max, dtype=dtype))
    assert is_finite(torch.empty(0, dtype=dtype))


def test_differences_keep_the_mean_where_decoded_averages_lose_it():
    codec = Float16Compression()
    exact_parts = [part + 1000 for part in random_parts(9, 4, 1000)]  # a common offset: fp16 keeps few digits
    weights = [1.0] * 4
    decoded = [codec.decode(bytes(codec.encode(part)), torch.float32, 1000) for part in exact_parts]
    average = reduced(decoded, weights)
    results = []
    for part, seen in zip(exact_parts, decoded, strict=True):
        difference = codec.decode(differences(codec, average, seen), torch.float32, 1000)
        results.append(apply_difference(part, difference, torch.empty(1000)))
    mean_before, mean_after = exact(exact_parts, weights)[0], exact(results, weights)[0]
    assert (mean_after - mean_before).abs().max() < 1e-3
    naive = codec.decode(bytes(codec.encode(average)), torch.float32, 1000).double()
    assert (naive - mean_before).abs().max() > 0.1
    # each member is as near to the average as the codec sees its part
    assert all((result - average).abs().max() < 0.6 for result in results)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_a_difference_that_the_dtype_cannot_hold_is_an_error_and_not_a_wrong_average(dtype):
    large = torch.full((8,), 0.9 * torch.finfo(dtype).max, dtype=dtype)
    with pytest.raises(OutOfRangeError, match=f"further from the average than {dtype_of(large)} reaches"):
        differences(ScaledFloat16Compression(), large, -large)


@dtypes
def test_apply_difference_in_place(dtype):
    local, difference = random_parts(10, 2, 50, dtype)
    expected = local + difference
    apply_difference(local, difference, difference)
    assert torch.equal(difference, expected)


@dtypes
def test_apply_difference_stays_in_the_range_of_the_dtype(dtype):
    largest = torch.finfo(dtype).max
    local, difference = torch.full((3,), largest, dtype=dtype), torch.full((3,), largest / 2, dtype=dtype)
    assert apply_difference(local, difference, torch.empty(3, dtype=dtype)).tolist() == [largest] * 3
    difference[1] = math.inf
    assert not is_finite(apply_difference(local, difference, torch.empty(3, dtype=dtype)))
