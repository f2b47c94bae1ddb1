"""Checks everything that a user gives to :class:`~shoal.dht.dht.DHT`, before any process is started."""

from __future__ import annotations

import difflib
import os
import warnings
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from shoal.compat.dht_options import IGNORED, REFUSED
from shoal.dht.config import DHTConfig
from shoal.dht.validation import RecordValidatorBase
from shoal.errors import InvalidTypeError
from shoal.utils.options import options_of
from shoal.utils.ordering import Order, contradictions

ORDERS = (
    Order("stall_timeout", "wait_timeout", "a search waits for nodes that are gone"),
    Order("wait_timeout", "bootstrap_timeout", "an initial peer that is slow is tried only once"),
)
STALLS_IN_WAIT = 4
"""``wait_timeout`` over ``stall_timeout`` at least, where one of both is not given."""


def make_config(given: Mapping[str, Any], extra: Mapping[str, Any]) -> DHTConfig:
    """The configuration of a node; None stands for the default.

    :param given: what DHT's signature names; those that are no options of the node are left out
    :param extra: what was given besides, misspelt or meant for another library perhaps
    :raises InvalidTypeError: an option is unknown (names the nearest known one), or of the wrong type
    :raises InvalidValueError: a value is not allowed
    """
    known = options_of(DHTConfig)
    for name in extra:
        if name in IGNORED:
            _warn(f"DHT option {name!r} is ignored: {IGNORED[name]}")
        elif name not in known:
            raise InvalidTypeError(_unknown(name, [*given, *known]))
    values = {
        name: known[name].check(value)
        for name, value in {**given, **extra}.items()
        if name in known and value is not None
    }
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


def check_identity_path(path: object) -> str | None:
    """``identity_path`` as text; its file is loaded, or created, so that a bad one is found out here.

    :raises InvalidValueError: the file is damaged, or others may read it
    """
    if path is None:
        return None
    if not isinstance(path, str | os.PathLike):
        raise InvalidTypeError(f"identity_path must be a path, got {path!r}")
    from shoal.p2p.identity import Identity

    # The process may have another folder as its current one.
    absolute = os.path.abspath(os.fspath(path))
    Identity.load_or_create(absolute)
    return str(absolute)


def check_validators(validators: object) -> tuple[RecordValidatorBase, ...]:
    """``record_validators`` as a tuple."""
    if isinstance(validators, RecordValidatorBase) or not isinstance(validators, Iterable):
        raise InvalidTypeError(f"record_validators must be a list of validators, got {validators!r}")
    checked = tuple(validators)
    for validator in checked:
        if not isinstance(validator, RecordValidatorBase):
            raise InvalidTypeError(
                f"record_validators must hold instances of RecordValidatorBase, got {validator!r}"
            )
    return checked


def _unknown(name: str, known: Sequence[str]) -> str:
    if name in REFUSED:
        return f"DHT option {name!r} is not supported: {REFUSED[name]}"
    nearest = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    advice = f"; did you mean {nearest[0]!r}?" if nearest else ""
    return f"DHT got an unknown option {name!r}{advice}"


def _warn(message: str) -> None:
    # Past this function, make_config and DHT.__init__, to the line that made the DHT.
    warnings.warn(message, UserWarning, stacklevel=4)
