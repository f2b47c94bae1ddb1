"""The handshake of a connection: preambles, Noise XX, and the proof of both PeerIDs. Bytes in, bytes out.

What each side sends, Noise messages with their length (2 bytes, big-endian) before them::

    initiator: preamble, message 1 (e)
    responder: preamble, message 2 (e, ee, s, es, proof)
    initiator: message 3 (s, se, proof)

Message 1 holds nothing but a key and is the same in every version, so the initiator sends it without waiting
for the responder's preamble. A proof is the sender's Ed25519 public key and its signature over its X25519
static key and the handshake hash so far, in a domain of its own for each role.

The static keys of Noise are made for one session and thrown away: identities are proven by the signatures,
which are made for each session anyway, and a key that lives as long as its session needs no keeping and no
file.

Sans I/O.
"""

from __future__ import annotations

import hashlib
from enum import Enum

from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

from shoal.errors import ProtocolViolation
from shoal.p2p.identity import SIGNATURE_BYTES, Identity, PeerID, verify
from shoal.p2p.protocol.noise import KEY_BYTES, REKEY_BYTES, TAG_BYTES, CipherState, HandshakeState
from shoal.p2p.protocol.preamble import MAX_PREAMBLE_BYTES, SUPPORTED_VERSIONS, Versions, parse_preamble
from shoal.p2p.protocol.violations import OtherIdentity, TamperedMessage

_PROOF_BYTES = KEY_BYTES + SIGNATURE_BYTES
_PREFIX_BYTES = 2
# The sizes of messages 1 to 3; anything else is refused as soon as its length is known.
_MESSAGE_BYTES = (
    KEY_BYTES,
    KEY_BYTES + (KEY_BYTES + TAG_BYTES) + (_PROOF_BYTES + TAG_BYTES),
    (KEY_BYTES + TAG_BYTES) + (_PROOF_BYTES + TAG_BYTES),
)


class Role(Enum):
    """Which side of a connection this is: the initiator dialed."""

    INITIATOR = "initiator"
    RESPONDER = "responder"

    @property
    def other(self) -> Role:
        """The role of the other side."""
        return Role.RESPONDER if self is Role.INITIATOR else Role.INITIATOR


class Handshake:
    """One side of a handshake. Send what :meth:`start` and :meth:`receive` return.

    ``secret``: 32 random bytes that decide the X25519 keys, never to be used for two handshakes. ``expected_peer``: the
    one that must answer; None takes anybody.
    """

    def __init__(
        self,
        role: Role,
        identity: Identity,
        secret: bytes,
        *,
        expected_peer: PeerID | None = None,
        versions: Versions = SUPPORTED_VERSIONS,
    ) -> None:
        self._role = role
        self._identity = identity
        self._expected_peer = expected_peer
        self._versions = versions
        self._preamble = versions.to_preamble()
        self._static = X25519PrivateKey.from_private_bytes(hashlib.sha256(b"static" + secret).digest())
        self._ephemeral = X25519PrivateKey.from_private_bytes(hashlib.sha256(b"ephemeral" + secret).digest())
        self._noise: HandshakeState | None = None
        self._messages_done = 0
        self.version: tuple[int, int] | None = None
        self.remote: PeerID | None = None

    @property
    def finished(self) -> bool:
        """Whether both sides have proven who they are."""
        return self._messages_done == len(_MESSAGE_BYTES)

    def start(self) -> bytes:
        """The first bytes to send."""
        if self._role is Role.RESPONDER:
            return self._preamble
        return self._preamble + _with_length(self._ephemeral.public_key().public_bytes_raw())

    def receive(self, data: memoryview) -> tuple[int, bytes]:
        """Take the next element (preamble or message) from the start of ``data``.

        Returns how many bytes it took, 0 if the element is not complete, and what to send in return.
        :class:`~shoal.errors.ProtocolViolation` or a subclass ends the handshake.
        """
        if self._noise is None:
            return self._receive_preamble(data)
        if len(data) < _PREFIX_BYTES:
            return 0, b""
        size = int.from_bytes(data[:_PREFIX_BYTES], "big")
        expected = _MESSAGE_BYTES[self._messages_done]
        if size != expected:
            raise ProtocolViolation(
                f"handshake message {self._messages_done + 1} has {size} bytes, not {expected}"
            )
        if len(data) < _PREFIX_BYTES + size:
            return 0, b""
        return _PREFIX_BYTES + size, self._receive_message(bytes(data[_PREFIX_BYTES : _PREFIX_BYTES + size]))

    @property
    def channel_id(self) -> int:
        """A number of this connection that both sides know: 64 bits of the handshake's hash."""
        assert self._noise is not None
        return int.from_bytes(self._noise.handshake_hash[:8], "big")

    def split(self, rekey_bytes: int = REKEY_BYTES) -> tuple[CipherState, CipherState]:
        """The ciphers of the connection: to send with, and to receive with."""
        assert self._noise is not None
        return self._noise.split(rekey_bytes)

    def _receive_preamble(self, data: memoryview) -> tuple[int, bytes]:
        parsed = parse_preamble(bytes(data[: 2 * MAX_PREAMBLE_BYTES]), self._versions)
        if parsed is None:
            return 0, b""
        remote_versions, size = parsed
        self.version = (self._versions.major, self._versions.agree(remote_versions))
        preambles = [self._preamble, bytes(data[:size])]
        if self._role is Role.RESPONDER:
            preambles.reverse()
        self._noise = HandshakeState(
            initiator=self._role is Role.INITIATOR,
            prologue=b"".join(preambles),
            static=self._static,
            ephemeral=self._ephemeral,
        )
        if self._role is Role.INITIATOR:
            # It is on its way already: see start().
            self._noise.write_message(lambda _hash: b"")
            self._messages_done = 1
        return size, b""

    def _receive_message(self, message: bytes) -> bytes:
        """Take a message of the right size; return the answer, if it is this side's turn."""
        assert self._noise is not None
        try:
            payload, handshake_hash = self._noise.read_message(message)
        except TamperedMessage:
            raise TamperedMessage(
                f"handshake message {self._messages_done + 1} is not authentic: "
                "this connection's preambles or handshake were changed on their way, or belong to another"
            ) from None
        self._messages_done += 1
        if self._messages_done > 1:
            self.remote = self._check_proof(payload, handshake_hash)
        if self.finished:
            return b""
        answer = _with_length(self._noise.write_message(self._make_proof))
        self._messages_done += 1
        return answer

    def _make_proof(self, handshake_hash: bytes) -> bytes:
        assert self._noise is not None
        signature = self._identity.sign(_domain(self._role), self._noise.static_public + handshake_hash)
        return self._identity.peer_id.public_key + signature

    def _check_proof(self, payload: bytes, handshake_hash: bytes) -> PeerID:
        assert self._noise is not None
        remote = PeerID.from_public_key(payload[:KEY_BYTES])
        signed = self._noise.remote_static_public + handshake_hash
        if not verify(remote, _domain(self._role.other), signed, payload[KEY_BYTES:]):
            raise OtherIdentity(f"the other side claims to be {remote}, but cannot prove it")
        if self._expected_peer is not None and remote != self._expected_peer:
            raise OtherIdentity(f"{remote} answers where {self._expected_peer} was expected")
        return remote


def _domain(role: Role) -> bytes:
    return b"shoal noise handshake, " + role.value.encode()


def _with_length(message: bytes) -> bytes:
    return len(message).to_bytes(_PREFIX_BYTES, "big") + message
