"""The settings of a DHT node, in one frozen dataclass that is validated where it is made."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields

from shoal.dht.messages import MAX_CONTACTS, MAX_ENTRIES
from shoal.dht.storage import StorageLimits
from shoal.errors import InvalidValueError

MAX_RECORD_SIZE = 768 * 1024
"""A whole record travels in one message, which holds 1 MiB."""


@dataclass(frozen=True)
class DHTConfig:
    """Times are in seconds, sizes in bytes. All nodes of one DHT should agree on the first two."""

    num_replicas: int = 5
    """How many of the nodes nearest to a key keep its record."""
    bucket_size: int = 20
    """How many nodes one k-bucket of the routing table holds (Kademlia's k)."""
    parallel_rpc: int = 3
    """How many nodes one search asks at a time (Kademlia's alpha)."""
    client_mode: bool = False
    """Keep no records and be in nobody's routing table. Set by itself where nobody can dial the host."""

    bootstrap_timeout: float = 15.0
    """How long the initial peers are retried before ``create`` gives up."""
    ensure_bootstrap_success: bool = True
    """Whether ``create`` raises BootstrapError then; otherwise the search for initial peers goes on for ever."""
    check_reachability: bool = True
    """Whether peers are asked to dial this node back: when it joins, as the first node when the first one has come,
    when a peer may see it from farther away, when its addresses have changed, and every 3 minutes. Until one has
    answered, a node that joins counts as a client. False: what it announces is believed."""
    wait_timeout: float = 3.0
    """How long one call to a peer may take, connecting included."""
    stall_timeout: float = 0.7
    """After how long a search goes on without a node that has not answered yet."""

    refresh_timeout: float = 60.0
    """How often parts of the table into which no search has looked are refreshed."""
    exchange_interval: float = 12.0
    """How often neighbours are asked whom they know; right after a change it is more often."""

    cache_locally: bool = True
    """Keep what ``get`` found for ``cache_max_age``, and answer from there while ``latest`` is not asked for.
    """
    cache_max_age: float = 10.0
    """How old a cached answer may be."""
    cache_size: int = 1000
    """How many keys are cached; also of how many keys the state is kept that makes polling cheap."""
    cache_on_store: bool = True
    """Bring the cache up to date by what this node itself stores."""
    cache_nearest: int = 1
    """At how many of the nearest nodes that lacked a record ``get`` leaves a copy of what it found."""
    cache_refresh_before_expiry: float = 5.0
    """A cached answer that expires within this time is searched for again in the background when it is used.
    """
    reuse_get_requests: bool = True
    """Whether equal ``get`` calls made at the same time share one search."""

    max_value_size: int = 128 * 1024
    """Of one value, serialized and signed."""
    max_record_size: int = 512 * 1024
    """Of all sub-keys and values of one key."""
    max_subkeys: int = 4096
    max_records: int = 100_000
    max_storage_size: int = 64 * 1024 * 1024
    max_expiration: float = 3600.0
    """How far ahead a record may expire."""

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if field.type == "float" and not (value >= 0 and math.isfinite(value)):
                raise InvalidValueError(f"{field.name}: {value!r} is not a finite number >= 0")
            if field.type == "int" and not (value >= 0 and value == int(value)):
                raise InvalidValueError(f"{field.name}: {value!r} is not a whole number >= 0")
        for name in ("num_replicas", "bucket_size", "parallel_rpc", "max_subkeys", "max_records"):
            if getattr(self, name) < 1:
                raise InvalidValueError(f"{name}: {getattr(self, name)!r} is not at least 1")
        for name in ("wait_timeout", "stall_timeout", "refresh_timeout", "exchange_interval"):
            if getattr(self, name) <= 0:
                raise InvalidValueError(f"{name}: {getattr(self, name)!r} is not positive")
        most = {
            "max_value_size": MAX_RECORD_SIZE,
            "max_record_size": MAX_RECORD_SIZE,
            "max_subkeys": MAX_ENTRIES,
            "bucket_size": MAX_CONTACTS,
        }
        for name, limit in most.items():
            if getattr(self, name) > limit:
                raise InvalidValueError(
                    f"{name}: {getattr(self, name)!r} is more than {limit}, which one message holds"
                )

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
