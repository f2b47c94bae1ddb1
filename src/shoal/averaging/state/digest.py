"""What shows that a state has come as it was sent: one digest of its manifest and of all its chunks, in order.

The connection proves that each chunk comes from the donor. The digest proves that they are one state: all chunks of one
copy, each at its place, also after a download was resumed. It is keyed: each chunk is authenticated with AES-256-GMAC
(NIST SP 800-38D) under a key that the donor drew for this copy, and SHA-256 binds the tags together. That takes a sixth
of the time of a SHA-256 of everything. The donor alone chooses what is hashed, and is believed anyway: the digest need
not withstand peers that know its key.
"""

from __future__ import annotations

import hashlib

from cryptography.hazmat.primitives.ciphers.aead import AESGCM

KEY_BYTES = 32
DIGEST_BYTES = 32
_NONCE_BYTES = 12


class StateDigest:
    """Takes in the encoded chunks, in order.

    :param key: of ``KEY_BYTES``; of one copy of a state, and never of two
    :param fingerprint: what else is covered: :meth:`~.manifest.Manifest.fingerprint`
    """

    def __init__(self, key: bytes, fingerprint: bytes) -> None:
        self._aead = AESGCM(key)
        self._tags = hashlib.sha256(fingerprint)
        self._chunks = 0

    def update(self, chunk: bytes | memoryview) -> None:
        """The next chunk."""
        nonce = self._chunks.to_bytes(_NONCE_BYTES, "big")
        self._tags.update(self._aead.encrypt(nonce, b"", chunk))
        self._chunks += 1

    def value(self) -> bytes:
        """``DIGEST_BYTES`` of all that was taken in."""
        return self._tags.digest()
