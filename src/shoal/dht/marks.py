"""Marks: what nodes tell each other of an entry in place of the entry itself. Pure.

All nodes that keep a record have the same entries, for all but a moment. So a reader asks one of them for what is new,
and the others for the marks of it, and then gets only what it lacks. A mark depends on all of an entry, and nobody can
find another entry with the same one: a node can hide by marks no more than by keeping silent.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Iterable

MARK_BYTES = 8


def mark_of(subkey: bytes, value: bytes, expiration: float) -> bytes:
    """The mark of one entry."""
    head = struct.pack(">dI", expiration, len(subkey))
    return hashlib.blake2b(head + subkey + value, digest_size=MARK_BYTES).digest()


def split_marks(marks: bytes) -> list[bytes]:
    """One by one; an incomplete one at the end is left out."""
    return [marks[start : start + MARK_BYTES] for start in range(0, len(marks) - MARK_BYTES + 1, MARK_BYTES)]


def join_marks(marks: Iterable[bytes]) -> bytes:
    """As they are sent."""
    return b"".join(marks)
