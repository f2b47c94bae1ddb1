"""The settings of a DHT node, in one frozen dataclass that is validated where it is made."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from shoal.dht.messages import MAX_CONTACTS, MAX_ENTRIES
from shoal.dht.storage import StorageLimits
from shoal.p2p.config import CONGESTION_CONTROL, MAX_LANES, CongestionControl
from shoal.utils.checks import Count, Number
from shoal.utils.options import check_options

MAX_RECORD_SIZE = 768 * 1024
LEAST_RATE = 0.2
"""Mbit/s. At a lower one a step of a payload takes so long that peers would miss signs of life."""
"""A whole record travels in one message, which holds 1 MiB."""

_ONE_MESSAGE = "one message holds no more"

Seconds = Annotated[float, Number(minimum=0, unit="s")]
Period = Annotated[float, Number(above=0, unit="s")]


@dataclass(frozen=True)
class DHTConfig:
    """Times are in seconds, sizes in bytes. All nodes of one DHT should agree on the first two."""

    num_replicas: Annotated[int, Count(1)] = 5
    """How many of the nodes nearest to a key keep its record."""
    bucket_size: Annotated[int, Count(1, MAX_CONTACTS, "nodes", _ONE_MESSAGE)] = 20
    """How many nodes one k-bucket of the routing table holds (Kademlia's k)."""
    parallel_rpc: Annotated[int, Count(1)] = 3
    """How many nodes one search asks at a time (Kademlia's alpha)."""
    client_mode: bool = False
    """Keep no records and be in nobody's routing table. Set by itself where nobody can dial the host."""

    bootstrap_timeout: Seconds = 15.0
    """How long the initial peers are retried before ``create`` gives up."""
    ensure_bootstrap_success: bool = True
    """Whether ``create`` raises BootstrapError then; otherwise the search for initial peers goes on for ever."""
    check_reachability: bool = True
    """Whether peers are asked to dial this node back: when it joins, as the first node when the first one has come,
    when a peer may see it from farther away, when its addresses have changed, and every 3 minutes. Until one has
    answered, a node that joins counts as a client. False: what it announces is believed."""
    wait_timeout: Period = 3.0
    """How long one call to a peer may take, connecting included."""
    stall_timeout: Period = 0.7
    """After how long a search goes on without a node that has not answered yet."""

    refresh_timeout: Period = 60.0
    """How often parts of the table into which no search has looked are refreshed."""
    exchange_interval: Period = 12.0
    """How often neighbours are asked whom they know; right after a change it is more often."""

    cache_locally: bool = True
    """Keep what ``get`` found for ``cache_max_age``, and answer from there while ``latest`` is not asked for.
    """
    cache_max_age: Seconds = 10.0
    """How old a cached answer may be."""
    cache_size: Annotated[int, Count(0)] = 1000
    """How many keys are cached; also of how many keys the state is kept that makes polling cheap."""
    cache_on_store: bool = True
    """Bring the cache up to date by what this node itself stores."""
    cache_nearest: Annotated[int, Count(0)] = 1
    """At how many of the nearest nodes that lacked a record ``get`` leaves a copy of what it found."""
    cache_refresh_before_expiry: Seconds = 5.0
    """A cached answer that expires within this time is searched for again in the background when it is used.
    """
    reuse_get_requests: bool = True
    """Whether equal ``get`` calls made at the same time share one search."""

    max_lanes: Annotated[int, Count(1)] = MAX_LANES
    """How many connections may carry payloads at a time, to all peers together. How many do so follows what is measured
    on each path: one where it is short, more where packets are lost at random."""
    max_upload_rate: Annotated[float | None, Number(minimum=LEAST_RATE, unit="Mbit/s")] = None
    """Of tensors that are sent to all peers together; None: no limit."""
    max_download_rate: Annotated[float | None, Number(minimum=LEAST_RATE, unit="Mbit/s")] = None
    """The same of what is received."""
    congestion_control: Annotated[str, CongestionControl] = CONGESTION_CONTROL
    """Of connections that carry payloads over long paths, where the system lets this process choose; empty: as the
    system has it."""

    max_value_size: Annotated[int, Count(0, MAX_RECORD_SIZE, "bytes", _ONE_MESSAGE)] = 128 * 1024
    """Of one value, serialized and signed."""
    max_record_size: Annotated[int, Count(0, MAX_RECORD_SIZE, "bytes", _ONE_MESSAGE)] = 512 * 1024
    """Of all sub-keys and values of one key."""
    max_subkeys: Annotated[int, Count(1, MAX_ENTRIES, "sub-keys", _ONE_MESSAGE)] = 4096
    """Of one key."""
    max_records: Annotated[int, Count(1)] = 100_000
    """How many records of other nodes this one keeps."""
    max_storage_size: Annotated[int, Count(0, unit="bytes")] = 64 * 1024 * 1024
    """Of all records that this node keeps."""
    max_expiration: Seconds = 3600.0
    """How far ahead a value may expire."""

    def __post_init__(self) -> None:
        check_options(self)

    def storage_limits(self) -> StorageLimits:
        """The part of the settings that bounds the node's storage."""
        return StorageLimits(
            max_value_size=self.max_value_size,
            max_record_size=self.max_record_size,
            max_subkeys=self.max_subkeys,
            max_records=self.max_records,
            max_total_size=self.max_storage_size,
            max_expiration=self.max_expiration,
        )


@dataclass(frozen=True)
class ProcessConfig:
    """The options of a :class:`~shoal.DHT` that only the user's process has to know."""

    start: bool
    daemon: bool = True
    shutdown_timeout: Seconds = 3
    await_ready: bool = True

    def __post_init__(self) -> None:
        check_options(self)
