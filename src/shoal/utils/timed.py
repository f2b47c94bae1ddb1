"""The clock by which DHT records expire."""

from __future__ import annotations

import time

__all__ = ["get_dht_time"]


def get_dht_time() -> float:
    """Seconds since the Unix epoch by this machine's own clock; peers never correct it."""
    return time.time()
