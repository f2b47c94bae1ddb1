"""Telling peers that where this host can be dialed has changed, and hearing it of them.

HELLO says it when a connection opens; this is for connections that stand.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Iterable

from shoal.errors import InvalidValueError, RemoteError, ShoalError
from shoal.p2p.connection import Connection
from shoal.p2p.identity import PeerID
from shoal.p2p.multiaddr import Multiaddr
from shoal.p2p.protocol.codes import ResetCode
from shoal.p2p.reach.dialback import ANNOUNCE, Announcement, AnnouncementHeard
from shoal.p2p.reach.reachability import Reachability
from shoal.p2p.rpc import Ask

logger = logging.getLogger(__name__)

ANNOUNCE_TIMEOUT = 10.0


class Announcer:
    """See the module. ``peer_announced(peer, addresses, is_client)`` takes what another peer says of itself."""

    def __init__(
        self,
        *,
        reachability: Callable[[], Reachability],
        is_elsewhere: Callable[[PeerID], bool],
        ask: Ask,
        peer_announced: Callable[[PeerID, list[Multiaddr], bool], None],
    ) -> None:
        self._reachability = reachability
        self._is_elsewhere = is_elsewhere
        self._ask = ask
        self._peer_announced = peer_announced
        self._telling: set[asyncio.Task[None]] = set()

    async def tell(self, peers: Iterable[PeerID]) -> None:
        """Tell ``peers`` where this host can be dialed now; those that fail are left out."""
        await asyncio.gather(*(self._tell(peer) for peer in peers))

    def peer_met(self, connection: Connection) -> None:
        """What this host's HELLO said may have changed before the connection stood: :meth:`tell` passed it by."""
        said = connection.hello_sent
        if said is not None and said.is_client is self._reachability().is_full:
            task = asyncio.get_running_loop().create_task(self._tell(connection.peer))
            self._telling.add(task)
            task.add_done_callback(self._telling.discard)

    def close(self) -> None:
        """Tell nobody any more."""
        for task in self._telling:
            task.cancel()

    async def hear(self, peer: PeerID, request: Announcement) -> AnnouncementHeard:
        """Answers :data:`~shoal.p2p.reach.dialback.ANNOUNCE`."""
        try:
            addresses = [Multiaddr.parse(text) for text in request.addresses]
        except InvalidValueError as error:
            raise RemoteError(ResetCode.BAD_ADDRESS, str(error)) from error
        self._peer_announced(peer, addresses, request.is_client)
        return AnnouncementHeard()

    async def _tell(self, peer: PeerID) -> None:
        now = self._reachability()
        addresses = now.told(beyond_machine=self._is_elsewhere(peer))
        request = Announcement(not now.is_full, [str(address) for address in addresses])
        try:
            await self._ask(peer, ANNOUNCE, request, timeout=ANNOUNCE_TIMEOUT)
        except ShoalError as error:
            logger.debug("%s heard no announcement: %s", peer, error)
