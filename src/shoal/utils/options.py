"""Options of a configuration that say in one place what they are: type, rule, unit and default. Pure.

A configuration is a frozen dataclass whose fields carry a rule::

    @dataclass(frozen=True)
    class Config:
        period: Annotated[float, Number(above=0, unit="s")] = 30.0
        limit: Annotated[int | None, Count(1)] = None
        quiet: bool = False  # bool and str have rules of their own

        def __post_init__(self) -> None:
            check_options(self)

Checks run from the rules. So does the reference in docs/api.md, which a test compares with them and with the signatures
that users see.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from types import NoneType, UnionType
from typing import Annotated, Any, TypeVar, Union, get_args, get_origin, get_type_hints

from shoal.utils.checks import Flag, Rule, Text

T = TypeVar("T")


@dataclass(frozen=True)
class Option:
    """One option of a configuration."""

    name: str
    rule: Rule
    may_be_none: bool
    default: Any
    """``dataclasses.MISSING`` if there is none."""

    @property
    def allowed(self) -> str:
        """The values that it takes, in words."""
        return f"{self.rule.allowed}, or None" if self.may_be_none else self.rule.allowed

    def check(self, value: Any) -> Any:
        """The value, as Python's own.

        :raises InvalidTypeError: it is of another type
        :raises InvalidValueError: it is out of range
        """
        return None if value is None and self.may_be_none else self.rule.check(self.name, value)


_known: dict[type[Any], Mapping[str, Option]] = {}
"""Types are read once: configurations are made anew in each search."""


def options_of(config: type[Any]) -> Mapping[str, Option]:
    """The options of a configuration's class by name. Fields of other types than numbers, flags and texts are none."""
    found = _known.get(config)
    if found is None:
        found = _known[config] = _read_options(config)
    return found


def _read_options(config: type[Any]) -> Mapping[str, Option]:
    hints = get_type_hints(config, include_extras=True)
    found = {}
    for field in fields(config):
        rule, may_be_none = _read(hints[field.name])
        if rule is not None:
            found[field.name] = Option(field.name, rule, may_be_none, field.default)
    return found


def _read(hint: Any) -> tuple[Rule | None, bool]:
    """The rule of a type, and whether None is allowed as well."""
    if get_origin(hint) is Annotated:
        inner, *notes = get_args(hint)
        own, may_be_none = _read(inner)
        return next((note for note in notes if isinstance(note, Rule)), own), may_be_none
    if get_origin(hint) in (Union, UnionType):
        parts = [_read(part)[0] for part in get_args(hint) if part is not NoneType]
        return (parts[0] if len(parts) == 1 else None), NoneType in get_args(hint)
    if hint is bool:
        return Flag(), False
    return (Text() if hint is str else None), False


def check_options(config: Any) -> None:
    """Check all options of a frozen dataclass, and make their values Python's own; for its ``__post_init__``.

    :raises InvalidTypeError: an option is of the wrong type
    :raises InvalidValueError: an option is out of range
    """
    for name, option in options_of(type(config)).items():
        object.__setattr__(config, name, option.check(getattr(config, name)))


def gather(config: type[T], given: Mapping[str, Any]) -> T:
    """A ``config`` of those of ``given`` that are its fields: the ``locals()`` of a function with these parameters.

    So a function with an explicit signature names each option once.
    """
    names = [field.name for field in fields(config)]  # type: ignore[arg-type]
    return config(**{name: given[name] for name in names})
