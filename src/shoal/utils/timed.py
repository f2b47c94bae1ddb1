"""The clock by which DHT records expire, and the type of its times."""

from __future__ import annotations

import time
from typing import TypeAlias

__all__ = ["DHTExpiration", "get_dht_time"]

DHTExpiration: TypeAlias = float
"""When a record expires: seconds as :func:`get_dht_time` counts them."""


def get_dht_time() -> float:
    """Seconds since the Unix epoch by this machine's own clock; peers never correct it."""
    return time.time()
