"""Why a stream of averaging is reset, as codes on the wire. Pure.

Beside them stand those of the connection (:class:`~shoal.p2p.protocol.codes.ResetCode`), such as ``busy``. A code that
a newer peer sends, and this version does not know, is kept as text: it ends the stream like any other one.
"""

from __future__ import annotations

import enum


class AveragingCode(enum.StrEnum):
    """What a peer's averager says of a stream; wire values."""

    UNKNOWN_PREFIX = "unknown_prefix"
    """No averager with that prefix is here."""

    NO_SUCH_ROUND = "no_such_round"
    """All-reduce: the round has ended, or its group is not known here."""
    NOT_A_MEMBER = "not_a_member"
    """All-reduce: the asker is not in the group."""
    EXCLUDED = "excluded"
    """All-reduce: the owner takes nothing more of this sender; the message says why. The round goes on without it."""
    ROUND_FAILED = "round_failed"
    """All-reduce: the round is decided, and the sender gets no averages any more."""
    VOID = "void"
    """All-reduce: the span is not served here: its parts were assigned to other owners."""
    NOT_LEADING = "not_leading"
    """All-reduce: this member does not lead in that term, or does not lead any more."""
    CASTING_VOTE = "casting_vote"
    """All-reduce: the founding leader leaves, and hands on its casting vote to the member at the other end."""

    NOT_SHARING = "not_sharing"
    """State: the donor does not share its state, or no longer."""
    STATE_FAILED = "state_failed"
    """State: no copy of the donor's state could be made."""
    REPLACED = "replaced"
    """State: the same joiner has asked again, which this request made way for."""
    TOO_SLOW = "too_slow"
    """State: the joiner took nothing for too long, and loses its slot."""
