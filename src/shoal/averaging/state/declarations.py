"""Who shares its state: this peer's own declaration in the DHT, kept alive and up to date, and everybody's, read."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable
from dataclasses import dataclass

from shoal.averaging.state.messages import DonorDeclaration, decode_donor, donors_key, encode_donor
from shoal.dht.node import DHTNode
from shoal.dht.validation import protected_key
from shoal.errors import InvalidValueError, ShoalError
from shoal.p2p.identity import PeerID
from shoal.utils.tasks import TaskSet

logger = logging.getLogger(__name__)

WITHDRAWAL_TIMEOUT = 1.0
"""Seconds that :meth:`DonorDeclarations.close` gives the DHT to learn that this donor is gone."""
RETRY_PERIOD = 5.0
"""Seconds after which a declaration that the DHT did not take is tried again."""
MAX_SLACK = 30.0
"""Seconds by which a declaration outlives the period at the end of which it is renewed, at most."""


@dataclass(frozen=True)
class Wish:
    """Whether this peer shares its state, and how gladly others should take it from here."""

    sharing: bool
    priority: float


class DonorDeclarations:
    """Declares one averager as a donor every ``period`` seconds, and at once when its user's wishes change."""

    def __init__(
        self, node: DHTNode, prefix: str, wish: Wish, *, period: float, clock: Callable[[], float]
    ) -> None:
        self._node = node
        self._prefix = prefix
        self._wish = wish
        self._clock = clock
        # A declaration may not live longer than the DHT allows, however long the period.
        self._period = min(period, node.config.max_expiration / 2)
        self._changed = asyncio.Event()
        self._tasks = TaskSet()
        self._last_expiration = 0.0
        self._is_declared = False

    def start(self) -> None:
        """Begin to declare."""
        self._tasks.start(self._declare_forever(), f"declare the donor of {self._prefix}")

    def update(self, wish: Wish) -> None:
        """Tell the DHT at once if something has changed."""
        if wish != self._wish:
            self._wish = wish
            self._changed.set()

    async def read(self) -> list[tuple[PeerID, DonorDeclaration]]:
        """The other peers that share their state; unreadable declarations are left out.

        :raises ShoalError: the DHT could not be asked
        """
        found = await self._node.get(protected_key(donors_key(self._prefix)), latest=True)
        donors = []
        if found is None or not isinstance(found.value, dict):
            return []
        for subkey, record in found.value.items():
            try:
                peer, declaration = PeerID.from_bytes(subkey), decode_donor(record.value)
            except (InvalidValueError, TypeError) as e:
                logger.debug("an unreadable declaration of a donor of %s: %s", self._prefix, e)
                continue
            if declaration.sharing and peer != self._node.peer_id:
                donors.append((peer, declaration))
        return donors

    async def close(self) -> None:
        """Withdraw the declaration, if one may still be there."""
        await self._tasks.close()
        self._wish = Wish(False, 0.0)
        if self._is_declared:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(WITHDRAWAL_TIMEOUT):
                    await self._declare()

    async def _declare_forever(self) -> None:
        while True:
            self._changed.clear()
            # A peer that nobody can dial is no donor; one that was found undialable withdraws.
            told = await self._declare() if self._is_donor() or self._is_declared else True
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(self._period if told else min(self._period, RETRY_PERIOD)):
                    await self._changed.wait()

    def _is_donor(self) -> bool:
        return self._wish.sharing and self._node.host.reachability.is_full

    async def _declare(self) -> bool:
        """Tell the DHT once; whether it was heard."""
        is_donor = self._is_donor()
        lifetime = self._period + min(self._period, MAX_SLACK) if is_donor else 0.0
        # Of two records of one sub-key the DHT keeps the one that expires later: each must outlast the one before.
        expiration = max(self._clock() + lifetime, self._last_expiration + 0.001)
        addresses = tuple(str(address) for address in self._node.host.announced_addresses)
        value = encode_donor(DonorDeclaration(is_donor, self._wish.priority, addresses if is_donor else ()))
        try:
            stored = await self._node.store(
                protected_key(donors_key(self._prefix)),
                value,
                expiration,
                subkey=self._node.peer_id.to_bytes(),
            )
        except ShoalError as e:
            reason: object = e
        else:
            if stored:
                self._last_expiration, self._is_declared = expiration, is_donor
                return True
            reason = "no node accepted the declaration"
        logger.warning(
            "%s: the DHT does not learn whether this peer shares its state: %s", self._prefix, reason
        )
        return False
