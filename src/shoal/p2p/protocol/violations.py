"""How connections end, where callers tell it apart: kinds of violations, and of endings in order. Pure."""

from __future__ import annotations

import enum
from dataclasses import dataclass

from shoal.errors import ConnectionLost, ProtocolViolation


class EndKind(enum.IntEnum):
    """Why a connection was closed in order, where the other side acts on it; the number is sent in GOODBYE."""

    OTHER = 0
    """For a reason that only people read, or of a kind that this version does not know."""
    NO_ROOM = 1
    """One side has too many connections. To dial at once again would be in vain."""
    ITSELF = 2
    """Both ends are the same host."""
    SAME_IDENTITY = 3
    """Another peer holds the same identity."""


@dataclass(frozen=True)
class Ending:
    """How a connection ended: what callers act on, and the words for people."""

    kind: EndKind
    reason: str

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
