from __future__ import annotations

import contextlib
import datetime
import enum
import math
from typing import Any, NamedTuple

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shoal.errors import InvalidTypeError, InvalidValueError
from shoal.utils.serializer import MAX_DEPTH, MSGPackSerializer

dumps, loads = MSGPackSerializer.dumps, MSGPackSerializer.loads

scalars = (
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**64 - 1)
    | st.floats(allow_nan=False)
    | st.text(max_size=20)
    | st.binary(max_size=20)
)
keys = st.recursive(scalars, lambda inner: st.lists(inner, max_size=3).map(tuple), max_leaves=4)
values = st.recursive(
    scalars,
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.lists(inner, max_size=4).map(tuple)
        | st.dictionaries(keys, inner, max_size=4)
    ),
    max_leaves=12,
)


def typed(value: Any) -> Any:
    """The value with its types, so that 1, 1.0 and True, or a list and a tuple, differ."""
    if isinstance(value, dict):
        return dict, sorted(((repr(typed(k)), typed(v)) for k, v in value.items()), key=repr)
    if isinstance(value, list | tuple):
        return type(value), [typed(item) for item in value]
    return type(value), value


@given(values)
def test_values_keep_their_types(value: Any) -> None:
    assert typed(loads(dumps(value))) == typed(value)


def test_many_tuple_keys() -> None:
    for size in (15, 16, 4096):
        value = {(i, "x"): (i,) for i in range(size)}
        assert loads(dumps(value)) == value


def test_nan_and_aware_datetimes() -> None:
    assert math.isnan(loads(dumps(math.nan)))
    moment = datetime.datetime(2024, 5, 6, 7, 8, 9, 1000, tzinfo=datetime.UTC)
    assert loads(dumps([moment])) == [moment]


@settings(max_examples=300)
@given(st.binary(max_size=60) | values.map(lambda v: dumps(v)[:-1]))
def test_hostile_bytes_raise_only_invalid_value(data: bytes) -> None:
    with contextlib.suppress(InvalidValueError):
        loads(data)


def nested_ext(depth: int) -> bytes:
    data = b"\x90"
    for _ in range(depth):
        data = b"\xc9" + len(data).to_bytes(4, "big") + b"\x40" + data
        data = b"\x91" + data
    return data


@pytest.mark.parametrize(
    "data",
    [
        b"\x91" * 100_000,
        b"\x81\x01" * 50_000,
        nested_ext(500),
        b"\xdd\xff\xff\xff\xff",
        b"\xd4\x40\x01",  # a tuple that is an int
        b"\xd4\x05\x00",  # an extension nobody registered
        b"\x81\x81\x01\x01\x01",  # a dictionary as a key
        b"",
        b"\x01\x02",
    ],
)
def test_what_dumps_cannot_have_made_is_refused(data: bytes) -> None:
    with pytest.raises(InvalidValueError):
        loads(data)


def wrap(depth: int, as_tuple: bool) -> Any:
    value: Any = 1
    for _ in range(depth):
        value = (value,) if as_tuple else [value]
    return value


@pytest.mark.parametrize("as_tuple", [False, True])
def test_depth_limit_is_the_same_in_both_directions(as_tuple: bool) -> None:
    assert loads(dumps(wrap(MAX_DEPTH, as_tuple))) == wrap(MAX_DEPTH, as_tuple)
    with pytest.raises(InvalidValueError, match="deep"):
        dumps(wrap(MAX_DEPTH + 1, as_tuple))
    with pytest.raises(InvalidValueError, match="deep"):
        loads(b"\x91" * (MAX_DEPTH + 1) + b"\x01")


@pytest.mark.parametrize("value", [{1, 2}, object(), 1j, [print]])
def test_what_cannot_be_serialized_is_named(value: Any) -> None:
    with pytest.raises(InvalidTypeError, match=r"cannot serialize an object of type builtins\.\w+"):
        dumps(value)


@pytest.mark.parametrize("value", [2**64, -(2**63) - 1, [2**80], {2**64: 1}])
def test_integers_have_64_bits(value: Any) -> None:
    with pytest.raises(InvalidValueError):
        dumps(value)


def test_naive_datetime_is_refused() -> None:
    with pytest.raises(InvalidValueError, match="time zone"):
        dumps(datetime.datetime(2024, 5, 6))


def test_subclasses_of_plain_types_become_plain() -> None:
    class Level(enum.IntEnum):
        HIGH = 3

    class Pair(NamedTuple):
        left: int
        right: str

    assert loads(dumps({"level": Level.HIGH, "pair": Pair(1, "b")})) == {"level": 3, "pair": (1, "b")}


@MSGPackSerializer.ext_serializable(0x51)
class Celsius:
    def __init__(self, degrees: int) -> None:
        self.degrees = degrees

    def packb(self) -> bytes:
        return str(self.degrees).encode()

    @classmethod
    def unpackb(cls, raw: bytes) -> Celsius:
        return cls(int(raw))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Celsius) and self.degrees == other.degrees

    def __hash__(self) -> int:
        return hash(self.degrees)


def test_registered_classes() -> None:
    value = {"now": Celsius(3), (Celsius(4), 1): [Celsius(5)]}
    assert loads(dumps(value)) == value
    with pytest.raises(InvalidValueError, match="Celsius"):
        loads(dumps(Celsius(123)).replace(b"123", b"abc"))


def test_registration_mistakes() -> None:
    with pytest.raises(InvalidValueError, match="that no other class has"):
        MSGPackSerializer.ext_serializable(0x51)(type("Other", (Celsius,), {}))
    with pytest.raises(InvalidValueError, match="0 to 127"):
        MSGPackSerializer.ext_serializable(0x40)
    with pytest.raises(InvalidTypeError, match="packb"):
        MSGPackSerializer.ext_serializable(0x52)(int)
