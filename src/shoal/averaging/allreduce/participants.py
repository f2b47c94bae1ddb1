"""What the shells of one round share: who takes part, the pure core, and the way events reach it."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from dataclasses import dataclass, field

from shoal.averaging.allreduce.core import AllReduce
from shoal.averaging.allreduce.events import OVER, Event
from shoal.averaging.codes import AveragingCode
from shoal.averaging.group import GroupInfo
from shoal.errors import (
    ConnectionLost,
    DeadlineExceeded,
    InvalidValueError,
    PeerUnreachable,
    ProtocolViolation,
    RemoteError,
)
from shoal.p2p.host import Host
from shoal.p2p.identity import PeerID
from shoal.p2p.multiaddr import Multiaddr
from shoal.p2p.rpc import Stream

logger = logging.getLogger(__name__)

Feed = Callable[[Event], None]


def learn_addresses(host: Host, group: GroupInfo) -> None:
    """Remember where each member says that it can be dialed: in a large DHT many pairs know nothing of each other.

    A member has signed its addresses for this group, so that they count as first-hand. What cannot be dialed is left
    out; how many are kept of a peer, and of how many peers, is up to the host.
    """
    for peer, member in zip(group.peer_ids, group.members, strict=True):
        addresses = []
        for text in member.addresses:
            try:
                addresses.append(Multiaddr.parse(text))
            except InvalidValueError as e:
                logger.debug("%s signed an address that cannot be read: %s", peer, e)
        host.add_addresses(peer, addresses)


@dataclass(frozen=True)
class RoundCore:
    """One round as its streams see it."""

    host: Host
    prefix: str
    group_id: bytes
    peers: tuple[PeerID, ...]
    core: AllReduce
    feed: Feed
    """Hands an event to the core and carries out what follows."""
    failures: dict[int, float] = field(default_factory=dict)
    """Members to which the connection was lost, or that never opened a stream to this one though they had to; and when
    that was noticed, in seconds of the loop."""

    @property
    def is_over(self) -> bool:
        """Whether the round has ended for this member."""
        return self.core.phase in OVER

    def member(self, stream: Stream) -> int:
        """The member at the other end of a stream.

        :raises RemoteError: it is none
        """
        if stream.remote not in self.peers:
            raise RemoteError(AveragingCode.NOT_A_MEMBER, f"{stream.remote} is no member of this group")
        return self.peers.index(stream.remote)

    def note_failure(self, member: int, error: Exception) -> None:
        """A stream to or from ``member`` has ended with this error."""
        if isinstance(error, (PeerUnreachable, ConnectionLost, DeadlineExceeded)):
            self.note_silence(member)

    def note_silence(self, member: int) -> None:
        """Nothing comes from ``member``, or reaches it."""
        self.failures[member] = asyncio.get_running_loop().time()

    def unreached(self) -> list[PeerID]:
        """Members that failed in that way, and showed no life since: a connection may break by accident, and a sign of
        life says that there is a route.
        """
        return [
            self.peers[member]
            for member, noticed in sorted(self.failures.items())
            if self.host.last_sign(self.peers[member]) <= noticed
        ]

    def feed_from(self, event: Event, on_violation: Callable[[str], Event]) -> None:
        """As :attr:`feed`, for an event that another member caused: ``on_violation`` makes an event of the reason if
        that member broke the protocol.
        """
        try:
            self.feed(event)
        except ProtocolViolation as e:
            self.feed(on_violation(f"it broke the protocol: {e}"))
            raise
