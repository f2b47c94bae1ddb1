"""The initial peers of a node: found when it starts, looked after as long as it lives.

So two DHTs whose nodes were given the same initial peers become one, and a node that lost everybody finds back. The
asyncio shell of :mod:`.bootstrap_core`: it calls addresses, and tells the core what became of that.
"""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import Callable, Sequence

from shoal.dht.bootstrap_core import (
    AddressAnswered,
    AddressFailed,
    AddressLedHere,
    BootstrapBegan,
    BootstrapCore,
    CallAddress,
    Effect,
    EndWait,
    Event,
    RetryWanted,
    RivalFound,
    TellFound,
    WatchAddress,
    WatchedInVain,
    WatchEnded,
)
from shoal.dht.neighbours import Neighbours
from shoal.errors import DeadlineExceeded, DialOutcome, IdentityInUse, InvalidValueError, PeerUnreachable
from shoal.p2p.identity import PeerID
from shoal.p2p.multiaddr import Multiaddr
from shoal.sansio.driver import Driver
from shoal.utils.tasks import TaskSet

logger = logging.getLogger(__name__)


class Bootstrap:
    """See the module. ``on_found`` is called each time an initial peer answers after it was not in the table."""

    def __init__(
        self,
        neighbours: Neighbours,
        addresses: Sequence[Multiaddr],
        tasks: TaskSet,
        rng: random.Random,
        on_found: Callable[[PeerID], None],
    ) -> None:
        self._neighbours = neighbours
        self._addresses = {str(address): address for address in addresses}
        self._tasks = tasks
        self._on_found = on_found
        own = [text for text, address in self._addresses.items() if self._is_own(address)]
        self._core = BootstrapCore(
            self._addresses,
            own=own,
            watched=[text for text in own if self._addresses[text].peer_id is not None],
            table=neighbours.table,
            jitter=lambda: rng.uniform(0.75, 1.0),
        )
        self._driver: Driver[Event, Effect] = Driver(self._core, self._carry_out, name="bootstrap")
        self._first: asyncio.Future[bool] = asyncio.get_running_loop().create_future()

    @property
    def failures(self) -> dict[str, str]:
        """Why each address did not answer when it was last called."""
        return self._core.failures

    @property
    def found(self) -> dict[str, PeerID]:
        """Who answered at each address."""
        return self._core.found

    @property
    def includes_self(self) -> bool:
        """Whether this node is one of the initial peers."""
        return self._core.includes_self

    @property
    def others(self) -> list[str]:
        """The addresses that are not this node's own."""
        return self._core.others

    async def find_first(self, timeout: float) -> bool:
        """Start looking for the initial peers. True as soon as one has answered.

        False if nobody did: after ``timeout`` seconds; or, where this node is one of the initial peers itself, once
        all others were tried, because then it may have to be the first.
        """
        self._driver.tell(BootstrapBegan(timeout))
        return await self._first

    def retry_soon(self) -> None:
        """The network may be back, or is needed badly: try the missing ones now."""
        self._driver.tell(RetryWanted())

    def stop(self) -> None:
        """Call nobody again. Idempotent."""
        self._driver.close()

    def _carry_out(self, effect: Effect) -> None:
        match effect:
            case CallAddress(text):
                self._tasks.start(self._call(text), f"dht-initial-peer-{text}")
            case WatchAddress(text):
                self._tasks.start(self._watch(text), f"dht-own-address-{text}")
            case TellFound(peer):
                self._on_found(peer)
            case EndWait(is_found, reason):
                logger.debug("the wait for the first initial peer is over: %s", reason)
                if not self._first.done():
                    self._first.set_result(is_found)

    async def _call(self, text: str) -> None:
        event = await self._outcome(text)
        if self._neighbours.host.tenancy.rival is not None:
            self._driver.tell(RivalFound())
        self._driver.tell(event)

    async def _outcome(self, text: str) -> AddressAnswered | AddressFailed | AddressLedHere:
        """Call one address; what became of that."""
        host, timeout = self._neighbours.host, self._neighbours.config.wait_timeout
        try:
            peer = await host.connect(self._addresses[text], timeout=timeout)
        except InvalidValueError:  # raised for the host's own PeerID only
            return AddressLedHere(text)
        except PeerUnreachable as error:
            reason = "; ".join(dict.fromkeys(error.failures.values())) or str(error)
            return AddressLedHere(text) if _led_here(error) else AddressFailed(text, reason)
        except DeadlineExceeded:
            return AddressFailed(text, f"timed out after {timeout:g} s")
        if peer == host.peer_id:
            return AddressLedHere(text)
        if not await self._neighbours.greet(peer):
            return AddressFailed(text, "it is a peer of Shoal, but does not answer as a node of a DHT")
        logger.debug("initial peer %s answered", text)
        return AddressAnswered(text, peer)

    async def _watch(self, text: str) -> None:
        """See where an address with this node's own PeerID leads."""
        is_over = True
        try:
            (dial,) = await self._neighbours.host.ask_rivals([self._addresses[text]])
            is_over = dial.outcome is DialOutcome.ITSELF
        except IdentityInUse as error:  # the node's owner has been told
            logger.debug("%s", error)
        self._driver.tell(WatchEnded(text) if is_over else WatchedInVain(text))

    def _is_own(self, address: Multiaddr) -> bool:
        host = self._neighbours.host
        if address.peer_id is not None:
            return address.peer_id == str(host.peer_id)
        return address in host.listen_addresses or address in host.announced_addresses


def _led_here(error: PeerUnreachable) -> bool:
    """Whether a dial came back to this node."""
    return any(dial.outcome is DialOutcome.ITSELF for dial in error.dials)
