"""What a value may cost to decode is known before it is decoded."""

from __future__ import annotations

import itertools
import random
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shoal.errors import InvalidValueError
from shoal.utils import MSGPackSerializer, budget

encode = msgspec.msgpack.encode


def array(count: int, item: bytes) -> bytes:
    return b"\xdd" + count.to_bytes(4) + item * count


def extension(code: int, data: bytes) -> bytes:
    return b"\xc9" + len(data).to_bytes(4) + bytes([code]) + data


def keyed(keys: list[bytes]) -> bytes:
    return b"\xdf" + len(keys).to_bytes(4) + b"".join(key + b"\x01" for key in keys)


EQUAL_HASHES = [k * ((1 << 61) - 1) for k in range(8)]
HOSTILE = {
    "empty lists": array(500_000, b"\x90"),
    "empty dictionaries": array(500_000, b"\x80"),
    "lists in lists": array(160_000, b"\x91\x91\x90"),
    "empty tuples": array(125_000, b"\xd4\x40\x90"),
    "lists in a tuple": extension(0x40, array(500_000, b"\x90")),
    "dates": array(80_000, b"\xd6\xff\0\0\0\1"),
    "many numbers": array(1_000_001, b"\x01"),
    "tuples of one hash": keyed(
        [
            extension(0x40, encode(key))
            for key in itertools.islice(itertools.product(EQUAL_HASHES, repeat=5), 20_000)
        ]
    ),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_values_that_take_long_to_decode_are_refused_before(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def decode(*arguments: object) -> None:
        raise AssertionError("it was decoded")

    monkeypatch.setattr("shoal.utils.serializer._decoder", decode)
    with pytest.raises(InvalidValueError, match="not a serialized value: more than"):
        MSGPackSerializer.loads(HOSTILE[name])


def test_the_sender_is_told_first() -> None:
    for value in ([[]] * 65_536, [()] * 65_536, {(i,): 0 for i in range(4097)}, [0] * 1_000_000):
        with pytest.raises(InvalidValueError, match="cannot serialize the value: more than"):
            MSGPackSerializer.dumps(value)


@pytest.mark.parametrize(
    "value",
    [
        [random.Random(1).random() for _ in range(60_000)],
        random.Random(2).randbytes(1 << 20),
        "\x80" * 300_000,
        [()] * 65_000,
        {(i, "x"): {} for i in range(4096)},
        [0] * 999_999,
    ],
    ids=["floats", "bytes", "text", "tuples", "tuple keys", "integers"],
)
def test_large_values_of_other_kinds_pass(value: Any) -> None:
    assert MSGPackSerializer.loads(MSGPackSerializer.dumps(value)) == value


def containers(value: Any) -> int:
    if isinstance(value, dict):
        return 1 + sum(containers(part) for item in value.items() for part in item)
    return 1 + sum(map(containers, value)) if isinstance(value, list | tuple) else 0


def elements(value: Any) -> int:
    if isinstance(value, dict):
        return 1 + sum(elements(part) for item in value.items() for part in item)
    if isinstance(value, tuple):  # the extension, and the list inside
        return 2 + sum(map(elements, value))
    return 1 + sum(map(elements, value)) if isinstance(value, list) else 1


LONG = [b"x" * 300, b"x" * 70_000, "é" * 20, "é" * 300, "é" * 40_000, *range(-40, 40, 7), 2**40, -(2**40)]
scalars = st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | st.floats() | st.text() | st.binary()
keys = scalars | st.tuples(scalars, scalars)
values = st.recursive(
    scalars | st.integers(0, len(LONG) - 1).map(LONG.__getitem__) | st.just([0] * 20),
    lambda inner: st.lists(inner) | st.tuples(inner) | st.dictionaries(keys, inner),
    max_leaves=20,
)


@settings(max_examples=200)
@given(values)
def test_elements_are_counted_exactly(value: Any) -> None:
    counted = budget._count(MSGPackSerializer.dumps(value))
    assert counted[:2] == (elements(value), containers(value))


@given(st.binary())
def test_any_bytes_can_be_counted(data: bytes) -> None:
    assert min(budget._count(data)) >= 0
