"""Small public helpers, under the names that users of hivemind know."""

from __future__ import annotations

from typing import TYPE_CHECKING

from shoal.utils.lazy import lazy_names

if TYPE_CHECKING:
    from shoal.utils.logging import get_logger
    from shoal.utils.serializer import MSGPackSerializer
    from shoal.utils.timed import get_dht_time

__all__ = ["MSGPackSerializer", "get_dht_time", "get_logger"]

__getattr__, __dir__ = lazy_names(
    __name__,
    {
        "MSGPackSerializer": "shoal.utils.serializer",
        "get_dht_time": "shoal.utils.timed",
        "get_logger": "shoal.utils.logging",
    },
)
