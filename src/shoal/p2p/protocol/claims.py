"""Which of two running peers with one identity may keep it. Pure.

A key file that was copied gives two peers one PeerID. Each run of a host draws a number of its own, its *incarnation*,
and says in HELLO for how long it has held the identity, its *tenure*. A tenure is a duration, not a date: clocks of
machines differ. It begins when the host has made sure that nobody else holds the identity. A host that did not answer
for :data:`SILENCE` has lost its tenure, because by then another one may have taken over; a new one begins when it has
answered for as long again.

Of two claims the longer tenure holds; then the greater number. All peers that see both come to the same answer.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import Annotated

import msgspec

from shoal.p2p.identity import SIGNATURE_BYTES, Identity, PeerID, verify
from shoal.utils.structs import CompactStruct

SILENCE = 5.0
"""Seconds without an answer after which a holder loses its identity to a newcomer."""
SAME_TIME = 1.0
"""Tenures that differ by less count as equal: they were measured at the two ends of a connection."""
UNSETTLED = -1.0
"""The tenure of a host that has not yet made sure that nobody else holds its identity."""
RECOVERING = -0.5
"""The tenure of a host that did not answer until a moment ago: more than that of a newcomer that still waits for an
answer, less than that of one that has waited."""
UNKNOWN = 0
"""The incarnation of a peer that does not tell its own."""

_DOMAIN = b"shoal identity claim"
_SIGNED = struct.Struct("!QQd")

Incarnation = Annotated[int, msgspec.Meta(ge=0, le=2**63 - 1)]


@dataclass(frozen=True)
class Claim:
    """One host's claim to its identity."""

    incarnation: int
    tenure: float

    @property
    def is_settled(self) -> bool:
        """Whether the host had made sure that nobody else held the identity."""
        return self.tenure >= 0

    def outranks(self, other: Claim) -> bool:
        """Whether the host of this claim keeps the identity, and that of ``other`` stops."""
        measured = self.is_settled and other.is_settled
        if abs(self.tenure - other.tenure) > (SAME_TIME if measured else 0.0):
            return self.tenure > other.tenure
        return self.incarnation > other.incarnation


class ClaimRequest(CompactStruct, frozen=True):
    """Somebody else proves your identity: do you still hold it? ``challenge`` is the other one's incarnation."""

    challenge: Incarnation


class SignedClaim(CompactStruct, frozen=True):
    """A claim that its host has signed: the answer, and the proof for the one that has to stop."""

    incarnation: Incarnation
    tenure: float
    signature: Annotated[bytes, msgspec.Meta(min_length=SIGNATURE_BYTES, max_length=SIGNATURE_BYTES)]

    @property
    def claim(self) -> Claim:
        """What was signed."""
        return Claim(self.incarnation, self.tenure)


def sign_claim(identity: Identity, claim: Claim, challenge: int) -> SignedClaim:
    """``claim``, signed for the peer whose incarnation is ``challenge``, and for no other."""
    signature = identity.sign(_DOMAIN, _SIGNED.pack(claim.incarnation, challenge, claim.tenure))
    return SignedClaim(claim.incarnation, claim.tenure, signature)


def is_genuine(signed: SignedClaim, peer: PeerID, challenge: int) -> bool:
    """Whether a host with the key of ``peer`` signed this claim for the incarnation ``challenge``.

    That number is drawn at random when a host starts. So the signature is younger than that host, and nobody can
    collect signatures in advance to stop peers with them.
    """
    message = _SIGNED.pack(signed.incarnation, challenge, signed.tenure)
    return verify(peer, _DOMAIN, message, signed.signature)
