from __future__ import annotations

import pickle
import re

import numpy as np
import pytest
import torch

from shoal.compression import (
    AdaptiveCompressionBase,
    BlockwiseQuantization,
    CodecRegistry,
    CompressionBase,
    CompressionInfo,
    Float16Compression,
    NoCompression,
    PerTensorCompression,
    RoleAdaptiveCompression,
    SizeAdaptiveCompression,
    TensorRole,
    Uniform8BitQuantization,
    deserialize_tensor,
)
from shoal.errors import InvalidTypeError, InvalidValueError

NONE, HALF, EIGHT = NoCompression(), Float16Compression(), Uniform8BitQuantization()
ADAPTIVE: list[AdaptiveCompressionBase] = [
    SizeAdaptiveCompression(100, NONE, HALF),
    RoleAdaptiveCompression(gradient=EIGHT),
    PerTensorCompression([NONE, HALF]),
]
adaptive = pytest.mark.parametrize("codec", ADAPTIVE, ids=lambda codec: type(codec).__name__)


def info(
    *shape: int,
    key: object = 0,
    role: TensorRole = TensorRole.UNSPECIFIED,
    dtype: torch.dtype = torch.float32,
) -> CompressionInfo:
    return CompressionInfo(key=key, shape=shape, dtype=dtype, role=role)


def test_by_size_of_the_whole_tensor():
    codec = SizeAdaptiveCompression(threshold=np.int32(100), less=NONE, greater_equal=HALF)
    assert type(codec.threshold) is int
    assert codec.choose(info(99)) is NONE
    assert codec.choose(info(10, 10)) is HALF
    assert codec.choose(info(10, 10).get_part(0, 7)) is HALF
    assert codec.choose(info()) is NONE
    assert codec.choose(info(0)) is NONE
    assert SizeAdaptiveCompression(0, NONE, HALF).choose(info(0)) is HALF


def test_by_role():
    codec = RoleAdaptiveCompression(parameter=HALF, gradient=EIGHT, default=BlockwiseQuantization())
    assert codec.choose(info(role=TensorRole.PARAMETER)) is HALF
    assert codec.choose(info(role=TensorRole.GRADIENT)) is EIGHT
    for role in (TensorRole.OPTIMIZER, TensorRole.ACTIVATION, TensorRole.UNSPECIFIED):
        assert codec.choose(info(role=role)) == BlockwiseQuantization()
    assert (
        RoleAdaptiveCompression(activation=EIGHT).choose(info(role=TensorRole.OPTIMIZER)) == NoCompression()
    )
    with pytest.raises(TypeError):
        RoleAdaptiveCompression(HALF)  # type: ignore[misc]


def test_by_key():
    by_number = PerTensorCompression([NONE, HALF])
    assert by_number.choose(info(key=1)) is HALF
    by_name = PerTensorCompression({"weight": EIGHT, "bias": NONE})
    assert by_name.choose(info(key="weight")) is EIGHT


@pytest.mark.parametrize("key", [2, -1, None, "bias"])
def test_a_missing_key_is_named(key):
    with pytest.raises(InvalidValueError, match=rf"key {key!r}.* 2: 0, 1$"):
        PerTensorCompression([NONE, HALF]).choose(info(key=key))


def test_they_can_be_nested():
    codec = RoleAdaptiveCompression(
        gradient=SizeAdaptiveCompression(10, NONE, PerTensorCompression({"a": EIGHT, "b": HALF})),
        default=NONE,
    )
    assert codec.choose(info(100, key="a", role=TensorRole.GRADIENT)) is EIGHT
    assert codec.choose(info(100, key="b", role=TensorRole.GRADIENT)) is HALF
    assert codec.choose(info(9, key="c", role=TensorRole.GRADIENT)) is NONE
    assert codec.choose(info(100, key="c")) is NONE


def test_users_can_write_their_own():
    class ByDtype(AdaptiveCompressionBase):
        def choose_compression(self, info: CompressionInfo) -> CompressionBase:
            return NONE if info.dtype == torch.float64 else HALF

    assert ByDtype().choose(info(5, dtype=torch.float64)) is NONE
    assert ByDtype().choose(info(5)) is HALF


@pytest.mark.parametrize("choice", [None, "fp16", Float16Compression])
def test_a_choice_that_is_no_codec_is_named(choice):
    class Undecided(AdaptiveCompressionBase):
        def choose_compression(self, info: CompressionInfo) -> CompressionBase:
            return choice

    call = r"Undecided\.choose_compression\(CompressionInfo\(key=7, .*"
    says = rf"{call} must return a codec, .*, got {re.escape(repr(choice))}"
    with pytest.raises(InvalidTypeError, match=says):
        Undecided().choose(info(5, key=7))


@adaptive
def test_a_message_names_the_codec_that_was_chosen(codec):
    tensor = torch.randn(20, 20)
    description = CompressionInfo.from_tensor(tensor, key=1, role=TensorRole.GRADIENT)
    chosen = codec.choose(description)
    message = codec.compress(tensor, description)
    assert message.compression_type == chosen.compression_type
    assert torch.equal(codec.extract(message), deserialize_tensor(message))
    assert codec.estimate_compression_ratio(description) == chosen.estimate_compression_ratio(description)


@adaptive
def test_what_only_a_plain_codec_has_says_so(codec):
    for ask in (
        lambda: codec.compression_type,
        lambda: codec.encode(torch.zeros(1)),
        lambda: codec.encode_checked(torch.zeros(1)),
        lambda: codec.encoded_nbytes(torch.float32, 1),
        lambda: codec.max_count(torch.float32, 1),
        lambda: codec.decode(b"1234", torch.float32, 1),
        lambda: codec.lossless(torch.float32),
        lambda: codec.is_raw(torch.float32),
        lambda: CodecRegistry().register(codec),
    ):
        with pytest.raises(
            InvalidTypeError, match=rf"{type(codec).__name__} chooses another codec .* choose\(info\)"
        ):
            ask()


@adaptive
def test_as_objects(codec):
    again = pickle.loads(pickle.dumps(codec))
    assert again == codec
    assert hash(again) == hash(codec)
    assert codec not in [other for other in ADAPTIVE if other is not codec]
    assert eval(repr(codec)) == codec


def test_equal_only_if_configured_alike():
    assert SizeAdaptiveCompression(1, NONE, HALF) != SizeAdaptiveCompression(2, NONE, HALF)
    assert SizeAdaptiveCompression(1, NONE, HALF) == SizeAdaptiveCompression(
        1, NoCompression(), Float16Compression()
    )


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda: SizeAdaptiveCompression(2.5, NONE, HALF), "threshold must be a whole number, got 2.5"),
        (lambda: SizeAdaptiveCompression(True, NONE, HALF), "threshold must be a whole number, got True"),
        (lambda: SizeAdaptiveCompression(-1, NONE, HALF), "threshold must be at least 0 elements, got -1"),
        (lambda: SizeAdaptiveCompression(1, NoCompression, HALF), "less must be a codec, .*, got <class"),
        (lambda: SizeAdaptiveCompression(1, NONE, None), "greater_equal must be a codec, .*, got None"),
        (lambda: RoleAdaptiveCompression(gradient="fp16"), "gradient must be a codec, .*, got 'fp16'"),
        (lambda: RoleAdaptiveCompression(default=None), "default must be a codec, .*, got None"),
        (lambda: PerTensorCompression([NONE, 8]), r"tensor_compressions\[1\] must be a codec, .*, got 8"),
        (
            lambda: PerTensorCompression({"w": None}),
            r"tensor_compressions\['w'\] must be a codec, .*, got None",
        ),
        (
            lambda: PerTensorCompression(HALF),
            "tensor_compressions must be a sequence .*, got Float16Compression",
        ),
    ],
)
def test_bad_arguments_are_named(make, text):
    with pytest.raises((InvalidTypeError, InvalidValueError), match=text):
        make()
