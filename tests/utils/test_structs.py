"""What crosses the wire has one of three forms."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Iterator

import msgspec
import pytest

import shoal
from shoal.utils.structs import CompactStruct, Message, NamedStruct

FORMS = (CompactStruct, NamedStruct)
BETWEEN_PEERS = (
    "shoal.averaging.matchmaking",
    "shoal.averaging.state",
    "shoal.compression",
    "shoal.dht",
    "shoal.p2p",
)


class Asked(Message, frozen=True):
    number: int


class Answered(Message, frozen=True):
    number: int


class Row(CompactStruct, frozen=True):
    number: int


class LongerRow(CompactStruct, frozen=True):
    number: int
    text: str = "unknown"


def structs_of(packages: tuple[str, ...]) -> Iterator[type[msgspec.Struct]]:
    names = [module.name for module in pkgutil.walk_packages(shoal.__path__, "shoal.")]
    for name in names:
        if name.startswith(packages):
            for value in vars(importlib.import_module(name)).values():
                if isinstance(value, type) and issubclass(value, msgspec.Struct) and value.__module__ == name:
                    yield value


def test_all_that_peers_send_each_other_has_one_of_the_forms():
    found = list(structs_of(BETWEEN_PEERS))
    assert len(found) > 30
    for struct in found:
        assert issubclass(struct, FORMS), struct
        assert struct.__struct_config__.frozen, struct


def test_messages_are_told_apart_by_the_names_of_their_classes():
    raw = msgspec.msgpack.encode(Answered(2))
    assert msgspec.msgpack.decode(raw) == {"type": "Answered", "number": 2}
    assert msgspec.msgpack.decode(raw, type=Asked | Answered) == Answered(2)


def test_an_unknown_field_of_a_message_is_an_error():
    raw = msgspec.msgpack.encode({"type": "Asked", "number": 1, "more": 2})
    with pytest.raises(msgspec.ValidationError, match="more"):
        msgspec.msgpack.decode(raw, type=Asked | Answered)


def test_an_array_grows_at_its_end():
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(LongerRow(1, "one")), type=Row) == Row(1)
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(Row(1)), type=LongerRow) == LongerRow(1)
