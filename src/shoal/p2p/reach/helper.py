"""Helping other peers to find out whether they can be dialed: the shell that dials them back.

A helper dials only literal IP addresses that are the asker's own, as the helper sees them, so that nobody can be
made to dial third parties; it dials a few at a time and not too often. Of the others it says so without dialing: an
address that is not the asker's from here, as behind a NAT, leads nowhere from here.
"""

from __future__ import annotations

import asyncio
import ipaddress
from collections import deque
from collections.abc import Awaitable, Callable, Sequence

from shoal.errors import InvalidValueError, RemoteError
from shoal.p2p.identity import PeerID
from shoal.p2p.multiaddr import Multiaddr
from shoal.p2p.protocol import wire
from shoal.p2p.protocol.codes import ResetCode
from shoal.p2p.reach.dialback import DialBackRequest, DialBackResponse

MAX_DIALED = 4
"""Addresses that a helper dials for one request."""
MAX_AT_ONCE = 64
"""Requests for which a helper dials at the same time; others wait."""
PER_PEER_PAUSE = 2.0
PER_MINUTE = 1200


class DialBackHelper:
    """Answers :data:`DIAL_BACK` for others, within its limits."""

    def __init__(
        self,
        *,
        ips_of: Callable[[PeerID], Sequence[str]],
        probe: Callable[[PeerID, Multiaddr], Awaitable[str | None]],
        now: Callable[[], float],
    ) -> None:
        self._ips_of = ips_of
        self._probe = probe
        self._now = now
        self._recent: deque[tuple[float, PeerID]] = deque()
        self._places = asyncio.Semaphore(MAX_AT_ONCE)

    async def handle(self, asker: PeerID, request: DialBackRequest) -> DialBackResponse:
        """Dial the asker's own addresses; a RemoteError (``RATE_LIMITED``) when asked too often."""
        try:
            addresses = [Multiaddr.parse(text) for text in request.addresses]
        except InvalidValueError as error:
            raise RemoteError(ResetCode.BAD_ADDRESS, str(error)) from error
        own = self._ips_of(asker)
        is_mine = {address: address.host in own and not address.unspoken for address in addresses}
        mine = [address.without_peer_id() for address in addresses if is_mine[address]][:MAX_DIALED]
        foreign = {
            str(address.without_peer_id()): _why_foreign(address, own)[: wire.MAX_REASON]
            for address in addresses
            if own and not is_mine[address]
        }
        if not mine:
            return DialBackResponse({}, foreign)
        self._count(asker)
        async with self._places:
            reasons = await asyncio.gather(*(self._probe(asker, address) for address in mine))
        outcomes = {
            str(address): None if reason is None else reason[: wire.MAX_REASON]
            for address, reason in zip(mine, reasons, strict=True)
        }
        return DialBackResponse(outcomes, foreign)

    def _count(self, asker: PeerID) -> None:
        now = self._now()
        while self._recent and self._recent[0][0] <= now - 60.0:
            self._recent.popleft()
        if len(self._recent) >= PER_MINUTE:
            raise RemoteError(ResetCode.RATE_LIMITED, f"more than {PER_MINUTE} dial-backs a minute")
        if any(peer == asker and when > now - PER_PEER_PAUSE for when, peer in self._recent):
            raise RemoteError(ResetCode.RATE_LIMITED, f"asked twice within {PER_PEER_PAUSE:g} s")
        self._recent.append((now, asker))


def _why_foreign(address: Multiaddr, own: Sequence[str]) -> str:
    if address.unspoken:
        return address.unspoken
    if address.is_loopback and not any(ipaddress.ip_address(ip).is_loopback for ip in own):
        return f"a loopback address, which does not lead to {own[0]} from another machine"
    if address.protocol.startswith("dns"):
        return "a name, which helpers do not look up"
    return f"others see this peer at {own[0]}"
