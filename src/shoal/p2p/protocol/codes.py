"""Why a stream is reset, as codes on the wire: those of the connection and of the host's own methods. Pure.

RESET carries a code and a message for people. The other side gets both as a :class:`~shoal.errors.RemoteError`.
Applications have codes of their own (those of averaging: :mod:`shoal.averaging.codes`). A code is a text: one that a
newer peer sends, and this version does not know, is kept as it came and is equal to none of these.
"""

from __future__ import annotations

import enum


class ResetCode(enum.StrEnum):
    """What the connection, or the host, says of a stream; wire values of at most ``wire.MAX_CODE`` characters."""

    CANCELLED = "cancelled"
    """The side that resets has lost interest, or is about to end."""
    DEADLINE = "deadline"
    """The deadline of the call or stream has passed."""
    BUSY = "busy"
    """There is too much at a time: streams, bytes that nobody has read, or what waits. Later it may work."""
    UNKNOWN_METHOD = "unknown_method"
    """The peer does not serve that method."""
    FAILED = "failed"
    """The handler failed on purpose; the message says why."""
    INTERNAL = "internal"
    """The handler failed by a mistake. It is in the log of its side; the message does not tell it."""
    FINISHED = "finished"
    """The handler is done, and reads no more of what the opener sends."""
    BAD_ADDRESS = "bad_address"
    """A request of the host's own methods holds a text that is no address."""
    RATE_LIMITED = "rate_limited"
    """The asker has asked this helper to dial it back too often."""
