"""The settings of an averager, validated where they are made, before any process starts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import torch

from shoal.averaging.checks import MAX_WAIT, check_bits, check_count, check_flag, check_number, check_string
from shoal.averaging.group import MAX_GROUP_SIZE, PeerMode, group_key
from shoal.averaging.matchmaking_config import MatchmakingConfig
from shoal.averaging.timeouts import given_times, settle
from shoal.compression import CompressionBase, CompressionInfo
from shoal.compression.registry import CODECS
from shoal.errors import InvalidTypeError, InvalidValueError
from shoal.utils.ordering import DefaultSeconds
from shoal.utils.scalars import plain

DEFAULT_PART_SIZE_BYTES = 1 << 19
MIN_PART_SIZE_BYTES = 1 << 10
MAX_PART_SIZE_BYTES = 1 << 26
"""The largest payload that a connection takes."""

MAX_ALPHA = 2.0
"""A round leaves ``abs(1 - alpha)`` of a peer's distance to the average: with more than this, peers would drift further
apart in every round, and at last to infinity.
"""

START_BEFORE_DEADLINE = 0.8
MAX_VECTOR_SIZE = 1 << 62
FIRST_RETRY_PAUSE = 0.1
MAX_RETRY_PAUSE = 5.0
DEFAULT_DECLARE_STATE_PERIOD = DefaultSeconds(30.0)
DEFAULT_MAX_STATE_AGE = 60.0
MIN_DECLARE_STATE_PERIOD = 0.1
MAX_DECLARE_STATE_PERIOD = 3000.0
"""Seconds; with the time until it expires, a declaration stays below the hour that the DHT keeps records."""


@dataclass(frozen=True)
class AveragerConfig:
    """Everything but the tensors that the background process has to know. Times in seconds."""

    prefix: str
    matchmaking: MatchmakingConfig
    client_mode: bool | None
    """None: as the DHT, which is known when the averager starts."""
    auxiliary: bool = False
    initial_group_bits: str = ""
    part_size_bytes: int = DEFAULT_PART_SIZE_BYTES
    min_vector_size: int = 0
    """Elements: members whose span would be smaller own nothing."""
    allreduce_timeout: float | None = None
    next_chunk_timeout: float | None = None
    sender_timeout: float | None = None
    reducer_timeout: float | None = None
    bandwidth: float | None = None
    """Mbit/s; None: as the mean of the group's members that gave theirs."""
    allow_state_sharing: bool | None = None
    """None: unless in client mode or auxiliary."""
    declare_state_period: float = DEFAULT_DECLARE_STATE_PERIOD
    max_state_age: float | None = DEFAULT_MAX_STATE_AGE

    def __post_init__(self) -> None:
        for field in fields(self):  # numbers of numpy are not for the other process
            object.__setattr__(self, field.name, plain(getattr(self, field.name)))
        _check_prefix(self.prefix)
        check_bits("initial_group_bits", self.initial_group_bits)
        check_flag("auxiliary", self.auxiliary)
        for name, flag in (
            ("client_mode", self.client_mode),
            ("allow_state_sharing", self.allow_state_sharing),
        ):
            if flag is not None:
                check_flag(name, flag)
        _check_modes(self)
        check_count("part_size_bytes", self.part_size_bytes, MIN_PART_SIZE_BYTES, MAX_PART_SIZE_BYTES)
        check_count("min_vector_size", self.min_vector_size, 0, MAX_VECTOR_SIZE)
        for name in ("allreduce_timeout", "next_chunk_timeout", "sender_timeout", "reducer_timeout"):
            if getattr(self, name) is not None:
                check_number(name, getattr(self, name), above=0)
        if self.bandwidth is not None:
            check_number("bandwidth", self.bandwidth, minimum=0)
        check_number(
            "declare_state_period",
            self.declare_state_period,
            minimum=MIN_DECLARE_STATE_PERIOD,
            maximum=MAX_DECLARE_STATE_PERIOD,
        )
        if self.max_state_age is not None:
            check_number("max_state_age", self.max_state_age, minimum=0)

    @property
    def mode(self) -> PeerMode:
        """What this peer does in a group; where ``client_mode`` is None: if it can be dialed."""
        if self.client_mode:
            return PeerMode.CLIENT
        return PeerMode.AUXILIARY if self.auxiliary else PeerMode.FULL

    @property
    def effective_sender_timeout(self) -> float | None:
        """``sender_timeout`` or, by default, what follows from the other times."""
        return settle(self._times).sender_timeout

    @property
    def effective_reducer_timeout(self) -> float | None:
        """``reducer_timeout`` or, by default, what follows from the other times."""
        return settle(self._times).reducer_timeout

    @property
    def _times(self) -> dict[str, float | None]:
        names = ("allreduce_timeout", "next_chunk_timeout", "sender_timeout", "reducer_timeout")
        return {name: getattr(self, name) for name in names}


def _check_modes(config: AveragerConfig) -> None:
    """Where ``client_mode`` is None, this is checked again when the DHT's is known.

    :raises InvalidValueError: a combination that cannot be
    """
    if config.client_mode and config.auxiliary:
        raise InvalidValueError(
            "auxiliary=True with client_mode=True: a peer that can't be dialed has no way to assist others; "
            "one of both is allowed"
        )
    if config.client_mode and config.allow_state_sharing:
        raise InvalidValueError(
            "allow_state_sharing=True with client_mode=True: others can't dial this peer to download its "
            "state; False or None is allowed"
        )


def settle_modes(config: AveragerConfig, dht_is_client: bool) -> PeerMode:
    """What this peer does in a group, now that the DHT's client mode is known.

    :raises InvalidValueError: a combination that cannot be
    """
    if dht_is_client and config.client_mode is False:
        raise InvalidValueError(
            "client_mode=False: the averager's DHT is in client mode, so other peers can't dial it; "
            "True or None is allowed"
        )
    return replace(config, client_mode=bool(config.client_mode) or dht_is_client).mode


def _check_prefix(prefix: Any) -> None:
    check_string("prefix", prefix)
    group_key(prefix)
    try:
        prefix.encode()
    except UnicodeEncodeError:
        raise InvalidValueError(f"prefix={prefix!r}: text that can be written in UTF-8 is allowed") from None


def check_codec(name: str, codec: Any) -> None:
    """:raises InvalidTypeError: ``codec`` is no codec object
    :raises InvalidValueError: a plain codec that receivers would not find under its id, or with other settings;
      those that an adaptive codec chooses are checked when they are known
    """
    if not isinstance(codec, CompressionBase):
        raise InvalidTypeError(
            f"{name}={codec!r}: an object of a CompressionBase subclass is allowed, "
            "e.g. shoal.Float16Compression()"
        )
    if codec.is_plain:
        CODECS.check(name, codec)


def choose_codecs(
    tensors: Sequence[torch.Tensor], compression: CompressionBase, infos: Sequence[CompressionInfo] | None
) -> list[CompressionBase]:
    """The codec of each tensor, known to the registry by its wire id.

    :param infos: as :func:`check_infos` returns them; None: the number of a tensor is its key
    :raises InvalidValueError: a codec that was not registered, or with other settings
    """
    if infos is None:
        infos = [CompressionInfo.from_tensor(tensor, key=index) for index, tensor in enumerate(tensors)]
    codecs = [compression.choose(info) for info in infos]
    for codec in codecs:
        CODECS.check("compression", codec)
    return codecs


def check_infos(tensors: Sequence[torch.Tensor], tensor_infos: Any) -> tuple[CompressionInfo, ...] | None:
    """
    :param tensor_infos: any iterable of a :class:`~shoal.compression.CompressionInfo` for each tensor, or None
    :raises InvalidTypeError: not an iterable of such objects
    :raises InvalidValueError: another number of items than tensors, or an item of another shape or dtype
    """
    if tensor_infos is None:
        return None
    try:
        infos = tuple(tensor_infos)
    except TypeError:
        raise InvalidTypeError(
            f"tensor_infos={tensor_infos!r}: None or a CompressionInfo for each tensor is allowed"
        ) from None
    if len(infos) != len(tensors):
        raise InvalidValueError(
            f"tensor_infos has {len(infos)} items for {len(tensors)} averaged tensors; one for each is allowed"
        )
    for index, (info, tensor) in enumerate(zip(infos, tensors, strict=True)):
        if not isinstance(info, CompressionInfo):
            raise InvalidTypeError(
                f"tensor_infos[{index}]={info!r}: a CompressionInfo is allowed, "
                "e.g. CompressionInfo.from_tensor(tensor)"
            )
        if (tuple(info.shape), info.dtype) != (tuple(tensor.shape), tensor.dtype):
            raise InvalidValueError(
                f"tensor_infos[{index}] describes {info.dtype} {list(info.shape)}, but averaged_tensors[{index}] is "
                f"{tensor.dtype} {list(tensor.shape)}"
            )
    return infos


def matchmaking_config(
    target_group_size: Any, min_group_size: Any, min_matchmaking_time: Any, request_timeout: Any
) -> MatchmakingConfig:
    """Group sizes and search times; types are checked here, ranges where the object is made."""
    if target_group_size is not None:
        target_group_size = check_count("target_group_size", target_group_size, 1, MAX_GROUP_SIZE)
    min_group_size = check_count("min_group_size", min_group_size, 1, MAX_GROUP_SIZE)
    check_number("min_matchmaking_time", min_matchmaking_time, above=0, maximum=MAX_WAIT)
    check_number("request_timeout", request_timeout, above=0)
    times = settle(given_times(min_matchmaking_time=min_matchmaking_time, request_timeout=request_timeout))
    wait = min(times.min_matchmaking_time, MAX_WAIT)
    return MatchmakingConfig(target_group_size, min_group_size, wait, times.request_timeout)


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
