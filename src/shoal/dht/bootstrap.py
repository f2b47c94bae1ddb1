"""The initial peers of a node: found when it starts, looked after as long as it lives.

Each address has a task that calls it until it answers, and again whenever its peer has left the routing table. So two
DHTs whose nodes were given the same initial peers become one, and a node that lost everybody finds back.
"""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import Callable, Sequence

from shoal.dht.neighbours import Neighbours
from shoal.dht.tasks import TaskSet
from shoal.errors import DeadlineExceeded, DialOutcome, IdentityInUse, InvalidValueError, PeerUnreachable
from shoal.p2p.identity import PeerID
from shoal.p2p.multiaddr import Multiaddr

logger = logging.getLogger(__name__)

FIRST_DELAY = 0.2
MAX_DELAY_BEFORE_FIRST = 2.0
"""Pause between tries while the node knows nobody at all."""
MAX_DELAY = 30.0
"""Pause between tries of one address while the node has other neighbours."""


class InitialPeers:
    """See the module. ``on_found`` is called each time an initial peer answers after it was not in the table."""

    def __init__(
        self,
        neighbours: Neighbours,
        addresses: Sequence[Multiaddr],
        tasks: TaskSet,
        rng: random.Random,
        on_found: Callable[[PeerID], None],
    ) -> None:
        self.failures: dict[str, str] = {}
        """Why each address did not answer when it was last tried."""
        self.found: dict[str, PeerID] = {}
        """Who answered at each address."""
        self._neighbours = neighbours
        self._addresses = {str(address): address for address in addresses}
        self._own = {text for text, address in self._addresses.items() if self._is_own(address)}
        self._tasks = tasks
        self._rng = rng
        self._on_found = on_found
        self._changed = asyncio.Event()
        self._hurry = {text: asyncio.Event() for text in self._addresses}

    @property
    def includes_self(self) -> bool:
        """Whether this node is one of the initial peers."""
        return bool(self._own)

    @property
    def others(self) -> list[str]:
        """The addresses that are not this node's own."""
        return [text for text in self._addresses if text not in self._own]

    async def find_first(self, timeout: float) -> bool:
        """Start looking for the initial peers. True as soon as one has answered.

        False if nobody did: after ``timeout`` seconds; or, where this node is one of the initial peers itself, once
        all others were tried, because then it may have to be the first.
        """
        for text in self.others:
            self._tasks.start(self._keep(text), f"dht-initial-peer-{text}")
        for text in self._own:
            if self._addresses[text].peer_id is not None:
                self._tasks.start(self._watch_own(text), f"dht-own-address-{text}")
        try:
            async with asyncio.timeout(timeout):
                while self.others and not self.found and self._neighbours.host.tenancy.rival is None:
                    if self.includes_self and all(text in self.failures for text in self.others):
                        break
                    self._changed.clear()
                    await self._changed.wait()
        except TimeoutError:
            pass
        return bool(self.found)

    def retry_soon(self) -> None:
        """The network may be back, or is needed badly: try the missing ones now."""
        for event in self._hurry.values():
            event.set()

    async def _keep(self, text: str) -> None:
        """Look after one address for ever, or until it turns out to be this node's own."""
        delay = FIRST_DELAY
        while text not in self._own:
            peer = self.found.get(text)
            if peer is None or peer not in self._neighbours.table:
                peer = await self._try(text)
                self._changed.set()
            if peer is not None:
                delay = MAX_DELAY
            await self._pause(text, delay)
            alone = not len(self._neighbours.table)
            delay = min(2 * delay, MAX_DELAY_BEFORE_FIRST if alone else MAX_DELAY)

    async def _watch_own(self, text: str) -> None:
        """An address with this node's own PeerID: until it leads here, another peer may start there."""
        try:
            while True:
                (dial,) = await self._neighbours.host.ask_rivals([self._addresses[text]])
                if dial.outcome is DialOutcome.ITSELF:
                    return
                await self._pause(text, MAX_DELAY)
        except IdentityInUse as error:  # the node's owner has been told
            logger.debug("%s", error)

    async def _try(self, text: str) -> PeerID | None:
        """Call one address; who answered there."""
        host, timeout = self._neighbours.host, self._neighbours.config.wait_timeout
        try:
            peer = await host.connect(self._addresses[text], timeout=timeout)
        except InvalidValueError:  # raised for the host's own PeerID only
            self._own.add(text)
            return None
        except PeerUnreachable as error:
            self.failures[text] = "; ".join(dict.fromkeys(error.failures.values())) or str(error)
            if any(dial.outcome is DialOutcome.ITSELF for dial in error.dials):
                self._own.add(text)
            return None
        except DeadlineExceeded:
            self.failures[text] = f"timed out after {timeout:g} s"
            return None
        if peer == host.peer_id:
            self._own.add(text)
            return None
        if not await self._neighbours.greet(peer):
            self.failures[text] = "it is a peer of Shoal, but does not answer as a node of a DHT"
            return None
        logger.debug("initial peer %s answered", text)
        self.failures.pop(text, None)
        self.found[text] = peer
        self._on_found(peer)
        return peer

    async def _pause(self, text: str, delay: float) -> None:
        event = self._hurry[text]
        event.clear()
        try:
            async with asyncio.timeout(delay * self._rng.uniform(0.75, 1.0)):
                await event.wait()
        except TimeoutError:
            pass

    def _is_own(self, address: Multiaddr) -> bool:
        host = self._neighbours.host
        if address.peer_id is not None:
            return address.peer_id == str(host.peer_id)
        return address in host.listen_addresses or address in host.announced_addresses
