"""The settings of an averager, validated where they are made, before any process starts."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from shoal.averaging.group import group_key
from shoal.averaging.matchmaking import MatchmakingConfig
from shoal.compression import CompressionBase, NoCompression
from shoal.errors import InvalidTypeError, InvalidValueError

DEFAULT_PART_SIZE_BYTES = 1 << 19
MIN_PART_SIZE_BYTES = 1 << 10
MAX_PART_SIZE_BYTES = 1 << 26
"""The largest payload that a connection takes."""


MAX_WAIT = 86400.0
"""Seconds: the longest time ahead at which a group may be scheduled."""
START_BEFORE_DEADLINE = 0.8


@dataclass(frozen=True)
class AveragerConfig:
    """Everything but the tensors that the background process has to know. Times in seconds."""

    prefix: str
    matchmaking: MatchmakingConfig
    client_mode: bool | None
    """None: as the DHT, which is known when the averager starts."""
    part_size_bytes: int = DEFAULT_PART_SIZE_BYTES
    allreduce_timeout: float | None = None
    bandwidth: float | None = None
    """Mbit/s; None: as the mean of the group's members that gave theirs."""
    compression: CompressionBase = NoCompression()

    def __post_init__(self) -> None:
        check_string("prefix", self.prefix)
        if "." in self.prefix:
            raise InvalidValueError(
                f"prefix={self.prefix!r}: a dot separates the prefix from the group bits; use another character"
            )
        group_key(self.prefix)
        if self.client_mode is not None:
            check_flag("client_mode", self.client_mode)
        check_count("part_size_bytes", self.part_size_bytes, MIN_PART_SIZE_BYTES, MAX_PART_SIZE_BYTES)
        if self.allreduce_timeout is not None:
            check_number("allreduce_timeout", self.allreduce_timeout, above=0)
        if self.bandwidth is not None:
            check_number("bandwidth", self.bandwidth, minimum=0)
        if not isinstance(self.compression, CompressionBase):
            raise InvalidTypeError(
                f"compression={self.compression!r}: an object of a CompressionBase subclass is allowed, "
                "e.g. shoal.Float16Compression()"
            )


def matchmaking_config(
    target_group_size: Any, min_group_size: Any, min_matchmaking_time: Any, request_timeout: Any
) -> MatchmakingConfig:
    """Group sizes and search times; types are checked here, ranges where the object is made."""
    if target_group_size is not None:
        check_count("target_group_size", target_group_size, 1)
    check_count("min_group_size", min_group_size, 1)
    check_number("min_matchmaking_time", min_matchmaking_time, above=0, maximum=MAX_WAIT)
    check_number("request_timeout", request_timeout, above=0)
    return MatchmakingConfig(
        target_group_size, min_group_size, float(min_matchmaking_time), float(request_timeout)
    )


def default_start(now: float, deadline: float | None, settings: MatchmakingConfig) -> float:
    """When a group that is not full begins: after ``min_matchmaking_time``, or well before the deadline of a search
    that is shorter than that. DHT seconds.
    """
    wait = settings.min_matchmaking_time
    return now + (wait if deadline is None else min(wait, START_BEFORE_DEADLINE * (deadline - now)))


def check_string(name: str, value: Any) -> None:
    """:raises InvalidTypeError: ``value`` is no string"""
    if not isinstance(value, str):
        raise InvalidTypeError(f"{name}={value!r}: a string is allowed, not {type(value).__name__}")


def check_flag(name: str, value: Any) -> None:
    """:raises InvalidTypeError: ``value`` is neither True nor False"""
    if not isinstance(value, bool):
        raise InvalidTypeError(f"{name}={value!r}: True or False is allowed, not {type(value).__name__}")


def check_count(name: str, value: Any, minimum: int, maximum: int | None = None) -> None:
    """:raises InvalidTypeError: not an int; :raises InvalidValueError: out of range"""
    if isinstance(value, bool) or not isinstance(value, int):
        raise InvalidTypeError(f"{name}={value!r}: a whole number is allowed, not {type(value).__name__}")
    if value < minimum or (maximum is not None and value > maximum):
        allowed = f"at least {minimum}" if maximum is None else f"{minimum} to {maximum}"
        raise InvalidValueError(f"{name}={value}: {allowed} is allowed")


def check_number(
    name: str,
    value: Any,
    *,
    minimum: float | None = None,
    above: float | None = None,
    maximum: float | None = None,
) -> None:
    """:raises InvalidTypeError: not a number; :raises InvalidValueError: NaN, infinite or out of range"""
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise InvalidTypeError(f"{name}={value!r}: a number is allowed, not {type(value).__name__}")
    try:
        is_finite = math.isfinite(value)
    except OverflowError:
        raise InvalidValueError(f"{name} is a whole number beyond the range of float") from None
    if not is_finite:
        raise InvalidValueError(f"{name}={value}: a finite number is allowed")
    if minimum is not None and value < minimum:
        raise InvalidValueError(f"{name}={value}: at least {minimum:g} is allowed")
    if above is not None and value <= above:
        raise InvalidValueError(f"{name}={value}: more than {above:g} is allowed")
    if maximum is not None and value > maximum:
        raise InvalidValueError(f"{name}={value}: at most {maximum:g} is allowed")
