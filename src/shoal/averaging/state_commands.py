"""What the user process and the service in the background process say to each other about states. Data only."""

from __future__ import annotations

from dataclasses import dataclass


class StateCommand:
    """Base of everything here, so that others can pass it on."""


# From the user process to the service.


@dataclass(frozen=True)
class SetStateSharing(StateCommand):
    """What the user wishes from now on; answered when new requests are treated so."""

    allowed: bool
    priority: float


@dataclass(frozen=True)
class LoadState(StateCommand):
    """Download a state; answered by a :class:`LoadedState`. ``timeout``: seconds for all of it."""

    download: int
    timeout: float | None
    wants_progress: bool


@dataclass(frozen=True)
class LoadedState:
    """``donor`` (PeerID bytes) has given a state of these tensors (packed), which lies in the memory of the download;
    or why nobody has.

    :param age: seconds since the donor copied it
    :param seconds: that the download took
    """

    donor: bytes
    entries: bytes
    failure: str | None = None
    age: float = 0.0
    seconds: float = 0.0


# From the service to the user process.


@dataclass(frozen=True)
class CaptureState(StateCommand):
    """Have ``get_current_state()`` called and copy what it returns; answered by a :class:`StateCaptured` with one
    descriptor, or by a :class:`CaptureFailed`.
    """


@dataclass(frozen=True)
class StateCaptured:
    """The copy's memory, of ``nbytes`` bytes, comes as a descriptor.

    :param entries: packed
    :param formats: pickled, since the classes of their codecs may be the user's
    """

    nbytes: int
    entries: bytes
    formats: bytes


@dataclass(frozen=True)
class CaptureFailed:
    """There is no copy; the user process's log says why, and joiners are told ``reason``."""

    reason: str


@dataclass(frozen=True)
class AllocateState(StateCommand):
    """Make memory for a state, in place of what the download had before; answered by True with one descriptor, or by a
    :class:`MemoryRefused`.
    """

    download: int
    nbytes: int


@dataclass(frozen=True)
class MemoryRefused:
    """There is not so much memory."""

    reason: str


@dataclass(frozen=True)
class ShowProgress(StateCommand):
    """How far a download is, in bytes; ``donor``: as people read it."""

    download: int
    donor: str
    received: int
    total: int
