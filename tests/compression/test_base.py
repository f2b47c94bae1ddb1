from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from shoal.compression import (
    CompressionBase,
    CompressionInfo,
    Float16Compression,
    NoCompression,
    SerializedTensor,
    TensorRole,
    deserialize_tensor,
    serialize_tensor,
)
from shoal.compression.base import FLOATING_DTYPES, tensor_bytes
from shoal.errors import InvalidTypeError, InvalidValueError, ProtocolViolation

CODECS: list[CompressionBase] = [NoCompression(), Float16Compression()]
DTYPES = list(FLOATING_DTYPES.values())
codecs = pytest.mark.parametrize("codec", CODECS, ids=repr)
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)


def some_values(count: int, dtype: torch.dtype) -> torch.Tensor:
    return (torch.arange(count, dtype=torch.float64) * 0.37 - 5).to(dtype)


def bits(tensor: torch.Tensor) -> bytes:
    return bytes(tensor_bytes(tensor.contiguous()))


# Conformance of every codec


@codecs
@dtypes
@pytest.mark.parametrize("count", [0, 1, 7, 1000])
def test_encoded_size_is_known_beforehand(codec, dtype, count):
    assert len(codec.encode(some_values(count, dtype))) == codec.encoded_nbytes(dtype, count)


@codecs
@dtypes
@pytest.mark.parametrize("count", [0, 1, 7, 1000])
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
        torch.testing.assert_close(fresh, values, rtol=2**-8 if dtype == torch.bfloat16 else 2**-11, atol=0)


@codecs
@dtypes
@given(count=st.integers(0, 100), error=st.integers(-8, 8).filter(bool))
def test_wrong_sizes_are_violations(codec, dtype, count, error):
    size = codec.encoded_nbytes(dtype, count) + error
    if size >= 0:
        with pytest.raises(ProtocolViolation, match=str(size)):
            codec.decode(bytes(size), dtype, count)


@codecs
@dtypes
@given(limit=st.integers(0, 10_000))
def test_max_count_is_the_largest_that_fits(codec, dtype, limit):
    count = codec.max_count(dtype, limit)
    assert codec.encoded_nbytes(dtype, count) <= limit
    assert codec.encoded_nbytes(dtype, count + 1) > limit


@codecs
@dtypes
def test_raw_parts_can_be_received_in_place(codec, dtype):
    values = some_values(10, dtype)
    if codec.is_raw(dtype):
        out = torch.zeros(10, dtype=dtype)
        memory = tensor_bytes(out)
        memory[:] = codec.encode(values)
        assert bits(codec.decode(memory, dtype, 10, out)) == bits(values)
    else:
        assert codec.encoded_nbytes(dtype, 10) != 10 * dtype.itemsize or not codec.lossless(dtype)


@codecs
@dtypes
@pytest.mark.parametrize("shape", [(), (0,), (3, 0, 2), (5,), (2, 3, 4)])
def test_whole_tensors_travel(codec, dtype, shape):
    tensor = some_values(math.prod(shape), dtype).reshape(shape)
    message = codec.compress(tensor, CompressionInfo.from_tensor(tensor, key="w", role=TensorRole.PARAMETER))
    back = deserialize_tensor(message)
    assert back.shape == tensor.shape
    assert back.dtype == dtype
    torch.testing.assert_close(back, tensor, rtol=0 if codec.lossless(dtype) else 2**-8, atol=0)


def test_whole_tensors_of_any_strides_that_require_grad():
    tensor = torch.randn(4, 6).t().requires_grad_()
    assert torch.equal(deserialize_tensor(serialize_tensor(tensor)), tensor.detach())


@pytest.mark.parametrize("tensor", [torch.zeros(2, dtype=torch.int32), torch.zeros(2, dtype=torch.complex64)])
def test_only_floating_tensors_are_compressed(tensor):
    with pytest.raises(InvalidTypeError, match="float32"):
        NoCompression().compress(tensor)


@pytest.mark.parametrize(
    "message",
    [
        SerializedTensor(77, "float32", (1,), b"1234"),
        SerializedTensor(0, "int8", (4,), b"1234"),
        SerializedTensor(0, "__class__", (4,), b"1234"),
        SerializedTensor(0, "float32", (2,), b"1234"),
        SerializedTensor(0, "float32", (-1, -1), b"1234"),
        SerializedTensor(0, "float32", (1,) * 65, b"1234"),
        SerializedTensor(0, "float32", (0, 1 << 63), b""),
        SerializedTensor(0, "float32", (0, 1 << 40, 1 << 40), b""),
        SerializedTensor(1, "float64", (1 << 40, 1 << 40), b"1234"),
        SerializedTensor(0, "float32", (100,), bytes(400)),
    ],
)
def test_hostile_messages_are_violations(message):
    with pytest.raises(ProtocolViolation):
        deserialize_tensor(message, max_elements=99)


@given(
    wire_id=st.integers(-2, 5),
    dtype=st.sampled_from([*FLOATING_DTYPES, "int64", ""]),
    shape=st.lists(st.integers(-1, 1 << 64) | st.integers(0, 4), max_size=4).map(tuple),
    data=st.binary(max_size=64),
)
def test_any_message_is_a_tensor_or_a_violation(wire_id, dtype, shape, data):
    try:
        tensor = deserialize_tensor(SerializedTensor(wire_id, dtype, shape, data))
    except ProtocolViolation:
        return
    assert tensor.shape == shape


# Particular to one codec


@dtypes
def test_no_compression_copies_nothing(dtype):
    values = some_values(5, dtype)
    codec = NoCompression()
    view = codec.encode(values)
    values.zero_()
    assert bytes(view) == bytes(5 * dtype.itemsize)
    buffer = bytearray(5 * dtype.itemsize)
    decoded = codec.decode(buffer, dtype, 5)
    decoded.fill_(1)
    assert any(buffer)


@dtypes
@given(data=st.binary(min_size=80, max_size=80))
def test_no_compression_keeps_every_bit(dtype, data):
    values = torch.frombuffer(bytearray(data), dtype=dtype)
    codec = NoCompression()
    assert bits(codec.decode(bytes(codec.encode(values)), dtype, len(values))) == data


def test_tensor_bytes_needs_contiguous_memory():
    with pytest.raises(InvalidValueError, match="contiguous"):
        tensor_bytes(torch.zeros(4, 4)[:, 0])


def test_estimated_ratio():
    info = CompressionInfo(shape=(10, 10), dtype=torch.float32)
    assert Float16Compression().estimate_compression_ratio(info) == 0.5
    assert NoCompression().estimate_compression_ratio(info.get_part(3, 20)) == 1
    assert Float16Compression().estimate_compression_ratio(CompressionInfo(shape=(0,))) == 1
