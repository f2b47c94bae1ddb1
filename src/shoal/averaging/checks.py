"""Checks of what users hand over: each error names the parameter, the value and what is allowed.

Each returns the value, as Python's own where a number or flag of numpy or torch was given: use what is returned.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from typing import Any

from shoal.averaging.timeouts import ORDERS
from shoal.errors import InvalidTypeError, InvalidValueError
from shoal.utils import figures
from shoal.utils.ordering import contradictions
from shoal.utils.scalars import plain
from shoal.utils.timed import get_dht_time

logger = logging.getLogger(__name__)

MAX_GROUP_BITS = 64
MAX_WAIT = 86400.0
"""Seconds: the longest time ahead at which a group may be scheduled."""


def check_string(name: str, value: Any) -> str:
    """:raises InvalidTypeError: ``value`` is no string"""
    value = plain(value)
    if not isinstance(value, str):
        raise InvalidTypeError(f"{name}={value!r}: a string is allowed, not {type(value).__name__}")
    return value


def check_flag(name: str, value: Any) -> bool:
    """:raises InvalidTypeError: ``value`` is neither True nor False"""
    value = plain(value)
    if not isinstance(value, bool):
        raise InvalidTypeError(f"{name}={value!r}: True or False is allowed, not {type(value).__name__}")
    return value


def check_choice(name: str, value: Any, choices: Sequence[str]) -> None:
    """:raises InvalidValueError: ``value`` is none of the choices"""
    if value not in choices:
        allowed = " or ".join(map(repr, choices))
        raise InvalidValueError(f"{name} must be {allowed}, got {value!r}")


def check_count(name: str, value: Any, minimum: int, maximum: int) -> int:
    """:raises InvalidTypeError: not an int; :raises InvalidValueError: out of range"""
    value = plain(value)
    if isinstance(value, bool) or not isinstance(value, int):
        raise InvalidTypeError(f"{name}={value!r}: a whole number is allowed, not {type(value).__name__}")
    if value < minimum or value > maximum:
        raise InvalidValueError(f"{name}={_shown(value)}: {minimum} to {maximum} is allowed")
    return value


def _shown(value: int) -> str:
    # Python refuses to write numbers of thousands of digits.
    return str(value) if value.bit_length() <= 256 else f"(a whole number of {value.bit_length()} bits)"


def check_number(
    name: str,
    value: Any,
    *,
    minimum: float | None = None,
    above: float | None = None,
    maximum: float | None = None,
) -> float:
    """:raises InvalidTypeError: not a number; :raises InvalidValueError: NaN, infinite or out of range"""
    value = plain(value)
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise InvalidTypeError(f"{name}={value!r}: a number is allowed, not {type(value).__name__}")
    try:
        is_finite = math.isfinite(value)
    except OverflowError:
        raise InvalidValueError(f"{name} is a whole number beyond the range of float") from None
    if not is_finite:
        raise InvalidValueError(f"{name}={value}: a finite number is allowed")
    if minimum is not None and value < minimum:
        raise InvalidValueError(f"{name}={value}: at least {minimum:.15g} is allowed")
    if above is not None and value <= above:
        raise InvalidValueError(f"{name}={value}: more than {above:.15g} is allowed")
    if maximum is not None and value > maximum:
        raise InvalidValueError(f"{name}={value}: at most {maximum:.15g} is allowed")
    return value


def check_scheduled_time(scheduled_time: Any, deadline: float | None) -> float:
    """Times are in DHT seconds.

    :raises InvalidTypeError: not a number
    :raises InvalidValueError: not finite, too far ahead, or after ``deadline``
    """
    now = get_dht_time()
    time = check_number("scheduled_time", scheduled_time, maximum=now + MAX_WAIT)
    if deadline is not None and time > deadline:
        raise InvalidValueError(
            f"scheduled_time={time}: it is {figures.duration(time - now)} ahead, "
            f"and the step's timeout ends the search in {figures.duration(deadline - now)}"
        )
    return time


def check_bits(name: str, bits: Any) -> str:
    """:raises InvalidTypeError: no string; :raises InvalidValueError: other characters than 0 and 1, or too many"""
    text = check_string(name, bits)
    if any(bit not in "01" for bit in text) or len(text) > MAX_GROUP_BITS:
        raise InvalidValueError(
            f"{name}={text!r}: a string of at most {MAX_GROUP_BITS} characters '0' and '1' is allowed"
        )
    return text


class OrderOfTimes:
    """Warns of times that contradict each other: at once of those that the averager was given, once of each other."""

    def __init__(self, prefix: str, given: Mapping[str, float | None]) -> None:
        self._prefix = prefix
        self._given = dict(given)
        self._told: set[str] = set()
        self._warn(self._given, "")

    def check(self, name: str, seconds: float) -> None:
        """Compare a time that a call was given with the averager's; of each name the first contradiction is told."""
        if name not in self._told:
            self._warn({**self._given, name: seconds}, name)

    def _warn(self, times: Mapping[str, float | None], name: str) -> None:
        orders = [order for order in ORDERS if not name or name == order.longer]
        for text in contradictions(times, orders):
            self._told.add(name)
            logger.warning("%s: %s", self._prefix, text)
