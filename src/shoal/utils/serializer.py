"""Python values to bytes and back: what users store in the DHT and gather from their groupmates.

MessagePack, with one extension of ours for tuples and one for each class that users register. Decoding is
safe on bytes from strangers: it builds plain values and instances of registered classes, nothing else.
"""

from __future__ import annotations

import datetime
from abc import ABC, abstractmethod
from collections.abc import Callable
from functools import lru_cache
from typing import Any, ClassVar, Protocol, TypeVar, cast

import msgspec

from shoal.errors import InvalidTypeError, InvalidValueError
from shoal.utils.budget import TUPLE_CODE, check_budget
from shoal.utils.scalars import plain

__all__ = ["MSGPackSerializer", "SerializerBase"]

MAX_DEPTH = 32
"""Containers inside containers; deeper values are refused in both directions."""

_TUPLE_CODE = TUPLE_CODE
_EXTENSION_CODES = range(0x80)


class _Serializable(Protocol):
    def packb(self) -> bytes: ...

    @classmethod
    def unpackb(cls, raw: bytes) -> Any: ...


ClassT = TypeVar("ClassT", bound=type[Any])

_encoder = msgspec.msgpack.Encoder()
_CONTAINERS = frozenset({list, tuple, dict})
_SCALARS = (bool, int, float, str, bytes, bytearray)


class SerializerBase(ABC):
    """What a serializer must have: :attr:`~shoal.DecentralizedAverager.serializer` may be any class like this one.

    ``loads`` is given bytes from strangers; what it raises on them must harm nobody.
    """

    @classmethod
    @abstractmethod
    def dumps(cls, obj: object) -> bytes:
        """The bytes of ``obj``."""

    @classmethod
    @abstractmethod
    def loads(cls, buf: bytes) -> Any:
        """The object that :meth:`dumps` made these bytes of."""


class MSGPackSerializer(SerializerBase):
    """Serializes None, bool, int (64 bits), float, str, bytes, aware datetimes, lists, tuples, dictionaries.

    Values keep their types: a tuple comes back as a tuple, also inside containers and as a key of a
    dictionary. A number of numpy or torch (of no dimensions) comes back as one of Python's. Classes registered
    with :meth:`ext_serializable` are serialized too.

    A value has at most 1,000,000 elements, of which 65,536 may be lists, tuples, dictionaries and registered classes,
    and 4,096 may be tuples as keys of dictionaries: more would take others long to decode. Arrays of numbers are small
    and fast as bytes, e.g. ``array.tobytes()``.
    """

    _code_of: ClassVar[dict[type[Any], int]] = {}
    _class_of: ClassVar[dict[int, type[Any]]] = {}

    @classmethod
    def ext_serializable(cls, type_code: int) -> Callable[[ClassT], ClassT]:
        """Class decorator: instances are serialized by ``packb() -> bytes`` and ``unpackb(bytes)``.

        ``type_code`` identifies the class in the bytes: 0 to 127, one class each; 64 is taken by tuples.
        ``unpackb`` is given bytes from strangers: whatever it raises on them becomes ``InvalidValueError``.
        """
        if type_code not in _EXTENSION_CODES or type_code == _TUPLE_CODE:
            raise InvalidValueError(
                f"type_code must be 0 to 127 and not {_TUPLE_CODE}, that of tuples, got {type_code}"
            )

        def register(target: ClassT) -> ClassT:
            for name in ("packb", "unpackb"):
                if not callable(getattr(target, name, None)):
                    raise InvalidTypeError(f"{target.__qualname__} must define {name}() to be serializable")
            known = cls._class_of.get(type_code)
            if known is not None and _full_name(known) != _full_name(target):
                raise InvalidValueError(
                    f"type_code must be one that no other class has, got {type_code}, that of {_full_name(known)}"
                )
            # The same class may be defined again: a notebook cell that is run twice.
            cls._code_of[target] = type_code
            cls._class_of[type_code] = target
            return target

        return register

    @classmethod
    def dumps(cls, obj: object) -> bytes:
        """Raises InvalidTypeError naming what cannot be serialized, InvalidValueError if it does not fit."""
        try:
            encoded = _encoder.encode(cls._prepare(obj, 0))
        except (OverflowError, ValueError, msgspec.MsgspecError) as error:
            if isinstance(error, InvalidValueError):
                raise
            raise InvalidValueError(f"cannot serialize the value: {error}") from error
        check_budget(encoded, "cannot serialize the value")
        return encoded

    @classmethod
    def loads(cls, buf: bytes | bytearray | memoryview) -> Any:
        """Raises InvalidValueError, and nothing else, on bytes that :meth:`dumps` cannot have made.

        What would take long to decode is refused before: see :mod:`shoal.utils.budget`.
        """
        check_budget(buf, "not a serialized value")
        value = cls._load(buf, 0)
        _check_depth(value, 0)
        return value

    @classmethod
    def _prepare(cls, obj: object, depth: int) -> object:
        kind = type(obj)
        if obj is None or kind in _SCALARS:
            return obj
        if depth >= MAX_DEPTH:
            raise InvalidValueError(f"cannot serialize containers more than {MAX_DEPTH} deep")
        if kind in cls._code_of:
            packed = cast("_Serializable", obj).packb()
            return msgspec.msgpack.Ext(cls._code_of[kind], packed)
        if isinstance(obj, dict):
            return cls._prepare_dict(obj, depth)
        if isinstance(obj, list):
            return [cls._prepare(item, depth + 1) for item in obj]
        if isinstance(obj, tuple):
            items = [cls._prepare(item, depth + 1) for item in obj]
            return msgspec.msgpack.Ext(_TUPLE_CODE, _encoder.encode(items))
        if isinstance(obj, datetime.datetime):
            if obj.tzinfo is None:
                raise InvalidValueError(f"cannot serialize {obj!r}: a datetime needs a time zone")
            return obj
        for base in _SCALARS:  # subclasses of plain types, such as IntEnum members or numpy.float64
            if isinstance(obj, base):
                return cast("Callable[[object], object]", base)(obj)
        number = plain(obj)
        if type(number) in (bool, int, float):
            return number
        raise InvalidTypeError(f"cannot serialize an object of type {_full_name(kind)}: {_shorten(obj)}")

    @classmethod
    def _prepare_dict(cls, obj: dict[Any, Any], depth: int) -> object:
        if all(type(key) in _SCALARS for key in obj):
            return {key: cls._prepare(value, depth + 1) for key, value in obj.items()}
        # msgspec takes no extension as a key: write the map piece by piece.
        pieces = [_map_header(len(obj))]
        for item in obj.items():
            pieces += (_encoder.encode(cls._prepare(part, depth + 1)) for part in item)
        return msgspec.Raw(b"".join(pieces))

    @classmethod
    def _load(cls, buf: bytes | bytearray | memoryview, depth: int) -> Any:
        try:
            value = _decoder(cls, depth).decode(buf)
        except InvalidValueError:
            raise
        # Malformed; bad UTF-8 or date; an unhashable key; nested too deep for the decoder.
        except (msgspec.MsgspecError, ValueError, TypeError, OverflowError, RecursionError) as error:
            raise InvalidValueError(f"not a serialized value: {error}") from error
        return value

    @classmethod
    def _load_extension(cls, code: int, data: memoryview, depth: int) -> Any:
        if depth >= MAX_DEPTH:
            raise InvalidValueError(f"not a serialized value: containers more than {MAX_DEPTH} deep")
        if code == _TUPLE_CODE:
            items = cls._load(data, depth + 1)
            if not isinstance(items, list):
                raise InvalidValueError(f"not a serialized value: a tuple of {type(items).__name__}")
            return tuple(items)
        target = cls._class_of.get(code)
        if target is None:
            raise InvalidValueError(f"not a serialized value: extension type {code} is not registered")
        try:
            return target.unpackb(bytes(data))
        except Exception as error:
            raise InvalidValueError(f"{target.__qualname__}.unpackb refused its bytes: {error}") from error


@lru_cache(maxsize=4 * MAX_DEPTH)
def _decoder(serializer: type[MSGPackSerializer], depth: int) -> msgspec.msgpack.Decoder[Any]:
    """The decoder of values inside of ``depth`` tuples; making one for each tuple would take longer than decoding."""

    def extension(code: int, data: memoryview) -> Any:
        return serializer._load_extension(code, data, depth)

    return msgspec.msgpack.Decoder(ext_hook=extension)


def _map_header(length: int) -> bytes:
    """The MessagePack header of a map with this many items."""
    if length < 16:
        return bytes([0x80 | length])
    return b"\xde" + length.to_bytes(2, "big") if length < 1 << 16 else b"\xdf" + length.to_bytes(4, "big")


def _check_depth(value: object, depth: int) -> None:
    if isinstance(value, list | tuple):
        items: Any = value
    elif isinstance(value, dict):
        items = [*value.keys(), *value.values()]
    else:
        return
    if depth >= MAX_DEPTH:
        raise InvalidValueError(f"not a serialized value: containers more than {MAX_DEPTH} deep")
    for item in items:
        if type(item) in _CONTAINERS:
            _check_depth(item, depth + 1)


def _full_name(kind: type[Any]) -> str:
    return f"{kind.__module__}.{kind.__qualname__}"


def _shorten(obj: object) -> str:
    text = repr(obj)
    return text if len(text) <= 80 else text[:77] + "..."
