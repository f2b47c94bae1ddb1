"""Small public helpers, under the names that users of hivemind know."""

from __future__ import annotations

from typing import TYPE_CHECKING

from shoal.utils.lazy import lazy_names

if TYPE_CHECKING:
    from shoal.dht.types import ValueWithExpiration
    from shoal.runtime.futures import MPFuture
    from shoal.utils.logging import get_logger, use_hivemind_log_handler
    from shoal.utils.serializer import MSGPackSerializer, SerializerBase
    from shoal.utils.timed import DHTExpiration, get_dht_time

__all__ = [
    "MSGPackSerializer",
    "SerializerBase",
    "get_dht_time",
    "DHTExpiration",
    "ValueWithExpiration",
    "MPFuture",
    "get_logger",
    "use_hivemind_log_handler",
]

_SUBMODULES = ("logging", "serializer")

__getattr__, __dir__ = lazy_names(
    __name__,
    {submodule: f"{__name__}.{submodule}" for submodule in _SUBMODULES}
    | {
        "MSGPackSerializer": "shoal.utils.serializer",
        "SerializerBase": "shoal.utils.serializer",
        "get_dht_time": "shoal.utils.timed",
        "DHTExpiration": "shoal.utils.timed",
        # These two live in higher layers: loaded only for those who ask, as users of hivemind do here.
        "ValueWithExpiration": "shoal.dht.types",
        "MPFuture": "shoal.runtime.futures",
        "get_logger": "shoal.utils.logging",
        "use_hivemind_log_handler": "shoal.utils.logging",
    },
)
