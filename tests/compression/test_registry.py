from __future__ import annotations

import dataclasses
from collections.abc import Callable
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


class Curve(Grid):
    """Has a setting that cannot be compared, and says itself what makes it equal."""

    compression_type = 69

    def __init__(self, power: int) -> None:
        self.power = power
        self.function = lambda x: x**power

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Curve) and self.power == other.power

    def __hash__(self) -> int:
        return hash(self.power)


SETTINGS = {
    "number": lambda number: 0.5 * number,
    "text": lambda number: f"level {number}",
    "tuple": lambda number: ("rows", (number, 2)),
    "tensor": lambda number: torch.tensor([1.0, number]),
    "array": lambda number: np.array([1.0, number]),
    "length": torch.ones,
    "dtype": lambda number: torch.ones(1, dtype=[torch.float32, torch.float64][number - 1]),
    "array dtype": lambda number: np.ones(1, dtype=[np.float32, np.float64][number - 1]),
    "codec": Grid,
}


@pytest.mark.parametrize("make", SETTINGS.values(), ids=SETTINGS)
def test_codecs_with_equal_settings_are_equal(make: Callable[[int], Any]):
    assert Grid(make(1)) == Grid(make(1))
    assert hash(Grid(make(1))) == hash(Grid(make(1)))
    assert Grid(make(1)) != Grid(make(2))
    assert loads(dumps(Grid(make(1)))) == Grid(make(1))


def test_codecs_of_two_classes_are_not_equal():
    assert NoCompression() == NoCompression()
    assert NoCompression() != Mine()
    assert Grid(1.0) != NoCompression()


def test_a_setting_that_only_one_of_two_has_counts():
    more = Grid(1.0)
    more.offset = 0
    assert more != Grid(1.0)
    assert Grid(1.0) != more


def test_a_codec_may_define_its_own_equality():
    registry = CodecRegistry([Curve(2)])
    registry.register(Curve(2))
    registry.check("compression", Curve(2))
    with pytest.raises(
        InvalidValueError, match=r"compression must be equal to Curve\(power=2, .* got Curve\(power=3"
    ):
        registry.check("compression", Curve(3))


def test_settings_that_cannot_be_compared_need_an_equality():
    """A function is equal to itself alone, and the == of a list or a dataclass with tensors raises."""
    for make, text in [
        (lambda: Grid(lambda x: x), "if both do the same, define __eq__ and __hash__ in Grid"),
        (lambda: Grid([torch.ones(2)]), "whose == raises RuntimeError: .*define __eq__ and __hash__ in Grid"),
        (
            lambda: Levels(torch.ones(2)),
            "whose == raises RuntimeError: .*define __eq__ and __hash__ in Levels",
        ),
    ]:
        codec = make()
        registry = CodecRegistry([codec])
        registry.register(codec)
        registry.check("compression", codec)
        with pytest.raises(InvalidValueError, match=f"(?i)codec must be .*{text}"):
            registry.register(make())
        with pytest.raises(InvalidValueError, match=f"(?i)compression must be .*{text}"):
            registry.check("compression", make())


def test_one_class_has_one_set_of_settings():
    registry = CodecRegistry([NoCompression()])
    registry.register(Grid(1.0))
    registry.register(Grid(1.0))
    with pytest.raises(
        InvalidValueError, match=r"codec must be equal to Grid\(step=1\.0\).*got Grid\(step=0\.01\)"
    ):
        registry.register(Grid(0.01))
    registry.check("compression", Grid(1.0))
    with pytest.raises(
        InvalidValueError, match=r"compression must be equal to Grid\(step=1\.0\).*got Grid\(step=0\.01\)"
    ):
        registry.check("compression", Grid(0.01))
    with pytest.raises(InvalidValueError, match=r"compression must be a registered codec, got Mine\(\)"):
        registry.check("compression", Mine())
    with pytest.raises(InvalidValueError, match=r"compression must be a registered codec, got Impostor\(\)"):
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
    with pytest.raises(InvalidValueError, match=r"got Counting\(step=2\.0, uses=1\)"):
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
    with pytest.raises(InvalidValueError, match="got 68, that of Counting"):
        followed.adopt(type("Other", (Mine,), {"compression_type": 68})())


@pytest.mark.parametrize("codec", [Reserved(), TooLarge(), Impostor(), AlsoMine()], ids=repr)
def test_bad_and_taken_ids(codec):
    registry = CodecRegistry([NoCompression()])
    registry.register(Mine())
    with pytest.raises(InvalidValueError, match=type(codec).__name__):
        registry.register(codec)


def test_only_codec_objects():
    with pytest.raises(InvalidTypeError, match="codec must be an object of a CompressionBase subclass"):
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
            r"Halves\(\).encode must make 6 bytes of 3 elements of float32, .*, got 7",
        ),
        (
            "decodes_too_much",
            True,
            r"Halves\(\)._decode must make torch.float32 \[3\], got torch.float32 \[6\]",
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
