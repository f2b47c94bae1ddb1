"""What is said where a framework is missing: :func:`needed`."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def needed(package: str, by: str, advice: str) -> Iterator[None]:
    """Around imports of ``package``: the error says which part of Shoal needs it, and what to do.

    :raises ModuleNotFoundError: it is not installed
    """
    try:
        yield
    except ModuleNotFoundError as e:
        if (e.name or "").partition(".")[0] != package:
            raise
        raise ModuleNotFoundError(f"{package} must be installed for {by}: {advice}", name=e.name) from e
