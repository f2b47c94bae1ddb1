"""Small types of the DHT that users meet."""

from __future__ import annotations

from typing import Any, NamedTuple, TypeAlias

__all__ = ["DHTValue", "ValueWithExpiration"]

DHTValue: TypeAlias = Any
"""What can be stored: whatever :class:`~shoal.utils.MSGPackSerializer` encodes."""


class ValueWithExpiration(NamedTuple):
    """A value got from the DHT, and until when it is valid.

    A key that was stored with sub-keys gives a dictionary ``{subkey: ValueWithExpiration}`` as its value, and
    the latest expiration among them.
    """

    value: Any
    expiration_time: float
    """Seconds since the epoch, as :func:`shoal.utils.timed.get_dht_time` counts them."""
