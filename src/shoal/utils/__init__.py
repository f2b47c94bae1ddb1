"""Small public helpers."""

from __future__ import annotations

from typing import TYPE_CHECKING

from shoal.utils.lazy import lazy_names

if TYPE_CHECKING:
    from shoal.utils.logging import get_logger
    from shoal.utils.serializer import MSGPackSerializer, SerializerBase
    from shoal.utils.timed import DHTExpiration, get_dht_time

__all__ = [
    "MSGPackSerializer",
    "SerializerBase",
    "get_dht_time",
    "DHTExpiration",
    "get_logger",
    # hivemind has these here, Shoal elsewhere: shoal.compat finds them.
    "ValueWithExpiration",
    "MPFuture",
    "use_hivemind_log_handler",
]

__getattr__, __dir__ = lazy_names(
    __name__,
    {
        "MSGPackSerializer": "shoal.utils.serializer",
        "SerializerBase": "shoal.utils.serializer",
        "get_dht_time": "shoal.utils.timed",
        "DHTExpiration": "shoal.utils.timed",
        "get_logger": "shoal.utils.logging",
    },
)
