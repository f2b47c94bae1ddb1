"""Looking for another peer with this host's identity, at addresses where it may be. The rule: :mod:`.tenancy`."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable

from shoal.errors import DeadlineExceeded, DialFailure, DialOutcome, PeerUnreachable
from shoal.p2p.connections import Connections
from shoal.p2p.multiaddr import Multiaddr
from shoal.p2p.protocol.claims import SILENCE
from shoal.p2p.rpc import Lane


class Rivals:
    """Dials them. What they answer goes to the host's :class:`~shoal.p2p.tenancy.Tenancy`, which decides."""

    def __init__(self, connections: Connections) -> None:
        self._connections = connections
        self._silent: set[Multiaddr] = set()

    async def ask(self, addresses: Iterable[Multiaddr]) -> list[DialFailure]:
        """How each dial ended; an address that does not answer within :data:`SILENCE` counts as free."""
        deadline = asyncio.get_running_loop().time() + SILENCE
        asked = list(dict.fromkeys(address.without_peer_id() for address in addresses))
        return await asyncio.gather(*(self._ask_one(address, deadline) for address in asked))

    async def _ask_one(self, address: Multiaddr, deadline: float) -> DialFailure:
        connections = self._connections
        silence = DialFailure(str(address), DialOutcome.TIMED_OUT, "it does not answer")
        if address in self._silent and not connections.tenancy.claim().is_settled:
            return silence  # the same start has waited there before
        self._silent.discard(address)
        own = connections.identity.peer_id
        try:
            outcome = await connections.dial_address(address, own, Lane.PROBE, deadline)
        except DeadlineExceeded:
            self._silent.add(address)
            return silence
        except PeerUnreachable as error:  # another peer holds the identity, and that is known
            return DialFailure(str(address), DialOutcome.SAME_IDENTITY, str(error))
        if isinstance(outcome, PeerUnreachable):
            (failure,) = outcome.dials
            return failure
        raise AssertionError("the own identity was let in")
