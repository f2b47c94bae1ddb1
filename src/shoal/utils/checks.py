"""Rules for what users hand over, and the errors for what breaks them: ``NAME must be WHAT, got VALUE``. Pure.

A rule stands beside the option that it is for (:mod:`shoal.utils.options`), so that errors and documentation say the
same. Each check returns the value, as Python's own where a number or flag of numpy or torch was given: use what is
returned.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

from shoal.errors import InvalidTypeError, InvalidValueError
from shoal.utils.scalars import plain


@runtime_checkable
class Rule(Protocol):
    """What values one option takes."""

    @property
    def allowed(self) -> str:
        """The values in words, to stand after "must be"."""

    def check(self, name: str, value: Any) -> Any:
        """The value, as Python's own.

        :raises InvalidTypeError: it is of another type
        :raises InvalidValueError: it is out of range
        """


@dataclass(frozen=True)
class Number:
    """A finite number, in some range."""

    minimum: float | None = None
    above: float | None = None
    """The range begins after this."""
    maximum: float | None = None
    unit: str = ""

    @property
    def allowed(self) -> str:
        unit = f" {self.unit}" if self.unit else ""
        least = None if self.minimum is None else f"{self.minimum:.15g}"
        most = None if self.maximum is None else f"{self.maximum:.15g}"
        if self.above is not None:
            upwards = f"more than {self.above:.15g}"
            return f"{upwards}{unit}" if most is None else f"{upwards} and at most {most}{unit}"
        if least is not None:
            return f"at least {least}{unit}" if most is None else f"{least} to {most}{unit}"
        return "a number" if most is None else f"at most {most}{unit}"

    def check(self, name: str, value: Any) -> Any:
        value = plain(value)
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise InvalidTypeError(f"{name} must be a number, got {value!r}")
        try:
            is_finite = math.isfinite(value)
        except OverflowError:
            raise InvalidValueError(
                f"{name} must be a number in the range of float, got {_shown(value)}"
            ) from None
        if not is_finite:
            raise InvalidValueError(f"{name} must be a finite number, got {value}")
        too_small = (self.minimum is not None and value < self.minimum) or (
            self.above is not None and value <= self.above
        )
        if too_small or (self.maximum is not None and value > self.maximum):
            raise InvalidValueError(f"{name} must be {self.allowed}, got {value}")
        return value


@dataclass(frozen=True)
class Count:
    """A whole number, in some range."""

    minimum: int
    maximum: int | None = None
    unit: str = ""
    reason: str = ""
    """Why the range ends there."""

    @property
    def allowed(self) -> str:
        unit = f" {self.unit}" if self.unit else ""
        return (
            f"at least {self.minimum}{unit}"
            if self.maximum is None
            else f"{self.minimum} to {self.maximum}{unit}"
        )

    def check(self, name: str, value: Any) -> Any:
        value = plain(value)
        if isinstance(value, bool) or not isinstance(value, int):
            raise InvalidTypeError(f"{name} must be a whole number, got {value!r}")
        if value < self.minimum or (self.maximum is not None and value > self.maximum):
            reason = f": {self.reason}" if self.reason else ""
            raise InvalidValueError(f"{name} must be {self.allowed}, got {_shown(value)}{reason}")
        return value


@dataclass(frozen=True)
class Flag:
    """True or False, and no other value that Python takes for one of both."""

    allowed: str = "True or False"

    def check(self, name: str, value: Any) -> Any:
        value = plain(value)
        if not isinstance(value, bool):
            raise InvalidTypeError(f"{name} must be {self.allowed}, got {value!r}")
        return value


@dataclass(frozen=True)
class Choice:
    """One of a few texts."""

    choices: Sequence[str]

    @property
    def allowed(self) -> str:
        return " or ".join(map(repr, self.choices))

    def check(self, name: str, value: Any) -> Any:
        if value not in self.choices:
            raise InvalidValueError(f"{name} must be {self.allowed}, got {value!r}")
        return value


@dataclass(frozen=True)
class Text:
    """A text, of which ``further`` may ask more: it is called with name and text, and raises or returns."""

    allowed: str = "a text"
    further: Callable[[str, str], object] | None = None

    def check(self, name: str, value: Any) -> Any:
        value = plain(value)
        if not isinstance(value, str):
            raise InvalidTypeError(f"{name} must be a text, got {value!r}")
        if self.further is not None:
            self.further(name, value)
        return value


def _shown(value: float) -> str:
    # Python refuses to write numbers of thousands of digits.
    if isinstance(value, int) and value.bit_length() > 256:
        return f"a whole number of {value.bit_length()} bits"
    return str(value)


def check_flag(name: str, value: Any) -> bool:
    """:raises InvalidTypeError: ``value`` is neither True nor False"""
    checked: bool = Flag().check(name, value)
    return checked


def check_choice(name: str, value: Any, choices: Sequence[str]) -> None:
    """:raises InvalidValueError: ``value`` is none of the choices"""
    Choice(choices).check(name, value)


def check_number(
    name: str,
    value: Any,
    *,
    minimum: float | None = None,
    above: float | None = None,
    maximum: float | None = None,
) -> float:
    """:raises InvalidTypeError: not a number; :raises InvalidValueError: NaN, infinite or out of range"""
    checked: float = Number(minimum, above, maximum).check(name, value)
    return checked
