"""What holds for every codec on the wire, whichever it is."""

from __future__ import annotations

import copy
import math
import pickle

import cloudpickle
import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from shoal.compression import (
    BFloat16Compression,
    BlockwiseQuantization,
    CompressionBase,
    CompressionInfo,
    Float16Compression,
    NoCompression,
    Quantile8BitQuantization,
    Quantization,
    ScaledFloat16Compression,
    TensorRole,
    Uniform8BitQuantization,
    deserialize_tensor,
    get_codec,
)
from shoal.compression.base import FLOATING_DTYPES, tensor_bytes
from shoal.compression.registry import CODECS as REGISTRY
from shoal.errors import InvalidValueError, ProtocolViolation

CODECS: list[CompressionBase] = [
    NoCompression(),
    Float16Compression(),
    BFloat16Compression(),
    ScaledFloat16Compression(),
    Uniform8BitQuantization(),
    Quantile8BitQuantization(),
    BlockwiseQuantization(),
]
REFUSES_NAN = (ScaledFloat16Compression, Quantization)
DTYPES = list(FLOATING_DTYPES.values())
COUNTS = [0, 1, 7, 257, 4097, 13_000]
codecs = pytest.mark.parametrize("codec", CODECS, ids=repr)
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)


def some_values(count: int, dtype: torch.dtype) -> torch.Tensor:
    return (torch.arange(count, dtype=torch.float64) * 0.37 % 11 - 5).to(dtype)


def bits(tensor: torch.Tensor) -> bytes:
    return bytes(tensor_bytes(tensor.contiguous()))


@codecs
@dtypes
@pytest.mark.parametrize("count", [1, 300])
def test_a_callers_tensor_of_any_strides_is_encoded_and_stays_resizable(codec, dtype, count):
    values = some_values(2 * count, dtype)[::2]
    assert deserialize_tensor(codec.compress(values)).shape == (count,)
    whole = some_values(count, dtype)
    codec.compress(whole)
    assert whole.untyped_storage().resizable()
    assert values.untyped_storage().resizable()


def there_and_back(codec: CompressionBase, values: torch.Tensor) -> torch.Tensor:
    return codec.decode(bytearray(codec.encode_checked(values)), values.dtype, len(values))


def test_every_codec_of_the_registry_is_tested():
    assert [type(codec) for codec in CODECS] == [type(get_codec(wire_id)) for wire_id in range(len(CODECS))]
    assert len(CODECS) not in REGISTRY


# Sizes


@codecs
@dtypes
@pytest.mark.parametrize("count", COUNTS)
def test_encoded_size_is_known_beforehand(codec, dtype, count):
    assert len(codec.encode(some_values(count, dtype))) == codec.encoded_nbytes(dtype, count)


@codecs
@dtypes
@settings(max_examples=15)
@given(st.lists(st.integers(0, 3_000_000), min_size=2, max_size=2).map(sorted))
def test_encoded_size_never_falls_and_grows_with_each_element(codec, dtype, counts):
    fewer, more = counts
    difference = codec.encoded_nbytes(dtype, more) - codec.encoded_nbytes(dtype, fewer)
    assert difference >= more - fewer


@codecs
@dtypes
@settings(max_examples=15)
@given(count=st.integers(0, 5000), error=st.integers(-8, 8).filter(bool))
def test_wrong_sizes_are_violations(codec, dtype, count, error):
    size = codec.encoded_nbytes(dtype, count) + error
    if size >= 0:
        with pytest.raises(ProtocolViolation, match=str(size)):
            codec.decode(bytes(size), dtype, count)


@codecs
@dtypes
@settings(max_examples=15)
@given(limit=st.integers(0, 2_000_000))
@example(524_288)
def test_max_count_is_the_largest_that_fits(codec, dtype, limit):
    count = codec.max_count(dtype, limit)
    assert codec.encoded_nbytes(dtype, count) <= limit
    assert codec.encoded_nbytes(dtype, count + 1) > limit


@codecs
@dtypes
def test_codecs_are_no_larger_than_the_tensor_at_the_usual_part_size(codec, dtype):
    ratio = codec.encoded_nbytes(dtype, 1 << 19) / (dtype.itemsize << 19)
    assert (
        ratio == 1
        if codec.is_raw(dtype)
        else ratio < 1.003 * (2 if codec.compression_type < 4 else 1) / dtype.itemsize
    )


# Values


@codecs
@dtypes
@pytest.mark.parametrize("count", COUNTS)
@pytest.mark.parametrize("writable", [False, True])
def test_decode_with_and_without_output(codec, dtype, count, writable):
    values = some_values(count, dtype)
    data = bytes(codec.encode(values))
    source = bytearray(data) if writable else data
    fresh = codec.decode(source, dtype, count)
    out = torch.full((count,), -1.0, dtype=dtype)
    assert codec.decode(source, dtype, count, out) is out
    assert fresh.dtype == dtype
    assert torch.equal(fresh, out)
    if codec.lossless(dtype):
        assert bits(fresh) == bits(values)
    else:
        torch.testing.assert_close(fresh, values, rtol=2**-7 if dtype == torch.bfloat16 else 2**-8, atol=0.04)


@codecs
@dtypes
def test_parts_at_any_address(codec, dtype):
    """Payloads of other peers, and slices of them, are not aligned."""
    values = some_values(5000, dtype)
    data = bytes(codec.encode(values))
    for offset in range(1, 4):
        source = memoryview(bytearray(bytes(offset) + data))[offset:]
        assert torch.equal(codec.decode(source, dtype, 5000), codec.decode(data, dtype, 5000))


@codecs
@dtypes
@pytest.mark.filterwarnings("ignore:The given NumPy array is not writable")
def test_input_is_neither_changed_nor_needed_to_be_writable(codec, dtype):
    memory = np.frombuffer(bits(some_values(5000, dtype)), dtype=np.uint8)
    assert not memory.flags.writeable
    values = torch.from_numpy(memory).view(dtype)
    before = bits(values)
    encoded = bytes(codec.encode(values))
    assert bits(values) == before
    assert bytes(codec.encode(some_values(5000, dtype))) == encoded


@codecs
@dtypes
def test_the_same_bits_give_the_same_encoding(codec, dtype):
    values = torch.randn(20_000, generator=torch.Generator().manual_seed(1)).to(dtype)
    assert bytes(codec.encode(values)) == bytes(codec.encode(values.clone()))


@codecs
@dtypes
def test_raw_parts_can_be_received_in_place(codec, dtype):
    values = some_values(10, dtype)
    if codec.is_raw(dtype):
        assert codec.lossless(dtype)
        out = torch.zeros(10, dtype=dtype)
        memory = tensor_bytes(out)
        memory[:] = codec.encode(values)
        assert bits(codec.decode(memory, dtype, 10, out)) == bits(values)
    else:
        assert not codec.lossless(dtype)


@codecs
@dtypes
@pytest.mark.parametrize("shape", [(), (0,), (3, 0, 2), (5,), (2, 3, 4)])
def test_whole_tensors_travel(codec, dtype, shape):
    tensor = some_values(math.prod(shape), dtype).reshape(shape)
    message = codec.compress(tensor, CompressionInfo.from_tensor(tensor, key="w", role=TensorRole.PARAMETER))
    back = deserialize_tensor(message)
    assert back.shape == tensor.shape
    assert back.dtype == dtype
    torch.testing.assert_close(back, tensor, rtol=0 if codec.lossless(dtype) else 2**-7, atol=0.05)


@codecs
def test_whole_tensors_of_any_strides_that_require_grad(codec):
    tensor = torch.randn(40, 60).t().requires_grad_()
    back = deserialize_tensor(codec.compress(tensor))
    torch.testing.assert_close(back, tensor.detach(), rtol=2**-7, atol=0.05)
    assert torch.equal(back, deserialize_tensor(codec.compress(tensor.detach().contiguous())))


@codecs
@dtypes
@settings(max_examples=15)
@given(data=st.data())
def test_finite_values_never_arrive_as_infinity_or_nan(codec, dtype, data):
    """From subnormal to the largest numbers, in any mixture."""
    info = torch.finfo(dtype)
    special = [
        0.0,
        -0.0,
        info.max,
        info.min,
        info.tiny,
        info.smallest_normal / 2,
        1.0,
        -1.0,
        65504.0,
        -65505.0,
        3e38,
        1e300,
    ]
    exact = st.sampled_from([value for value in special if abs(value) <= info.max])
    number = exact | st.floats(info.min, info.max, allow_nan=False)
    values = torch.tensor(data.draw(st.lists(number, min_size=1, max_size=300)), dtype=torch.float64).to(
        dtype
    )
    values = values.clamp(info.min, info.max)
    values = values.repeat(data.draw(st.sampled_from([1, 30])))
    assert bool(there_and_back(codec, values).isfinite().all())


@codecs
@dtypes
@pytest.mark.parametrize("count", [1, 300, 5000])
def test_infinities_are_clipped_nan_is_kept_or_refused(codec, dtype, count):
    values = some_values(count, dtype)
    values[0], values[-1] = math.inf, -math.inf
    if codec.is_raw(dtype):
        assert bits(there_and_back(codec, values)) == bits(values)
        return
    back = there_and_back(codec, values)
    assert bool(back.isfinite().all())
    if count > 1:
        assert back[0] > 1e4
    assert back[-1] < -1e4
    values[0] = math.nan
    if isinstance(codec, REFUSES_NAN):
        with pytest.raises(InvalidValueError, match=rf"NaN.*{type(codec).__name__}"):
            codec.encode(values)
    else:
        assert bool(there_and_back(codec, values).isnan()[0])


@codecs
@dtypes
@pytest.mark.parametrize("value", [0.0, -0.0, 1.0, -3.25, 1e-3, 60000.0, 5e-8])
@pytest.mark.parametrize("count", [1, 255, 5000])
def test_constant_tensors(codec, dtype, value, count):
    values = torch.full((count,), value, dtype=torch.float64).to(dtype)
    back = there_and_back(codec, values)
    assert bool((back == back[0]).all())
    if isinstance(codec, REFUSES_NAN):
        torch.testing.assert_close(back, values, rtol=2.0**-22, atol=0)
    else:
        torch.testing.assert_close(back, values, rtol=2.0**-8, atol=2.0**-25)


# What peers send


@codecs
@dtypes
@settings(max_examples=20)
@given(count=st.integers(0, 5000), seed=st.integers(0, 2**32), zeros=st.booleans())
def test_garbage_is_a_violation_or_values(codec, dtype, count, seed, zeros):
    generator = np.random.default_rng(seed)
    size = codec.encoded_nbytes(dtype, count)
    data = bytearray(generator.integers(0, 256, size, dtype=np.uint8).tobytes())
    if zeros:
        data[: size // 2] = bytes(size // 2)
    try:
        decoded = codec.decode(data, dtype, count)
    except ProtocolViolation:
        assert count
        return
    assert decoded.shape == (count,)
    if isinstance(codec, Quantization):
        assert bool(decoded.isfinite().all())


@codecs
def test_the_smallest_change_is_a_violation_or_values(codec):
    """One byte of what an honest peer sends, changed."""
    values = some_values(9000, torch.float32)
    data = bytearray(codec.encode(values))
    refused = 0
    for place in [*range(48), *range(len(data) - 24, len(data))]:
        for byte in (0x00, 0x7F, 0xFF):
            before, data[place] = data[place], byte
            try:
                decoded = codec.decode(data, torch.float32, 9000)
                assert decoded.shape == (9000,)
                assert not isinstance(codec, Quantization) or bool(decoded.isfinite().all())
            except ProtocolViolation:
                refused += 1
            data[place] = before
    assert refused > 0 or codec.compression_type < 3


# As objects


@codecs
def test_codecs_are_equal_by_class_and_can_be_sent_to_another_process(codec):
    for again in (
        pickle.loads(pickle.dumps(codec)),
        cloudpickle.loads(cloudpickle.dumps(codec)),
        copy.deepcopy(codec),
    ):
        assert again == codec
        assert hash(again) == hash(codec)
    others = [other for other in CODECS if other is not codec]
    assert codec not in others
    assert repr(codec) == f"{type(codec).__name__}()"
