"""What the peers of a demo tell each other through the DHT: its settings, and how each peer gets on.

All records are protected: each peer writes under its own PeerID, signed. What others wrote is validated, and
ignored if it is not as it should be.
"""

from __future__ import annotations

import asyncio
import logging
from concurrent.futures import Future
from typing import Any

import msgspec

from shoal.cli.demo.protocol import Status
from shoal.cli.demo.settings import Settings
from shoal.dht.dht import DHT
from shoal.dht.types import ValueWithExpiration
from shoal.dht.validation import protected_key
from shoal.errors import UsageError
from shoal.p2p.identity import PeerID
from shoal.utils.timed import get_dht_time

logger = logging.getLogger(__name__)

SETTINGS_KEY = protected_key("demo/settings")
SETTINGS_LIFETIME = 1800.0
STATUS_LIFETIME = 2.0
"""Seconds after which a peer that writes no more is taken off the board. Until then the others wait in each round for
one that was killed; a peer writes every half a second."""


class Board:
    """One peer's view of the records of a demo."""

    def __init__(self, dht: DHT) -> None:
        self._dht = dht
        self._own = dht.peer_id.to_bytes()

    # Settings

    def publish_settings(self, settings: Settings) -> None:
        """Let others join the demo that was started here, by the address of this DHT."""
        self._store(SETTINGS_KEY, settings, SETTINGS_LIFETIME).result()

    def read_settings(self, founder: PeerID) -> Settings:
        """:raises UsageError: the peer ``founder`` runs no demo"""
        values = _values(self._dht.get(SETTINGS_KEY, latest=True))
        try:
            return msgspec.convert(values[founder.to_bytes()], Settings)
        except KeyError:
            raise UsageError(f"no demo runs at {founder}, or it has ended") from None
        except msgspec.ValidationError as error:
            raise UsageError(f"the demo at {founder} is of another version of Shoal: {error}") from None

    # Status

    def publish_status(self, prefix: str, status: Status) -> Future[bool]:
        return self._store(_status_key(prefix), status, STATUS_LIFETIME)

    def read_statuses(self, prefix: str) -> list[Status]:
        """How every peer gets on, by its own account; ordered by PeerID."""
        return statuses_in(self.request_statuses(prefix).result())

    async def watch_statuses(self, prefix: str) -> list[Status]:
        """:meth:`read_statuses` without blocking the event loop."""
        return statuses_in(await asyncio.wrap_future(self.request_statuses(prefix)))

    def request_statuses(self, prefix: str) -> Future[ValueWithExpiration | None]:
        """What :func:`statuses_in` reads, once it has come."""
        return self._dht.get(_status_key(prefix), latest=True, return_future=True)

    def _store(self, key: bytes, value: Settings | Status, lifetime: float) -> Future[bool]:
        return self._dht.store(
            key,
            msgspec.to_builtins(value),
            get_dht_time() + lifetime,
            subkey=self._own,
            return_future=True,
        )


def _status_key(prefix: str) -> bytes:
    return protected_key(f"demo/status/{prefix}")


def _values(found: ValueWithExpiration | None) -> dict[Any, Any]:
    """The values of a dictionary record by their sub-keys."""
    if found is None or not isinstance(found.value, dict):
        return {}
    return {subkey: entry.value for subkey, entry in found.value.items()}


def statuses_in(found: ValueWithExpiration | None) -> list[Status]:
    """The valid ones, ordered by PeerID."""
    statuses = []
    for subkey, value in sorted(_values(found).items()):
        try:
            status = msgspec.convert(value, Status)
            if status.peer_id != str(PeerID.from_bytes(subkey)):
                raise msgspec.ValidationError(f"it calls itself {status.peer_id}")
        except msgspec.ValidationError as error:
            logger.debug("ignored a status that a peer stored: %s", error)
        else:
            statuses.append(status)
    return statuses
