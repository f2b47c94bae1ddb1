"""Plaintext to wire bytes: Noise transport messages, each with its length (2 bytes, big-endian) before it.
Pure.
"""

from __future__ import annotations

from typing import Final

from shoal.p2p.protocol.frames import CHUNK_BYTES
from shoal.p2p.protocol.noise import TAG_BYTES, CipherState

PREFIX_BYTES: Final = 2


def seal_message(cipher: CipherState, plaintext: bytes) -> bytes:
    """The wire bytes of one message."""
    ciphertext = cipher.encrypt(plaintext)
    return len(ciphertext).to_bytes(PREFIX_BYTES, "big") + ciphertext


def seal_chunks(cipher: CipherState, plaintext: memoryview) -> bytearray:
    """The wire bytes of ``plaintext`` as messages of ``CHUNK_BYTES``, the last one shorter, in one piece of
    memory.

    Encrypted straight into it: an object per message would cost as much as half its encryption.
    """
    total = plaintext.nbytes
    messages = -(-total // CHUNK_BYTES)
    wire = bytearray(total + messages * (PREFIX_BYTES + TAG_BYTES))
    view = memoryview(wire)
    position = 0
    for begin in range(0, total, CHUNK_BYTES):
        chunk = plaintext[begin : begin + CHUNK_BYTES]
        size = chunk.nbytes + TAG_BYTES
        end = position + PREFIX_BYTES + size
        wire[position], wire[position + 1] = size >> 8, size & 0xFF
        cipher.encrypt_into(chunk, view[position + PREFIX_BYTES : end])
        position = end
    return wire
