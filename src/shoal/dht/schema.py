"""Values that must have stated types: :class:`SchemaValidator`."""

from __future__ import annotations

import dataclasses
import inspect
import typing
from collections.abc import Callable, Mapping
from typing import Annotated, Any

import msgspec

from shoal.dht.storage import PLAIN
from shoal.dht.validation import DHTRecord, RecordValidatorBase
from shoal.errors import InvalidTypeError, InvalidValueError
from shoal.utils.serializer import MSGPackSerializer

__all__ = ["SchemaValidator"]


class SchemaValidator(RecordValidatorBase):
    """Values under the keys of a schema must have the types that the schema states.

    ``schema`` is a mapping ``{key: type}``, or a class whose annotated fields are the keys: a msgspec Struct,
    a dataclass, a TypedDict or a pydantic model. Types are those that msgspec can convert to (strictly: no
    ``"1"`` for an int), or pydantic models. A field of type ``dict[K, V]`` is a record with sub-keys:
    sub-keys must be ``K``, values ``V``; any other field is a record without sub-keys.

    ``prefix`` is put before each key, as ``f"{prefix}_{key}"``. Unknown keys are allowed unless
    ``allow_extra_keys`` is False. Several of these in one DHT act as one: a key that several schemas state
    must satisfy one of them.

    The class crosses to the background process by its import path, so that it must not be defined inside a
    function.
    """

    def __init__(
        self,
        schema: Mapping[Any, Any] | type[Any],
        *,
        allow_extra_keys: bool = True,
        prefix: str | None = None,
    ) -> None:
        self._schemas: list[tuple[Mapping[Any, Any] | type[Any], str | None]] = [(schema, prefix)]
        self._allow_extra_keys = allow_extra_keys
        self._fields = _fields_by_key(schema, prefix)

    def validate(self, record: DHTRecord) -> bool:
        return self.explain(record) is None

    def explain(self, record: DHTRecord) -> str | None:
        fields = self._fields.get(record.key)
        if fields is None:
            return None if self._allow_extra_keys else "its key is not in the schema"
        try:
            subkey = PLAIN if record.subkey is None else MSGPackSerializer.loads(record.subkey)
            value = MSGPackSerializer.loads(record.value)
        except InvalidValueError as error:
            return str(error)
        reasons = [field.explain(record.subkey is not None, subkey, value) for field in fields]
        return (
            None if None in reasons else f"it does not match the schema: {'; or: '.join(map(str, reasons))}"
        )

    def merge_with(self, other: RecordValidatorBase) -> bool:
        if not isinstance(other, SchemaValidator):
            return False
        self._schemas += other._schemas
        self._allow_extra_keys = self._allow_extra_keys and other._allow_extra_keys
        for key, fields in other._fields.items():
            self._fields[key] = self._fields.get(key, []) + fields
        return True

    def __getstate__(self) -> dict[str, Any]:
        return {"schemas": self._schemas, "allow_extra_keys": self._allow_extra_keys}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self._schemas = state["schemas"]
        self._allow_extra_keys = state["allow_extra_keys"]
        self._fields = {}
        for schema, prefix in self._schemas:
            for key, fields in _fields_by_key(schema, prefix).items():
                self._fields[key] = self._fields.get(key, []) + fields


@dataclasses.dataclass(frozen=True)
class _Field:
    has_subkeys: bool
    check: Callable[[Any], str | None]

    def explain(self, has_subkey: bool, subkey: Any, value: Any) -> str | None:
        if has_subkey != self.has_subkeys:
            return "it needs a sub-key" if self.has_subkeys else "it must not have a sub-key"
        return self.check({subkey: value} if has_subkey else value)


def _fields_by_key(schema: Mapping[Any, Any] | type[Any], prefix: str | None) -> dict[bytes, list[_Field]]:
    if isinstance(schema, Mapping):
        types = dict(schema)
    elif isinstance(schema, type):
        types = _types_of_class(schema)
    else:
        raise InvalidTypeError(f"schema must be a mapping of keys to types or a class, got {schema!r}")
    return {
        MSGPackSerializer.dumps(key if prefix is None else f"{prefix}_{key}"): [_make_field(key, kind)]
        for key, kind in types.items()
    }


def _types_of_class(schema: type[Any]) -> dict[Any, Any]:
    pydantic_fields = getattr(schema, "model_fields", None)
    if pydantic_fields is not None:
        return {
            name: _PydanticType(Annotated[info.annotation, info]) for name, info in pydantic_fields.items()
        }
    types = typing.get_type_hints(schema, include_extras=True)
    if not types:
        raise InvalidValueError(f"schema must have annotated fields, got {schema!r}, which has none")
    return types


@dataclasses.dataclass(frozen=True)
class _PydanticType:
    """A type that pydantic is to check."""

    annotation: Any


def _make_field(key: Any, kind: Any) -> _Field:
    annotation = kind.annotation if isinstance(kind, _PydanticType) else kind
    bare = annotation
    while typing.get_origin(bare) is Annotated:
        bare = typing.get_args(bare)[0]
    has_subkeys = typing.get_origin(bare) is dict or bare is dict
    if isinstance(kind, _PydanticType) or _mentions_pydantic(bare):
        return _Field(has_subkeys, _pydantic_check(annotation))
    return _Field(has_subkeys, _msgspec_check(key, annotation))


def _mentions_pydantic(annotation: Any) -> bool:
    if inspect.isclass(annotation) and hasattr(annotation, "__pydantic_core_schema__"):
        return True
    return any(_mentions_pydantic(argument) for argument in typing.get_args(annotation))


def _msgspec_check(key: Any, annotation: Any) -> Callable[[Any], str | None]:
    try:
        msgspec.convert({}, annotation)
    except msgspec.ValidationError:
        pass
    except TypeError as error:
        raise InvalidTypeError(
            f"schema: {annotation!r} of {key!r} is no type that msgspec checks: {error}"
        ) from error

    def check(value: Any) -> str | None:
        try:
            msgspec.convert(value, annotation)
        except msgspec.ValidationError as error:
            return str(error)
        return None

    return check


def _pydantic_check(annotation: Any) -> Callable[[Any], str | None]:
    import pydantic  # only where a schema uses it: it is no dependency of Shoal

    adapter = pydantic.TypeAdapter(annotation)

    def check(value: Any) -> str | None:
        try:
            adapter.validate_python(value)
        except pydantic.ValidationError as error:
            return "; ".join(f"{list(e['loc'])}: {e['msg']}" for e in error.errors(include_context=False))
        return None

    return check
