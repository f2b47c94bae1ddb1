"""What an averager is made of in the user's process, and how it is put together from the arguments of its constructor.

No part refers to the averager strongly, so that one that nobody refers to any more is collected.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from shoal.averaging.checks import OrderOfTimes
from shoal.averaging.config import AveragerConfig, settle_modes
from shoal.averaging.partition import Layout, Partition
from shoal.averaging.schema import TensorSchema
from shoal.averaging.timeouts import RECORD_TIME, times_in_order
from shoal.averaging.trainer.arena import TensorArena
from shoal.averaging.trainer.codecs import check_codec, check_infos, choose_codecs
from shoal.averaging.trainer.config import TrainerConfig
from shoal.averaging.trainer.holders import UsageWatch
from shoal.averaging.trainer.in_place import InPlaceTransfer
from shoal.averaging.trainer.late import LateAverage
from shoal.averaging.trainer.link import Link
from shoal.averaging.trainer.lost_updates import UpdateWatch
from shoal.averaging.trainer.pending import WATCH_ADVICE, AverageWriter
from shoal.averaging.trainer.shared_buffers import SharedBuffers, check_outside
from shoal.averaging.trainer.sources import NamedTensors, TensorSource, take_tensors, warn_of_frozen
from shoal.averaging.trainer.state_sharing import HasState, StateSharing
from shoal.averaging.trainer.steps import Steps
from shoal.averaging.trainer.tensor_checks import check_tensors
from shoal.averaging.trainer.tensors import TensorStore
from shoal.compression import CompressionInfo
from shoal.dht.dht import DHT
from shoal.errors import InvalidTypeError, InvalidValueError
from shoal.utils.options import gather


@dataclass(frozen=True)
class Parts:
    """The parts of one averager."""

    own: TrainerConfig
    """Options that the background process need not know."""
    config: AveragerConfig
    schema: TensorSchema
    infos: Sequence[CompressionInfo] | None
    source: TensorSource | None
    """Where the tensors are found anew in each round. ``store`` refers to it weakly: it may refer to the averager."""
    store: TensorStore
    usage: UsageWatch | None
    """Looks whether the tensors are still used, if nothing finds them anew."""
    states: StateSharing
    order: OrderOfTimes
    steps: Steps
    writer: AverageWriter
    late: LateAverage
    link: Link


def make_parts(averager: HasState, averaged_tensors: Any, dht: Any, given: Mapping[str, Any]) -> Parts:
    """Check all that the constructor of ``averager`` was given, and make its parts.

    :param given: the arguments by name; others are ignored, since each configuration takes what is its own
    :raises InvalidTypeError: an argument of the wrong type
    :raises InvalidValueError: a value out of range, or arguments that contradict each other
    """
    own, config = _configure(dht, given)
    buffers = averaged_tensors if isinstance(averaged_tensors, SharedBuffers) else None
    if buffers is None:
        named, source = take_tensors(averaged_tensors)
    else:
        named, source = _take_buffers(buffers, own), None
    check_tensors(named.tensors, named.labels)
    if buffers is None:
        check_outside(named.tensors, named.labels)
    infos = check_infos(named.tensors, given["tensor_infos"])
    schema = TensorSchema.from_tensors(
        named.tensors, choose_codecs(named.tensors, given["compression"], infos)
    )
    store = _make_store(named, source, schema, own, config)
    is_given_once = source is None and not config.auxiliary
    usage = UsageWatch(store.tensors, named.labels, config.prefix) if is_given_once else None
    warn_of_frozen(named, config.prefix)
    states = StateSharing(
        averager,
        store,
        prefix=config.prefix,
        compression=given["state_compression"],
        allowed=config.allow_state_sharing,
    )
    order = OrderOfTimes(config.prefix, times_in_order(given))
    order.check(RECORD_TIME, dht._setup.config.max_expiration / 2)
    transfer = None if buffers is None else InPlaceTransfer(buffers, store)
    arena = TensorArena(store, transfer, alpha=float(own.averaging_alpha), auxiliary=config.auxiliary)
    late = LateAverage(arena, config.prefix)
    states.when_loaded = partial(late.drop, "a state was loaded, which may hold it already")
    steps = Steps(store, config.matchmaking, config.prefix, late, order)
    writer = AverageWriter(arena, on_call=own.apply_when == "called", name=config.prefix)
    link = Link(config, writer, steps, states)
    return Parts(own, config, schema, infos, source, store, usage, states, order, steps, writer, late, link)


def _take_buffers(buffers: SharedBuffers, own: TrainerConfig) -> NamedTensors:
    """:raises InvalidValueError: an option that is for tensors which are copied"""
    buffers._check_process()
    if own.detect_lost_updates:
        raise InvalidValueError(
            "detect_lost_updates must be False for SharedBuffers, got True: no copy shows what they should hold; make "
            "them with debug=True, which notices writes while a round runs"
        )
    return NamedTensors(buffers.tensors, buffers._labels)


def _configure(dht: Any, given: Mapping[str, Any]) -> tuple[TrainerConfig, AveragerConfig]:
    if not isinstance(dht, DHT):
        raise InvalidTypeError(f"dht must be a shoal.DHT, got {dht!r}")
    own, config = gather(TrainerConfig, given), AveragerConfig.of_user(given)
    known = dht._last_description
    if known is not None:  # else, or if that has changed, the start finds it out
        settle_modes(config, known.client_mode)
    if not own.daemon and dht.daemon:
        raise InvalidValueError(
            "daemon=False: the averager lives in the background process of its DHT, which was made with daemon=True"
        )
    check_codec("compression", given["compression"])
    check_codec("state_compression", given["state_compression"])
    return own, config


def _make_store(
    named: NamedTensors,
    source: TensorSource | None,
    schema: TensorSchema,
    own: TrainerConfig,
    config: AveragerConfig,
) -> TensorStore:
    layout = Layout.from_schema(schema)
    # Raises if there would be too many parts: now, and not in the first round.
    Partition.create(layout, [layout.data_nbytes], config.part_size_bytes)
    watch = UpdateWatch(
        config.prefix,
        WATCH_ADVICE[own.apply_when],
        labels=named.labels,
        compares=own.detect_lost_updates,
        updates_while_copying=own.apply_when == "called",
    )
    return TensorStore(named.tensors, layout, named.labels, source, name=config.prefix, watch=watch)
