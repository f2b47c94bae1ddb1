from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from shoal.compression import (
    CompressionInfo,
    Float16Compression,
    NoCompression,
    SerializedTensor,
    base,
    deserialize_tensor,
)
from shoal.compression.base import FLOATING_DTYPES, tensor_bytes
from shoal.errors import InvalidTypeError, InvalidValueError, ProtocolViolation

DTYPES = list(FLOATING_DTYPES.values())
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)


def some_values(count: int, dtype: torch.dtype) -> torch.Tensor:
    return (torch.arange(count, dtype=torch.float64) * 0.37 - 5).to(dtype)


def bits(tensor: torch.Tensor) -> bytes:
    return bytes(tensor_bytes(tensor.contiguous()))


@pytest.mark.parametrize("tensor", [torch.zeros(2, dtype=torch.int32), torch.zeros(2, dtype=torch.complex64)])
def test_lossy_codecs_take_floating_tensors(tensor):
    with pytest.raises(InvalidTypeError, match="float32"):
        Float16Compression().compress(tensor)


@pytest.mark.parametrize(
    "message",
    [
        SerializedTensor(77, "float32", (1,), b"1234"),
        SerializedTensor(1, "int8", (4,), b"1234"),
        SerializedTensor(0, "qint8", (4,), b"1234"),
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
    wire_id=st.integers(-2, 8),
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


class Broken(NoCompression):
    """A user's codec with mistakes in it."""

    compression_type = 202

    def encode(self, part: torch.Tensor) -> memoryview:
        raise KeyError("no table")

    def _decode(
        self, data: memoryview, dtype: torch.dtype, count: int, out: torch.Tensor | None
    ) -> torch.Tensor:
        raise IndexError("no such code")


def test_whatever_a_users_codec_raises_is_told_as_its_own_mistake_or_that_of_the_bytes():
    with pytest.raises(InvalidValueError, match=r"could not encode: KeyError: 'no table'"):
        Broken().encode_checked(torch.zeros(2))
    with pytest.raises(ProtocolViolation, match="could not decode it: IndexError: no such code"):
        Broken().decode(bytes(8), torch.float32, 2)


@pytest.mark.parametrize("name", base.WHOLE_DTYPES)
def test_whole_tensors_of_other_dtypes_travel_without_compression(name):
    tensor = torch.arange(-3, 9).to(base.WHOLE_DTYPES[name]).reshape(3, 4).t()
    back = base.NoCompression().extract(base.NoCompression().compress(tensor))
    assert back.dtype == tensor.dtype
    assert torch.equal(back, tensor)
    if name not in base.FLOATING_DTYPES:
        with pytest.raises(InvalidTypeError, match="Float16Compression takes"):
            Float16Compression().compress(tensor)


def test_bytes_of_strangers_are_proper_bools():
    message = base.SerializedTensor(0, "bool", (3,), bytes([0, 1, 7]))
    assert base.NoCompression().extract(message).view(torch.uint8).tolist() == [0, 1, 1]


def test_requires_grad_is_kept():
    for codec in (base.NoCompression(), Float16Compression()):
        assert codec.extract(codec.compress(torch.ones(3, requires_grad=True))).requires_grad
        assert not codec.extract(codec.compress(torch.ones(3))).requires_grad
    lie = base.SerializedTensor(0, "int8", (1,), b"1", requires_grad=True)
    assert not base.NoCompression().extract(lie).requires_grad
