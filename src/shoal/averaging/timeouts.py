"""In what order an averager's times have to be, and the times that follow from those that a user gave. Pure.

Defaults follow what was given: fixed ones would break the order as soon as one time is given.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from shoal.utils.ordering import DefaultSeconds, Order
from shoal.utils.scalars import plain

MIN_MATCHMAKING_TIME = DefaultSeconds(5.0)
REQUEST_TIMEOUT = DefaultSeconds(3.0)
SENDER_TIMEOUT = 180.0
"""``sender_timeout`` where nothing is given that it could follow: no member waits for another one for ever."""
EACH_PART = 60.0
"""Seconds that a member's parts may take on the average then, besides: 1 Mbit/s does for 14 owners, of usual parts."""
MAX_WAIT = 86400.0
"""Seconds: the longest time ahead at which a group may be scheduled."""
ADAPTIVE_CEILING = 60.0
"""Seconds: ``sender_timeout``, by default, where deadlines adapt. Before enough was seen, it is the one that holds."""
REDUCER_PATIENCE = 2
"""``reducer_timeout`` over ``sender_timeout``, by default: an owner may itself have to wait for a sender."""
REQUESTS_IN_SEARCH = 0.6
"""``request_timeout`` over ``min_matchmaking_time``, where one of both is not given."""
STEP_TIMEOUT = "the step's timeout"
LOAD_TIMEOUT = "the timeout of load_state_from_peers()"
RECORD_TIME = "half of the DHT's max_expiration"

ORDERS = (
    Order("request_timeout", "min_matchmaking_time", "a leader that does not answer costs a whole search"),
    Order(
        "sender_timeout", "reducer_timeout", "an owner that waits for a slow sender is itself taken for lost"
    ),
    Order(
        "sender_timeout",
        "allreduce_timeout",
        "a sender that stalls fails the round instead of being excluded",
    ),
    Order("reducer_timeout", "allreduce_timeout", "the round ends before an owner that stalls is noticed"),
    Order(
        "min_matchmaking_time",
        STEP_TIMEOUT,
        "a group begins earlier, when four fifths of the step's have passed",
    ),
    Order("request_timeout", STEP_TIMEOUT, "a leader is left without an answer after half of the step's"),
    Order("next_chunk_timeout", LOAD_TIMEOUT, "a donor that stalls costs the whole download"),
    Order("declare_state_period", RECORD_TIME, "the peer declares its state as often as that"),
)


@dataclass(frozen=True)
class SettledTimes:
    """The times of an averager, in seconds, in order as far as those that were given are.

    :param each_part: what a member's parts may take on the average, beside ``sender_timeout``; None: no limit, since it
      follows from what was given how long a part may take
    """

    min_matchmaking_time: float
    request_timeout: float
    sender_timeout: float
    reducer_timeout: float
    each_part: float | None = None


def given_times(**times: float | None) -> dict[str, float | None]:
    """The times that a user gave, as Python's own numbers; None for the others."""
    return {name: None if isinstance(time, DefaultSeconds) else plain(time) for name, time in times.items()}


def times_in_order(given: Mapping[str, Any]) -> dict[str, float | None]:
    """Those of a user's options that some rule of :data:`ORDERS` concerns, as :func:`given_times` has them."""
    names = {name for order in ORDERS for name in (order.shorter, order.longer)}
    return given_times(**{name: value for name, value in given.items() if name in names})


def settle(given: Mapping[str, Any]) -> SettledTimes:
    """Choose the times that were not given (absent or None) so that all are in order, if those that were given are.

    ``adaptive_timeouts`` lowers the default of ``sender_timeout``.
    """
    request, wait = given.get("request_timeout"), given.get("min_matchmaking_time")
    if wait is None:
        wait = max(MIN_MATCHMAKING_TIME, (request or 0.0) / REQUESTS_IN_SEARCH)
    if request is None:
        request = min(REQUEST_TIMEOUT, REQUESTS_IN_SEARCH * wait)
    sender, reducer = given.get("sender_timeout"), given.get("reducer_timeout")
    limit = given.get("allreduce_timeout")
    each_part = None
    if sender is None:
        sender = _smallest(
            given.get("next_chunk_timeout"), None if reducer is None else reducer / REDUCER_PATIENCE
        )
        if sender is None:
            sender = ADAPTIVE_CEILING if given.get("adaptive_timeouts") else SENDER_TIMEOUT
            each_part = EACH_PART
        if limit is not None:
            sender = min(sender, limit / (1 + REDUCER_PATIENCE))
    if reducer is None:
        reducer = REDUCER_PATIENCE * sender
        if limit is not None and sender < limit:
            reducer = min(reducer, (sender + limit) / 2)
    return SettledTimes(float(wait), float(request), float(sender), float(reducer), each_part)


def _smallest(*times: float | None) -> float | None:
    return min((time for time in times if time is not None), default=None)
