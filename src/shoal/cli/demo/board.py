"""What the peers of a demo declare in the DHT: its settings, and how each peer gets on.

What others declared is validated, and ignored if it is not as it should be.
"""

from __future__ import annotations

import asyncio
import logging
from concurrent.futures import Future
from typing import TypeVar

import msgspec

from shoal.cli.demo.protocol import Status
from shoal.cli.demo.settings import Settings
from shoal.dht.declaration_kind import DeclarationKind
from shoal.dht.dht import DHT
from shoal.dht.types import ValueWithExpiration
from shoal.dht.validation import protected_key
from shoal.errors import InvalidValueError, UsageError
from shoal.p2p.identity import PeerID
from shoal.utils.timed import get_dht_time

logger = logging.getLogger(__name__)

T = TypeVar("T", bound=msgspec.Struct)


def _kind(name: str, type_: type[T]) -> DeclarationKind[T]:
    """Declarations of a struct, stored as a dictionary of its fields."""

    def decode(value: object) -> T:
        try:
            return msgspec.convert(value, type_)
        except msgspec.ValidationError as error:
            raise InvalidValueError(str(error)) from error

    return DeclarationKind(name, msgspec.to_builtins, decode)


SETTINGS = _kind("the settings of a demo", Settings)
STATUSES = _kind("the status of a peer", Status)
SETTINGS_KEY = protected_key("demo/settings")
SETTINGS_LIFETIME = 1800.0
STATUS_LIFETIME = 2.0
"""Seconds after which a peer that writes no more is taken off the board. Until then the others wait in each round for
one that was killed; a peer writes every half a second."""


class Board:
    """What one peer of a demo declares, and what it reads of the others."""

    def __init__(self, dht: DHT) -> None:
        self._dht = dht
        self._own = dht.peer_id.to_bytes()

    # Settings

    def publish_settings(self, settings: Settings) -> None:
        """Let others join the demo that was started here, by the address of this DHT."""
        self._store(SETTINGS_KEY, SETTINGS.encode(settings), SETTINGS_LIFETIME).result()

    def read_settings(self, founder: PeerID) -> Settings:
        """:raises UsageError: the peer ``founder`` runs no demo"""
        try:
            settings = SETTINGS.of(founder, self._dht.get(SETTINGS_KEY, latest=True))
        except InvalidValueError as error:
            raise UsageError(f"the demo at {founder} is of another version of Shoal: {error}") from None
        if settings is None:
            raise UsageError(f"no demo runs at {founder}, or it has ended")
        return settings

    # Status

    def publish_status(self, prefix: str, status: Status) -> Future[bool]:
        return self._store(_status_key(prefix), STATUSES.encode(status), STATUS_LIFETIME)

    def read_statuses(self, prefix: str) -> list[Status]:
        """How every peer gets on, by its own account; ordered by PeerID."""
        return statuses_in(self.request_statuses(prefix).result())

    async def watch_statuses(self, prefix: str) -> list[Status]:
        """:meth:`read_statuses` without blocking the event loop."""
        return statuses_in(await asyncio.wrap_future(self.request_statuses(prefix)))

    def request_statuses(self, prefix: str) -> Future[ValueWithExpiration | None]:
        """What :func:`statuses_in` reads, once it has come."""
        return self._dht.get(_status_key(prefix), latest=True, return_future=True)

    def _store(self, key: bytes, value: object, lifetime: float) -> Future[bool]:
        expiration = get_dht_time() + lifetime
        return self._dht.store(key, value, expiration, subkey=self._own, return_future=True)


def _status_key(prefix: str) -> bytes:
    return protected_key(f"demo/status/{prefix}")


def statuses_in(found: ValueWithExpiration | None) -> list[Status]:
    """The valid ones, ordered by PeerID."""
    declared = sorted(STATUSES.all_in(found), key=lambda pair: pair[0].to_bytes())
    for peer, status in declared:
        if status.peer_id != str(peer):
            logger.debug("ignored a status of %s, because it calls itself %s", peer, status.peer_id)
    return [status for peer, status in declared if status.peer_id == str(peer)]
