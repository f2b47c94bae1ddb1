"""The kinds of :class:`~shoal.errors.ProtocolViolation` that callers tell apart; all others are just that."""

from __future__ import annotations

from shoal.errors import ProtocolViolation


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
