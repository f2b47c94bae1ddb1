"""Elements as numpy sees them are those that torch sees."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from shoal.averaging.codec_formats import CodecFormat, format_by
from shoal.averaging.elements import elements_in, empty, is_finite, largest, narrow, widen
from shoal.averaging.formats import _NAMES, PlainFormat, codec_name, format_of
from shoal.compression import Float16Compression, NoCompression
from shoal.compression.base import tensor_bytes
from shoal.compression.registry import CODECS
from shoal.errors import ProtocolViolation
from shoal.utils.dtypes import AVERAGED, FLOAT16, FLOAT32, FLOAT64, DType

dtypes = pytest.mark.parametrize("dtype", AVERAGED.values(), ids=str)


def some_values(dtype: DType) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    values = torch.randn(1000, generator=generator, dtype=torch.float64).exp() * 1e-3
    return values.to(dtype.torch_dtype)


@dtypes
def test_the_largest_number_is_that_of_torch(dtype: DType):
    assert largest(dtype) == torch.finfo(dtype.torch_dtype).max


@pytest.mark.parametrize(
    ("dtype", "wide"),
    [
        (dtype, wide)
        for dtype in AVERAGED.values()
        for wide in (FLOAT32, FLOAT64)
        if dtype.itemsize <= wide.itemsize
    ],
    ids=str,
)
def test_widening_is_exact_and_narrowing_comes_back(dtype: DType, wide: DType):
    values = some_values(dtype)
    widened, back = empty(wide, len(values)), empty(dtype, len(values))
    widen(elements_in(tensor_bytes(values), dtype), dtype, widened)
    assert widened.tolist() == values.tolist()
    narrow(widened, dtype, back)
    assert bytes(back.data) == bytes(tensor_bytes(values))


@dtypes
def test_narrowing_rounds_as_torch_does(dtype: DType):
    values = some_values(FLOAT64)
    narrowed = empty(dtype, len(values))
    narrow(values.numpy(), dtype, narrowed)
    assert bytes(narrowed.data) == bytes(tensor_bytes(values.to(dtype.torch_dtype)))


@dtypes
@pytest.mark.parametrize("count", [1, 1000, (1 << 16) + 1])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_one_value_that_is_not_finite_is_found_wherever_it_is(dtype: DType, count: int, bad: float):
    extremes = torch.full((count,), largest(dtype), dtype=torch.float64).to(dtype.torch_dtype)
    for values in (extremes, -extremes, torch.zeros_like(extremes)):
        assert is_finite(elements_in(tensor_bytes(values), dtype), dtype)
        values[-1] = bad
        assert not is_finite(elements_in(tensor_bytes(values), dtype), dtype)
    assert is_finite(empty(dtype, 0), dtype)


@dtypes
def test_values_whose_sum_overflows_are_finite_and_infinities_that_cancel_are_not(dtype: DType):
    most = torch.finfo(dtype.torch_dtype).max
    for values, expected in (([most] * 3, True), ([-most, -most], True), ([math.inf, -math.inf], False)):
        found = is_finite(
            elements_in(tensor_bytes(torch.tensor(values, dtype=dtype.torch_dtype)), dtype), dtype
        )
        assert found is expected


@dtypes
def test_plain_elements_travel_as_their_memory(dtype: DType):
    values = some_values(dtype)
    form = format_of(dtype, 0)
    assert form == PlainFormat(dtype) == format_by(dtype, NoCompression())
    data = form.encode(elements_in(tensor_bytes(values), dtype))
    assert bytes(data) == bytes(tensor_bytes(values))
    assert len(data) == form.encoded_nbytes(1000)
    out = empty(dtype, 1000)
    assert form.decode(data, 1000, out) is out
    assert out.data == form.decode(data, 1000).data == data.cast("B").cast(out.data.format)
    assert form.max_count(7) == 7 // dtype.itemsize
    for wrong in (data[:-1], bytes(data) + b"!"):
        with pytest.raises(ProtocolViolation, match="1000 elements of"):
            form.decode(wrong, 1000)


@dtypes
def test_a_codec_does_the_same_to_elements_as_to_a_tensor(dtype: DType):
    codec, values = Float16Compression(), some_values(dtype)
    form = CodecFormat(dtype, codec)
    data = form.encode(elements_in(tensor_bytes(values), dtype))
    expected = codec.decode(bytes(codec.encode(values)), dtype.torch_dtype, 1000)
    assert bytes(form.decode(data, 1000).data) == bytes(tensor_bytes(expected))
    out = empty(dtype, 1000)
    assert form.decode(data, 1000, out) is out
    assert bytes(out.data) == bytes(tensor_bytes(expected))
    assert (form.is_raw, form.is_lossless) == (dtype == FLOAT16, dtype == FLOAT16)
    assert form.max_count(21) == codec.max_count(dtype.torch_dtype, 21)


def test_what_a_codec_gives_back_is_read_by_its_values_not_by_its_memory():
    class Negated(NoCompression):
        compression_type = 98

        def _decode(self, data, dtype, count, out):
            return torch._neg_view(super()._decode(data, dtype, count, None))

    form = CodecFormat(FLOAT32, Negated())
    assert form.decode(form.encode(np.ones(3, np.float32)), 3).tolist() == [-1, -1, -1]


def test_codecs_of_users_that_inherit_are_no_plain_ones():
    class Own(NoCompression):
        compression_type = 99

    assert not format_by(FLOAT32, Own()).is_plain


def test_ids_that_nobody_knows():
    with pytest.raises(ProtocolViolation, match="unknown codec 200"):
        format_of(FLOAT32, 200)


def test_names_of_codecs_are_those_of_the_registry(monkeypatch: pytest.MonkeyPatch):
    assert {number: type(codec).__name__ for number, codec in CODECS._codecs.items() if number < 64} == _NAMES
    assert codec_name(200) is None

    class Own(NoCompression):
        compression_type = 99

    monkeypatch.setitem(CODECS._codecs, 99, Own())
    assert codec_name(99) == "Own"
    monkeypatch.delitem(__import__("sys").modules, "shoal.compression.registry")
    assert (codec_name(99), codec_name(1)) == (None, "Float16Compression")


def test_arrays_are_views():
    memory = bytearray(16)
    elements_in(memory, FLOAT32, 2, 8)[:] = 1
    assert np.frombuffer(memory, np.float32).tolist() == [0, 0, 1, 1]
