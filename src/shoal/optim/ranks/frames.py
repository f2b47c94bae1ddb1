"""Messages between ranks, as frames of one size, so that most of them take one collective. Pure.

Ranks are processes of one job, of one user, and trust each other: messages are pickled, as torch.distributed does.
"""

from __future__ import annotations

import pickle
from typing import Any

FRAME = 1024
"""Bytes of a first frame. A message of an ordinary step has some 300."""
_HEAD = 8
ROOM = FRAME - _HEAD
"""Bytes of a message that fit into a first frame."""


def encode(message: Any) -> bytes:
    """A message as bytes, of any length."""
    return pickle.dumps(message)


def first_frame(encoded: bytes) -> bytes:
    """The length of a message, and its beginning, in :data:`FRAME` bytes."""
    return (len(encoded).to_bytes(_HEAD, "big") + encoded[:ROOM]).ljust(FRAME, b"\0")


def length(frame: bytes) -> int:
    """Of the whole message that a first frame begins."""
    return int.from_bytes(frame[:_HEAD], "big")


def decode(frame: bytes, rest: bytes) -> Any:
    """The message of a first frame, and of what follows it; ``rest`` may be longer than needed."""
    inside = frame[_HEAD : _HEAD + length(frame)]
    return pickle.loads(inside + rest[: length(frame) - len(inside)])  # noqa: S301 - of another rank of this job
