"""Checks everything that a user gives to :class:`~shoal.dht.dht.DHT`, before any process is started."""

from __future__ import annotations

import difflib
import math
import os
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import fields
from typing import Any

from shoal.compat.dht_options import IGNORED, REFUSED
from shoal.dht.config import DHTConfig
from shoal.dht.validation import RecordValidatorBase
from shoal.errors import InvalidTypeError, InvalidValueError
from shoal.utils.ordering import Order, contradictions
from shoal.utils.scalars import plain

ORDERS = (
    Order("stall_timeout", "wait_timeout", "a search waits for nodes that are gone"),
    Order("wait_timeout", "bootstrap_timeout", "an initial peer that is slow is tried only once"),
)
STALLS_IN_WAIT = 4
"""``wait_timeout`` over ``stall_timeout`` at least, where one of both is not given."""


def make_config(given: Mapping[str, Any], extra: Mapping[str, Any]) -> DHTConfig:
    """The configuration of a node; None stands for the default.

    :param given: options of DHT's signature
    :param extra: what was given besides, misspelt or meant for another library perhaps
    :raises InvalidTypeError: an option is unknown (names the nearest known one), or of the wrong type
    :raises InvalidValueError: a value is not allowed
    """
    types = {field.name: str(field.type) for field in fields(DHTConfig)}
    values = {name: value for name, value in given.items() if value is not None}
    for name, value in extra.items():
        if name in types:
            values |= {} if value is None else {name: value}
        elif name in IGNORED:
            _warn(f"DHT option {name!r} is ignored: {IGNORED[name]}")
        else:
            raise InvalidTypeError(_unknown(name, [*given, *types]))
    values = {name: check_number(name, value, types[name]) for name, value in values.items()}
    for text in contradictions(values, ORDERS):
        _warn(text)
    return DHTConfig(**(_followers(values) | values))


def _followers(given: Mapping[str, Any]) -> dict[str, Any]:
    """Defaults that have to follow what was given."""
    stall, wait = given.get("stall_timeout"), given.get("wait_timeout")
    if stall is None and wait:
        return {"stall_timeout": min(DHTConfig.stall_timeout, wait / STALLS_IN_WAIT)}
    if wait is None and stall:
        return {"wait_timeout": max(DHTConfig.wait_timeout, STALLS_IN_WAIT * stall)}
    return {}


def check_number(name: str, value: Any, kind: str = "float") -> Any:
    """The value, as Python's own if it is one of numpy's.

    :raises InvalidTypeError: not of the ``kind`` "bool", "int" or "float"
    """
    value = plain(value)
    if kind == "bool":
        if not isinstance(value, bool):
            raise InvalidTypeError(f"{name} must be True or False, not {value!r}")
        return value
    allowed = (int,) if kind == "int" else (int, float)
    if isinstance(value, bool) or not isinstance(value, allowed):
        what = "a whole number" if kind == "int" else "a number"
        raise InvalidTypeError(f"{name} must be {what}, not {value!r}")
    return value


def check_seconds(name: str, value: float | None) -> None:
    """Raise InvalidTypeError or InvalidValueError unless ``value`` is None or a number of seconds >= 0."""
    if value is None:
        return
    value = check_number(name, value)
    if not (value >= 0 and math.isfinite(value)):
        raise InvalidValueError(f"{name} must be a number of seconds >= 0, not {value!r}")


def check_identity_path(path: object) -> str | None:
    """``identity_path`` as text; its file is loaded, or created, so that a bad one is found out here.

    :raises InvalidValueError: the file is damaged, or others may read it
    """
    if path is None:
        return None
    if not isinstance(path, str | os.PathLike):
        raise InvalidTypeError(f"identity_path must be a path, not {path!r}")
    from shoal.p2p.identity import Identity

    # The process may have another folder as its current one.
    absolute = os.path.abspath(os.fspath(path))
    Identity.load_or_create(absolute)
    return str(absolute)


def check_validators(validators: object) -> tuple[RecordValidatorBase, ...]:
    """``record_validators`` as a tuple."""
    if isinstance(validators, RecordValidatorBase) or not isinstance(validators, Iterable):
        raise InvalidTypeError(f"record_validators must be a list of validators, not {validators!r}")
    checked = tuple(validators)
    for validator in checked:
        if not isinstance(validator, RecordValidatorBase):
            raise InvalidTypeError(
                f"record_validators: {validator!r} is not an instance of RecordValidatorBase"
            )
    return checked


def _unknown(name: str, known: Iterable[str]) -> str:
    if name in REFUSED:
        return f"DHT option {name!r} is not supported: {REFUSED[name]}"
    signature: tuple[str, ...] = (
        "initial_peers",
        "host_maddrs",
        "announce_maddrs",
        "identity_path",
        "record_validators",
    )
    signature += ("start", "daemon", "shutdown_timeout", "await_ready")
    nearest = difflib.get_close_matches(name, [*known, *signature], n=1, cutoff=0.5)
    advice = f"; did you mean {nearest[0]!r}?" if nearest else ""
    return f"DHT got an unknown option {name!r}{advice}"


def _warn(message: str) -> None:
    # Past this function, make_config and DHT.__init__, to the line that made the DHT.
    warnings.warn(message, UserWarning, stacklevel=4)
