"""Who shares its state: this peer's own declaration as a donor, kept alive and up to date, and everybody's, read."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass

from shoal.averaging.state.messages import (
    WITHDRAWN,
    DonorDeclaration,
    decode_donor,
    donors_key,
    encode_donor,
)
from shoal.dht.declaration_kind import DeclarationKind
from shoal.dht.declarations import Declarations, lifetime_for
from shoal.dht.node import DHTNode
from shoal.p2p.identity import PeerID
from shoal.utils.tasks import TaskSet

logger = logging.getLogger(__name__)

DONORS = DeclarationKind[DonorDeclaration]("a donor", encode_donor, decode_donor, WITHDRAWN)

WITHDRAWAL_TIMEOUT = 1.0
"""Seconds that :meth:`DonorDeclarations.close` gives the DHT to learn that this donor is gone."""


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
        self._key = donors_key(prefix)
        # A declaration may not live longer than the DHT allows, however long the period.
        self._period = min(period, node.config.max_expiration / 2)
        self._tasks = TaskSet()
        self._declarations = Declarations(
            node, DONORS, self._tasks, clock, lifetime=lifetime_for(self._period)
        )

    def start(self) -> None:
        """Declare this peer from now on, while it is a donor."""
        self._declarations.keep(
            self._key,
            self._describe,
            period=self._period,
            when_done=self._note_outcome,
        )

    def update(self, wish: Wish) -> None:
        """Tell the DHT at once if something has changed."""
        if wish != self._wish:
            self._wish = wish
            self._declarations.describe_again(self._key)

    async def read(self) -> list[tuple[PeerID, DonorDeclaration]]:
        """The other peers that share their state; unreadable declarations are left out.

        :raises ShoalError: the DHT could not be asked
        """
        declared = await self._declarations.read(self._key)
        return [(peer, donor) for peer, donor in declared if peer != self._node.peer_id]

    async def close(self) -> None:
        """Withdraw the declaration, if one may still be there."""
        await self._declarations.close(WITHDRAWAL_TIMEOUT)
        await self._tasks.close()

    def _describe(self) -> DonorDeclaration | None:
        # A peer that nobody can dial is no donor; one that was found undialable withdraws.
        host = self._node.host
        if not (self._wish.sharing and host.reachability.is_full):
            return None
        addresses = tuple(str(address) for address in host.announced_addresses)
        return DonorDeclaration(True, self._wish.priority, addresses)

    def _note_outcome(self, _: float, failure: str | None) -> None:
        if failure is not None:
            logger.warning(
                "%s: the DHT does not learn whether this peer shares its state: %s", self._prefix, failure
            )
