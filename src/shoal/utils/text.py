"""Texts of strangers, made harmless for logs and errors. Pure."""

from __future__ import annotations

MAX_FOREIGN_TEXT = 512
"""Characters that are kept of a text that another peer sent, unless its place allows fewer."""

_CUT = "..."


def printable(text: str, limit: int = MAX_FOREIGN_TEXT) -> str:
    """``text`` on one line of at most ``limit`` characters: what is not printable is escaped, as ``repr`` does it.

    Every text that another peer sent passes through here where it enters, so that no peer can forge lines of a log,
    move a terminal's cursor or turn the direction of what follows. Idempotent.
    """
    # An escape is at least as long as what it stands for: more than limit + 1 characters cannot be needed.
    head = text[: limit + 1]
    if not head.isprintable():
        head = "".join(one if one.isprintable() else repr(one)[1:-1] for one in head)
    return head if len(head) <= limit else head[: max(0, limit - len(_CUT))] + _CUT[:limit]
