"""Letting go of what an error has seen on its way."""

from __future__ import annotations


def drop_tracebacks(error: BaseException | None) -> None:
    """Let go of what the frames refer to through which an error has passed.

    A stream keeps the error with which it has failed, and the error's frames the stream: only the garbage collector
    would find that, much later, and with it a view of a whole state's memory.
    """
    while error is not None:
        error.__traceback__ = None
        error = error.__cause__ or error.__context__
