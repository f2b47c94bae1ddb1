from __future__ import annotations

import pytest

from shoal.compression import CodecRegistry, Float16Compression, NoCompression, get_codec
from shoal.errors import InvalidTypeError, InvalidValueError, ProtocolViolation


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
