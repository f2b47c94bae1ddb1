"""How connections end, where callers tell it apart: kinds of violations, and of endings in order. Pure."""

from __future__ import annotations

import enum
from dataclasses import dataclass

from shoal.errors import ConnectionLost, ProtocolViolation


class EndKind(enum.IntEnum):
    """How a connection ended, where somebody acts on it; the number is sent in GOODBYE."""

    OTHER = 0
    """Closed in order, for a reason that only people read, or of a kind that this version does not know."""
    NO_ROOM = 1
    """One side has too many connections. To dial at once again would be in vain."""
    ITSELF = 2
    """Both ends are the same host."""
    SAME_IDENTITY = 3
    """Another peer holds the same identity."""
    LEAVING = 4
    """One side ends for good: its process stops. A process that starts there later is another one."""
    SILENCE = 5
    """One side saw no sign of life of the other."""
    LOST = 6
    """The transport ended without a word: the peer's process died, or the network cut the connection. Never sent."""


@dataclass(frozen=True)
class Ending:
    """How a connection ended: what callers act on, and the words for people."""

    kind: EndKind
    reason: str
    by_peer: bool = False
    """Whether the peer has said so; false where this side closed, or found it out."""

    @property
    def peer_has_left(self) -> bool:
        """Whether the peer has said that its process ends."""
        return self.by_peer and self.kind is EndKind.LEAVING

    def __str__(self) -> str:
        return self.reason


class TurnedAway(ConnectionLost):
    """One side ended the connection in order before it was open."""

    def __init__(self, message: str, kind: EndKind = EndKind.OTHER) -> None:
        super().__init__(message)
        self.kind = kind


class NotShoalPeer(ProtocolViolation):
    """Something answers, but does not speak Shoal's protocol; the message shows what it sent."""


class OtherVersion(ProtocolViolation):
    """A Shoal peer with no protocol version in common; the message names both ranges."""


class OtherIdentity(ProtocolViolation):
    """A peer that is not the one that was expected, or that cannot prove its PeerID."""


class TamperedMessage(ProtocolViolation):
    """A message that is not authentic: changed, replayed, reordered, or under the wrong key."""


class TruncatedStream(ProtocolViolation):
    """The connection ended in the middle of a handshake, a message or a frame."""
