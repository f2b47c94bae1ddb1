"""The Noise Protocol Framework (revision 34), as much of it as Noise_XX_25519_*_SHA256 needs.

:class:`HandshakeState` runs the XX pattern::

    -> e
    <- e, ee, s, es
    -> s, se

and yields two :class:`CipherState` objects, one per direction, for what follows. Names are the
specification's. Pure: keys are arguments, no bytes move by themselves.
"""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.ciphers.aead import AESGCM, ChaCha20Poly1305

from shoal.errors import InvalidStateError, ProtocolViolation
from shoal.p2p.protocol.violations import TamperedMessage

KEY_BYTES: Final = 32  # of X25519 and of both ciphers
TAG_BYTES: Final = 16
MAX_MESSAGE_BYTES: Final = 65_535
# The last nonce is kept for rekeying (section 5.1).
MAX_NONCE: Final = 2**64 - 2
_REKEY_NONCE: Final = 2**64 - 1
# Bytes of ciphertext after which a direction takes a new key. Both sides must count alike: it is part of the
# protocol. No Noise message counter gets near its end: 2**64 messages of the least size are 1,000 exabytes.
REKEY_BYTES: Final = 64 * 2**30


@dataclass(frozen=True)
class CipherSuite:
    """An AEAD cipher as Noise uses it: how it is keyed, and how its 12-byte nonces are formed."""

    name: str
    new: Callable[[bytes], AESGCM | ChaCha20Poly1305]
    nonce: Callable[[int], bytes]


AESGCM_SUITE = CipherSuite("AESGCM", AESGCM, lambda counter: counter.to_bytes(12, "big"))
CHACHAPOLY_SUITE = CipherSuite(
    "ChaChaPoly", ChaCha20Poly1305, lambda counter: bytes(4) + counter.to_bytes(8, "little")
)


class CipherState:
    """One key and the counter of its nonces (section 5.1); rekeys itself every ``rekey_bytes`` of ciphertext.

    A nonce counts as used as soon as it was tried: after an error the object must not be used for the same
    message again, and no counter ever goes back.
    """

    __slots__ = ("_aead", "_counted", "_key", "_make_nonce", "_max_nonce", "_nonce", "_rekey_bytes", "_suite")

    def __init__(
        self,
        suite: CipherSuite,
        key: bytes,
        *,
        rekey_bytes: int = REKEY_BYTES,
        nonce: int = 0,
        max_nonce: int = MAX_NONCE,
    ) -> None:
        self._suite = suite
        self._make_nonce = suite.nonce
        self._key = key
        self._aead = suite.new(key)
        self._nonce = nonce
        self._max_nonce = max_nonce
        self._rekey_bytes = rekey_bytes
        self._counted = 0

    def encrypt(self, plaintext: bytes | memoryview, associated_data: bytes | None = None) -> bytes:
        """The ciphertext and tag of the next message; :class:`InvalidStateError` when the counter is at its
        end.
        """
        nonce = self._next_nonce_to_send()
        ciphertext = self._aead.encrypt(nonce, plaintext, associated_data)
        self._count(len(ciphertext))
        return ciphertext

    def encrypt_into(self, plaintext: memoryview, destination: memoryview) -> None:
        """As :meth:`encrypt`, into ``destination``, exactly ``TAG_BYTES`` longer than ``plaintext``."""
        nonce = self._next_nonce_to_send()
        self._count(self._aead.encrypt_into(nonce, plaintext, None, destination))

    def decrypt(self, ciphertext: bytes | memoryview, associated_data: bytes | None = None) -> bytes:
        """The plaintext of the next message; :class:`TamperedMessage` if it is not authentic."""
        nonce = self._next_nonce_to_receive()
        try:
            plaintext = self._aead.decrypt(nonce, ciphertext, associated_data)
        except InvalidTag:
            raise _not_authentic(nonce) from None
        self._count(len(plaintext) + TAG_BYTES)
        return plaintext

    def decrypt_into(self, ciphertext: memoryview, destination: memoryview) -> None:
        """As :meth:`decrypt`, into ``destination``, which is exactly ``TAG_BYTES`` shorter than
        ``ciphertext``.

        After an error the content of ``destination`` is undefined.
        """
        nonce = self._next_nonce_to_receive()
        try:
            size = self._aead.decrypt_into(nonce, ciphertext, None, destination)
        except InvalidTag:
            raise _not_authentic(nonce) from None
        self._count(size + TAG_BYTES)

    def rekey(self) -> None:
        """Replace the key by one that does not betray the old one (section 4.2); the counter goes on."""
        zeros = bytes(KEY_BYTES)
        self._key = self._aead.encrypt(self._suite.nonce(_REKEY_NONCE), zeros, None)[:KEY_BYTES]
        self._aead = self._suite.new(self._key)
        self._counted = 0

    def _next_nonce_to_send(self) -> bytes:
        counter = self._nonce
        if counter > self._max_nonce:
            raise InvalidStateError("this connection has sent as many messages as its keys allow")
        self._nonce = counter + 1
        return self._make_nonce(counter)

    def _next_nonce_to_receive(self) -> bytes:
        counter = self._nonce
        if counter > self._max_nonce:
            raise ProtocolViolation("the other side sent more messages than its keys allow")
        self._nonce = counter + 1
        return self._make_nonce(counter)

    def _count(self, ciphertext_bytes: int) -> None:
        self._counted += ciphertext_bytes
        if self._counted >= self._rekey_bytes:
            self.rekey()


def _not_authentic(nonce: bytes) -> TamperedMessage:
    return TamperedMessage(
        f"a message is not authentic (nonce {nonce.hex()}): it was changed, replayed or reordered, "
        "or the two sides do not share its key"
    )


def _hkdf(chaining_key: bytes, input_key_material: bytes) -> tuple[bytes, bytes]:
    """HKDF of section 4.3 with two outputs."""
    secret = hmac.digest(chaining_key, input_key_material, "sha256")
    first = hmac.digest(secret, b"\x01", "sha256")
    return first, hmac.digest(secret, first + b"\x02", "sha256")


def _diffie_hellman(private: X25519PrivateKey, public: X25519PublicKey) -> bytes:
    try:
        return private.exchange(public)
    except ValueError:  # the library's word for an all-zero output
        raise ProtocolViolation("the other side sent an X25519 key of low order") from None


class _SymmetricState:
    """Chaining key, handshake hash and the key of the moment (section 5.2)."""

    def __init__(self, protocol_name: bytes, suite: CipherSuite) -> None:
        padded = protocol_name.ljust(32, b"\0")
        self.hash = padded if len(padded) == 32 else hashlib.sha256(protocol_name).digest()
        self._chaining_key = self.hash
        self._suite = suite
        self._cipher: CipherState | None = None

    def mix_key(self, input_key_material: bytes) -> None:
        self._chaining_key, key = _hkdf(self._chaining_key, input_key_material)
        self._cipher = CipherState(self._suite, key)

    def mix_hash(self, data: bytes) -> None:
        self.hash = hashlib.sha256(self.hash + data).digest()

    @property
    def tag_bytes(self) -> int:
        return 0 if self._cipher is None else TAG_BYTES

    def encrypt_and_hash(self, plaintext: bytes) -> bytes:
        ciphertext = plaintext if self._cipher is None else self._cipher.encrypt(plaintext, self.hash)
        self.mix_hash(ciphertext)
        return ciphertext

    def decrypt_and_hash(self, ciphertext: bytes) -> bytes:
        plaintext = ciphertext if self._cipher is None else self._cipher.decrypt(ciphertext, self.hash)
        self.mix_hash(ciphertext)
        return plaintext

    def split(self, rekey_bytes: int) -> tuple[CipherState, CipherState]:
        first, second = _hkdf(self._chaining_key, b"")
        return (
            CipherState(self._suite, first, rekey_bytes=rekey_bytes),
            CipherState(self._suite, second, rekey_bytes=rekey_bytes),
        )


_XX_MESSAGES: Final = (("e",), ("e", "ee", "s", "es"), ("s", "se"))


class HandshakeState:
    """One side of a Noise_XX_25519_*_SHA256 handshake (section 5.3).

    Call :meth:`write_message` and :meth:`read_message` in turn, as the pattern says, until :attr:`finished`,
    then :meth:`split`. A payload is made or judged with the handshake hash up to it, which stands for all
    that both sides have sent so far, this message's keys included. After an error the object is of no use.
    """

    def __init__(
        self,
        *,
        initiator: bool,
        prologue: bytes,
        static: X25519PrivateKey,
        ephemeral: X25519PrivateKey,
        suite: CipherSuite = AESGCM_SUITE,
    ) -> None:
        self._initiator = initiator
        self._static = static
        self._ephemeral = ephemeral
        self._remote_static: X25519PublicKey | None = None
        self._remote_ephemeral: X25519PublicKey | None = None
        self._messages_done = 0
        self._symmetric = _SymmetricState(f"Noise_XX_25519_{suite.name}_SHA256".encode(), suite)
        self._symmetric.mix_hash(prologue)

    @property
    def finished(self) -> bool:
        """Whether all messages were exchanged."""
        return self._messages_done == len(_XX_MESSAGES)

    @property
    def handshake_hash(self) -> bytes:
        """What both sides have sent so far, hashed."""
        return self._symmetric.hash

    @property
    def static_public(self) -> bytes:
        """This side's raw static public key."""
        return self._static.public_key().public_bytes_raw()

    @property
    def remote_static_public(self) -> bytes:
        """The other side's raw static public key, once it was received."""
        assert self._remote_static is not None
        return self._remote_static.public_bytes_raw()

    def write_message(self, make_payload: Callable[[bytes], bytes]) -> bytes:
        """The next message; ``make_payload`` is given the handshake hash up to the payload."""
        tokens = self._next_tokens(writing=True)
        message = b""
        for token in tokens:
            if token == "e":  # noqa: S105  (a token of the pattern, not a password)
                public = self._ephemeral.public_key().public_bytes_raw()
                self._symmetric.mix_hash(public)
                message += public
            elif token == "s":  # noqa: S105
                message += self._symmetric.encrypt_and_hash(self.static_public)
            else:
                self._symmetric.mix_key(self._exchange(token))
        message += self._symmetric.encrypt_and_hash(make_payload(self._symmetric.hash))
        self._messages_done += 1
        return message

    def read_message(self, message: bytes) -> tuple[bytes, bytes]:
        """The payload of the next message, and the handshake hash up to it.

        :class:`ProtocolViolation` for a message that is too short, not authentic (:class:`TamperedMessage`),
        or brings a key of low order.
        """
        tokens = self._next_tokens(writing=False)
        rest = message
        for token in tokens:
            if token == "e":  # noqa: S105
                public, rest = self._take(rest, KEY_BYTES)
                self._remote_ephemeral = X25519PublicKey.from_public_bytes(public)
                self._symmetric.mix_hash(public)
            elif token == "s":  # noqa: S105
                encrypted, rest = self._take(rest, KEY_BYTES + self._symmetric.tag_bytes)
                public = self._symmetric.decrypt_and_hash(encrypted)
                self._remote_static = X25519PublicKey.from_public_bytes(public)
            else:
                self._symmetric.mix_key(self._exchange(token))
        hash_before = self._symmetric.hash
        if len(rest) < self._symmetric.tag_bytes:
            raise ProtocolViolation(f"a handshake message of {len(message)} bytes is too short")
        payload = self._symmetric.decrypt_and_hash(rest)
        self._messages_done += 1
        return payload, hash_before

    def split(self, rekey_bytes: int = REKEY_BYTES) -> tuple[CipherState, CipherState]:
        """The ciphers of what follows: to send with, and to receive with."""
        assert self.finished
        first, second = self._symmetric.split(rekey_bytes)
        return (first, second) if self._initiator else (second, first)

    def _next_tokens(self, *, writing: bool) -> tuple[str, ...]:
        assert not self.finished
        assert writing == (self._initiator == (self._messages_done % 2 == 0))
        return _XX_MESSAGES[self._messages_done]

    @staticmethod
    def _take(rest: bytes, size: int) -> tuple[bytes, bytes]:
        if len(rest) < size:
            raise ProtocolViolation(f"a handshake message ends {size - len(rest)} bytes too early")
        return rest[:size], rest[size:]

    def _exchange(self, token: str) -> bytes:
        """The Diffie-Hellman output that ``token`` asks for: its first letter is the initiator's key."""
        ours, theirs = (token[0], token[1]) if self._initiator else (token[1], token[0])
        private = self._ephemeral if ours == "e" else self._static
        public = self._remote_ephemeral if theirs == "e" else self._remote_static
        assert public is not None
        return _diffie_hellman(private, public)
