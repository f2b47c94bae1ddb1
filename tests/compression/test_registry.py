from __future__ import annotations

import dataclasses
import functools
import math
import types
from collections import deque
from typing import Any

import numpy as np
import pytest
import torch

from shoal.compression import CodecRegistry, CompressionBase, Float16Compression, NoCompression, get_codec
from shoal.compression.registry import user_codecs
from shoal.errors import InvalidTypeError, InvalidValueError, ProtocolViolation
from shoal.runtime.pickling import dumps, loads


class Mine(NoCompression):
    compression_type = 64


class AlsoMine(NoCompression):
    compression_type = 64


class Reserved(NoCompression):
    compression_type = 63


class Impostor(NoCompression):
    """Inherits the wire id of NoCompression."""


class TooLarge(NoCompression):
    compression_type = 256


def test_builtin_ids_never_change():
    assert isinstance(get_codec(0), NoCompression)
    assert isinstance(get_codec(1), Float16Compression)


def test_unknown_ids_are_violations():
    for wire_id in (7, 63, 64, -1, 1 << 70):
        with pytest.raises(ProtocolViolation, match=f"unknown codec {wire_id}"):
            get_codec(wire_id)


def test_users_register_their_own():
    registry = CodecRegistry([NoCompression()])
    mine = Mine()
    assert 64 not in registry
    registry.register(mine)
    registry.register(Mine())
    registry.register(NoCompression())
    assert registry.codec(64) is mine
    assert 64 in registry


class Grid(NoCompression):
    compression_type = 66

    def __init__(self, step: Any) -> None:
        self.step = step


@dataclasses.dataclass
class Levels(NoCompression):
    """Its == raises: the tensors in it have no truth value."""

    levels: torch.Tensor
    compression_type = 67


@dataclasses.dataclass(slots=True)
class Table:
    rows: torch.Tensor


def attribute(number: int) -> list[Any]:
    """Settings that have no equality of their own, or one that raises."""
    holder = types.SimpleNamespace(value=torch.tensor([number]))
    return [
        torch.tensor([1.0, number]),
        np.array([1.0, number]),
        {"table": [torch.arange(number)]},
        lambda x: x + number,
        functools.partial(pow, torch.tensor([number])),
        Grid(torch.ones(number)),
        holder,
        torch.Generator().manual_seed(number),
        float("nan") if number == 1 else 0.0,
        torch.tensor([math.nan, number]),
        np.array([math.nan, number]),
        ["rows", (number, torch.tensor(number))],
        types.SimpleNamespace(value=torch.tensor([1, number])),
        deque([np.array([1, number])]),
        Levels(torch.tensor([1, number])),
        Table(torch.tensor([1, number])),
    ]


@pytest.mark.parametrize("index", range(16))
def test_codecs_are_equal_if_they_are_configured_alike_whatever_their_attributes_are(index: int):
    assert Grid(attribute(1)[index]) == Grid(attribute(1)[index])
    assert Grid(attribute(1)[index]) != Grid(attribute(2)[index])
    again = loads(dumps(Grid(attribute(1)[index])))
    assert again == Grid(attribute(1)[index])


def test_a_codec_may_refer_to_itself():
    class Holder:
        def __init__(self, codec: Grid) -> None:
            self.codec, self.itself = codec, self

    def made(step: float) -> Grid:
        codec = Grid(step)
        codec.method = codec.encode
        codec.holder = Holder(codec)
        return codec

    assert made(1.0) == made(1.0)
    assert made(1.0) != made(2.0)


def test_a_setting_that_cannot_be_compared_is_another_one():
    class Odd:
        def __eq__(self, other: object) -> bool:
            raise RuntimeError

    assert Grid(Odd()) != Grid(Odd())
    assert Grid(1.0) != NoCompression()
    assert Grid(1.0) != Grid("x")


def test_one_class_has_one_set_of_settings():
    registry = CodecRegistry([NoCompression()])
    registry.register(Grid(1.0))
    registry.register(Grid(1.0))
    with pytest.raises(
        InvalidValueError, match=r"Grid with step=0\.01, but Grid is registered with step=1\.0"
    ):
        registry.register(Grid(0.01))
    registry.check("compression", Grid(1.0))
    with pytest.raises(InvalidValueError, match=r"compression: Grid with step=0\.01, but Grid is registered"):
        registry.check("compression", Grid(0.01))
    with pytest.raises(InvalidValueError, match="compression: Mine is not registered"):
        registry.check("compression", Mine())
    with pytest.raises(InvalidValueError, match="compression: Impostor is not registered"):
        registry.check("compression", Impostor())


class Counting(Grid):
    """Its attributes change in use."""

    compression_type = 68
    _table: torch.Tensor | None = None

    def __init__(self, step: float) -> None:
        super().__init__(step)
        self.uses = 0

    def use(self) -> Counting:
        self._table = torch.arange(3)
        self.uses += 1
        return self


def test_attributes_with_an_underscore_are_no_settings():
    used = Counting(1.0).use()
    used.uses = 0
    assert used == Counting(1.0)
    registry = CodecRegistry()
    registry.register(used)
    registry.register(Counting(1.0))
    registry.check("compression", Counting(1.0))
    other = Levels(torch.arange(3))
    other._cache = 1
    registry.register(Levels(torch.arange(3)))
    registry.register(other)
    with pytest.raises(InvalidValueError, match=r"Counting with step=2\.0, uses=1, but"):
        registry.register(Counting(2.0).use())


def test_what_follows_another_registry_keeps_the_object_that_is_in_use():
    """The background process is sent all codecs of the host with each averager."""
    followed = CodecRegistry([NoCompression()])
    sent = dumps((Counting(1.0), Levels(torch.arange(3))))
    first, levels = loads(sent)
    followed.adopt(first)
    followed.adopt(levels)
    first.use()
    for codec in loads(sent):
        followed.adopt(codec)
    assert followed.user_codecs() == (levels, first)
    assert followed.codec(68) is first
    with pytest.raises(InvalidValueError, match="is taken by Counting"):
        followed.adopt(type("Other", (Mine,), {"compression_type": 68})())


@pytest.mark.parametrize("codec", [Reserved(), TooLarge(), Impostor(), AlsoMine()], ids=repr)
def test_bad_and_taken_ids(codec):
    registry = CodecRegistry([NoCompression()])
    registry.register(Mine())
    with pytest.raises(InvalidValueError, match=type(codec).__name__):
        registry.register(codec)


def test_only_codec_objects():
    with pytest.raises(InvalidTypeError, match="CompressionBase object"):
        CodecRegistry().register(Mine)  # type: ignore[arg-type]


def test_codecs_of_users_are_listed_in_the_order_of_their_ids():
    class Later(Mine):
        compression_type = 65

    registry = CodecRegistry([NoCompression(), Float16Compression()])
    assert registry.user_codecs() == ()
    later, mine = Later(), Mine()
    registry.register(later)
    registry.register(mine)
    assert registry.user_codecs() == (mine, later)


def test_a_class_that_is_defined_again_takes_the_place_of_the_former_one():
    """Cells of a notebook are run more than once."""

    def cell() -> NoCompression:
        class Mine(NoCompression):
            compression_type = 64

        return Mine()

    registry = CodecRegistry([NoCompression()])
    first, second = cell(), cell()
    registry.register(first)
    registry.register(second)
    assert registry.codec(64) is second


class Halves(NoCompression):
    """A user's codec, with mistakes that can be switched on."""

    compression_type = 99
    too_long = 0
    decodes_too_much = False
    size = 2

    def lossless(self, dtype):
        return False

    def is_raw(self, dtype):
        return False

    def encoded_nbytes(self, dtype, count):
        return self.size * count

    def encode(self, part):
        return memoryview(part.to(torch.float16).numpy().tobytes() + bytes(self.too_long))

    def _decode(self, data, dtype, count, out):
        values = torch.frombuffer(bytearray(data), dtype=torch.float16).to(dtype)
        return values.repeat(2) if self.decodes_too_much else values


def test_a_codec_of_a_user_works_like_the_others():
    codec = Halves()
    assert codec.max_count(torch.float32, 7) == 3
    assert codec.decode(codec.encode_checked(torch.ones(3)), torch.float32, 3).tolist() == [1] * 3
    assert CodecRegistry([codec]).user_codecs() == (Halves(),)
    assert all(known.compression_type >= 64 for known in user_codecs())


@pytest.mark.parametrize(
    ("mistake", "value", "text"),
    [
        (
            "too_long",
            1,
            r"Halves\(\).encode made 7 bytes of 3 elements of float32, but its encoded_nbytes says 6",
        ),
        (
            "decodes_too_much",
            True,
            r"Halves\(\)._decode made torch.float32 \[6\] where torch.float32 \[3\] was due",
        ),
        ("size", 0, r"Halves\(\).encoded_nbytes must grow"),
    ],
)
def test_mistakes_of_a_users_codec_name_it(monkeypatch, mistake, value, text):
    def use(codec: CompressionBase) -> None:
        codec.max_count(torch.float32, 100)
        codec.decode(codec.encode_checked(torch.ones(3)), torch.float32, 3)

    monkeypatch.setattr(Halves, mistake, value)
    with pytest.raises(InvalidValueError, match=text):
        use(Halves())


def test_whole_tensors_are_checked_at_their_sender_too(monkeypatch):
    monkeypatch.setattr(Halves, "too_long", 1)
    with pytest.raises(InvalidValueError, match="Halves"):
        Halves().compress(torch.ones(3))


def test_codecs_of_users_can_be_sent_to_the_background_process_by_value():
    class Local(Halves):
        compression_type = 98

    again = loads(dumps((Local(), Halves())))
    assert [codec.compression_type for codec in again] == [98, 99]
    assert again[1] == Halves()
    assert again[0].decode(again[0].encode_checked(torch.ones(3)), torch.float32, 3).tolist() == [1] * 3
