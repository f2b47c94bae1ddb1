"""The 160-bit ids of nodes and keys, and the XOR metric between them (Kademlia, section 2.1). Pure.

An id is an ``int``, so that distances are one machine operation; on the wire it is 20 bytes, big-endian.
Nobody ever states his own id: it is computed from the PeerID that the connection proved, or from the key
itself.
"""

from __future__ import annotations

import functools
import hashlib

from shoal.errors import InvalidValueError
from shoal.p2p.identity import PeerID

ID_BYTES = 20
ID_BITS = 8 * ID_BYTES


@functools.lru_cache(maxsize=16384)
def node_id(peer: PeerID) -> int:
    """The id of a peer: the first 160 bits of SHA-256 over its PeerID."""
    return _hash(peer.to_bytes())


def key_id(serialized_key: bytes) -> int:
    """The id of a key: the first 160 bits of SHA-256 over the serialized key."""
    return _hash(serialized_key)


def id_to_bytes(identifier: int) -> bytes:
    """The 20 bytes of an id on the wire."""
    return identifier.to_bytes(ID_BYTES, "big")


def id_from_bytes(raw: bytes) -> int:
    """The reverse of :func:`id_to_bytes`; InvalidValueError for any other length."""
    if len(raw) != ID_BYTES:
        raise InvalidValueError(f"an id must be {ID_BYTES} bytes, got {len(raw)}")
    return int.from_bytes(raw, "big")


def bucket_index(own: int, other: int) -> int:
    """The k-bucket in which ``own`` keeps ``other``: 0 (only the last bit differs) to 159 (the far half)."""
    if own == other:
        raise InvalidValueError("a node has no k-bucket for itself")
    return (own ^ other).bit_length() - 1


def id_in_bucket(own: int, index: int, entropy: int) -> int:
    """An id in k-bucket ``index`` of ``own``; the bits that are free are taken from ``entropy``."""
    half = 1 << index
    return own ^ (half | (entropy & (half - 1)))


def _hash(data: bytes) -> int:
    return int.from_bytes(hashlib.sha256(data).digest()[:ID_BYTES], "big")
