"""Checks of times and group bits that users hand over; :mod:`shoal.utils.checks` has those of any number or flag."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

from shoal.averaging.timeouts import MAX_WAIT, ORDERS
from shoal.errors import InvalidValueError
from shoal.utils import figures
from shoal.utils.checks import Text, check_number
from shoal.utils.ordering import contradictions
from shoal.utils.timed import get_dht_time

logger = logging.getLogger(__name__)

MAX_GROUP_BITS = 64


def check_scheduled_time(scheduled_time: Any, deadline: float | None) -> float:
    """Times are in DHT seconds.

    :raises InvalidTypeError: not a number
    :raises InvalidValueError: not finite, too far ahead, or after ``deadline``
    """
    now = get_dht_time()
    time = check_number("scheduled_time", scheduled_time, maximum=now + MAX_WAIT)
    if deadline is not None and time > deadline:
        raise InvalidValueError(
            f"scheduled_time must be within the step's timeout, {figures.duration(deadline - now)} from now, got "
            f"{time}, {figures.duration(time - now)} from now"
        )
    return time


def _check_bits(name: str, text: str) -> None:
    if any(bit not in "01" for bit in text) or len(text) > MAX_GROUP_BITS:
        raise InvalidValueError(f"{name} must be {GROUP_BITS.allowed}, got {text!r}")


GROUP_BITS = Text(f"at most {MAX_GROUP_BITS} characters '0' and '1'", _check_bits)


def check_bits(name: str, bits: Any) -> str:
    """:raises InvalidTypeError: no text; :raises InvalidValueError: other characters than 0 and 1, or too many"""
    text: str = GROUP_BITS.check(name, bits)
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
