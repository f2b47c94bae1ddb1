"""File descriptors that go to the other process with a value. Imported by both sides; imports nothing heavy."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Sequence


class WithDescriptors:
    """A value, and the file descriptors that go with it. It owns these: what nobody takes is closed with the object.

    A handler in the user process returns one to answer a service's call; the service gets one with descriptors of its
    own process. So an answer that comes as its call is cancelled leaves nothing open.
    """

    def __init__(self, value: object, descriptors: Sequence[int]) -> None:
        self.value = value
        self._descriptors = tuple(descriptors)

    @property
    def descriptors(self) -> tuple[int, ...]:
        """To look at; they stay this object's own."""
        return self._descriptors

    def take(self) -> tuple[int, ...]:
        """The descriptors, which are the caller's from now on."""
        taken, self._descriptors = self._descriptors, ()
        return taken

    def close(self) -> None:
        """Close those that were not taken. Idempotent."""
        close_descriptors(self.take())

    def __del__(self) -> None:
        self.close()


def close_descriptors(descriptors: Sequence[int]) -> None:
    """Close descriptors that nobody took over."""
    for descriptor in descriptors:
        with contextlib.suppress(OSError):
            os.close(descriptor)
