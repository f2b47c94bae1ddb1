"""The settings of an averager, validated where they are made, before any process starts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Annotated, Any

from shoal.averaging.checks import GROUP_BITS
from shoal.averaging.group import PeerMode, group_key
from shoal.averaging.matchmaking_config import MatchmakingConfig, matchmaking_config
from shoal.averaging.timeouts import settle
from shoal.errors import InvalidValueError
from shoal.utils.checks import Count, Number, Text
from shoal.utils.options import check_options, gather
from shoal.utils.ordering import DefaultSeconds

DEFAULT_PART_SIZE_BYTES = 1 << 19
MIN_PART_SIZE_BYTES = 1 << 10
MAX_PART_SIZE_BYTES = 1 << 26
"""The largest payload that a connection takes."""

START_BEFORE_DEADLINE = 0.8
MAX_VECTOR_SIZE = 1 << 62
FIRST_RETRY_PAUSE = 0.1
MAX_RETRY_PAUSE = 5.0
DEFAULT_DECLARE_STATE_PERIOD = DefaultSeconds(30.0)
DEFAULT_MAX_STATE_AGE = 60.0
MIN_DECLARE_STATE_PERIOD = 0.1
MAX_DECLARE_STATE_PERIOD = 3000.0
"""Seconds; with the time until it expires, a declaration stays below the hour that the DHT keeps it."""


def _check_prefix(name: str, prefix: str) -> None:
    group_key(prefix)
    try:
        prefix.encode()
    except UnicodeEncodeError:
        raise InvalidValueError(
            f"{name} must be a text that can be written in UTF-8, got {prefix!r}"
        ) from None


Patience = Annotated[float | None, Number(above=0, unit="s")]
"""None: no limit, or what follows from the other times (:mod:`shoal.averaging.timeouts`)."""


@dataclass(frozen=True)
class AveragerConfig:
    """The options of an averager that its background process has to know.

    What each means is said to users, at the parameters of :class:`~shoal.DecentralizedAverager`. Here is what values it
    takes, in which unit, and its default.
    """

    prefix: Annotated[str, Text("a text of 1 to 256 characters", _check_prefix)]
    matchmaking: MatchmakingConfig
    client_mode: bool | None = None
    """None: as the DHT, which is known when the averager starts."""
    auxiliary: bool = False
    initial_group_bits: Annotated[str, GROUP_BITS] = ""
    part_size_bytes: Annotated[int, Count(MIN_PART_SIZE_BYTES, MAX_PART_SIZE_BYTES, "bytes")] = (
        DEFAULT_PART_SIZE_BYTES
    )
    min_vector_size: Annotated[int, Count(0, MAX_VECTOR_SIZE, "elements")] = 0
    allreduce_timeout: Patience = None
    next_chunk_timeout: Patience = None
    sender_timeout: Patience = None
    reducer_timeout: Patience = None
    adaptive_timeouts: bool = False
    bandwidth: Annotated[float | None, Number(minimum=0, unit="Mbit/s")] = None
    allow_state_sharing: bool | None = None
    declare_state_period: Annotated[
        float, Number(MIN_DECLARE_STATE_PERIOD, maximum=MAX_DECLARE_STATE_PERIOD, unit="s")
    ] = DEFAULT_DECLARE_STATE_PERIOD
    max_state_age: Annotated[float | None, Number(minimum=0, unit="s")] = DEFAULT_MAX_STATE_AGE

    def __post_init__(self) -> None:
        check_options(self)
        _check_modes(self)

    @classmethod
    def of_user(cls, given: Mapping[str, Any]) -> AveragerConfig:
        """The configuration for the parameters of :class:`~shoal.DecentralizedAverager`.

        :raises InvalidTypeError: a value is of the wrong type
        :raises InvalidValueError: a value is out of range, or does not go with another one
        """
        search = {field.name: given[field.name] for field in fields(MatchmakingConfig)}
        return gather(cls, {**given, "matchmaking": matchmaking_config(**search)})

    @property
    def mode(self) -> PeerMode:
        """What this peer does in a group; where ``client_mode`` is None: if it can be dialed."""
        if self.client_mode:
            return PeerMode.CLIENT
        return PeerMode.AUXILIARY if self.auxiliary else PeerMode.FULL

    @property
    def effective_sender_timeout(self) -> float:
        """``sender_timeout`` or, by default, what follows from the other times."""
        return settle(vars(self)).sender_timeout

    @property
    def effective_reducer_timeout(self) -> float:
        """``reducer_timeout`` or, by default, what follows from the other times."""
        return settle(vars(self)).reducer_timeout

    @property
    def each_part(self) -> float | None:
        """Seconds that a member's parts may take on the average; None: no limit in all."""
        return settle(vars(self)).each_part


def _check_modes(config: AveragerConfig) -> None:
    """Where ``client_mode`` is None, this is checked again when the DHT's is known.

    :raises InvalidValueError: a combination that cannot be
    """
    if config.client_mode and config.auxiliary:
        raise InvalidValueError(
            "auxiliary must be False with client_mode=True, got True: a peer that can't be dialed has no way to assist "
            "others"
        )
    if config.client_mode and config.allow_state_sharing:
        raise InvalidValueError(
            "allow_state_sharing must be False or None with client_mode=True, got True: others can't dial this peer "
            "to download its state"
        )


def settle_modes(config: AveragerConfig, dht_is_client: bool) -> PeerMode:
    """What this peer does in a group, now that the DHT's client mode is known.

    :raises InvalidValueError: a combination that cannot be
    """
    if dht_is_client and config.client_mode is False:
        raise InvalidValueError(
            "client_mode must be True or None, got False: the averager's DHT is in client mode, so other peers can't "
            "dial it"
        )
    return replace(config, client_mode=bool(config.client_mode) or dht_is_client).mode


def default_start(now: float, deadline: float | None, settings: MatchmakingConfig) -> float:
    """When a group that is not full begins: after ``min_matchmaking_time``, or well before the deadline of a search
    that is shorter than that. All times are of one clock.
    """
    wait = settings.min_matchmaking_time
    return now + (wait if deadline is None else min(wait, START_BEFORE_DEADLINE * (deadline - now)))


def retry_start(planned: float, now: float, deadline: float | None, settings: MatchmakingConfig) -> float:
    """When a group that is not full begins after one has failed: as if the step were made ``now``, but not before the
    time that was ``planned``, which may be the user's. All times are of one clock.
    """
    return max(planned, default_start(now, deadline, settings))


def retry_pause(failures: int, time_left: float | None) -> float:
    """Seconds to wait after so many failures of one step before another group is looked for: whatever makes rounds fail
    may last, and each attempt costs all members of a group. The same for all that have failed as often, so that
    they meet again.

    :param time_left: until the deadline of the search; None: there is none
    """
    pause = min(MAX_RETRY_PAUSE, FIRST_RETRY_PAUSE * 2.0 ** min(failures - 1, 16))
    return pause if time_left is None else max(0.0, min(pause, time_left / 2))
