"""What the shells of one round share: who takes part, the pure core, and the way events reach it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from shoal.averaging.allreduce.core import AllReduce
from shoal.averaging.allreduce.events import DECIDED, Event
from shoal.errors import ProtocolViolation, RemoteError
from shoal.p2p.host import Host
from shoal.p2p.identity import PeerID
from shoal.p2p.rpc import Stream

Feed = Callable[[Event], None]


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

    @property
    def is_decided(self) -> bool:
        return self.core.phase in DECIDED

    def member(self, stream: Stream) -> int:
        """The member at the other end of a stream.

        :raises RemoteError: it is none
        """
        if stream.remote not in self.peers:
            raise RemoteError("not_a_member", f"{stream.remote} is no member of this group")
        return self.peers.index(stream.remote)

    def feed_from(self, event: Event, on_violation: Callable[[str], Event]) -> None:
        """As :attr:`feed`, for an event that another member caused: ``on_violation`` makes an event of the reason if
        that member broke the protocol.
        """
        try:
            self.feed(event)
        except ProtocolViolation as e:
            self.feed(on_violation(f"it broke the protocol: {e}"))
            raise
