"""What the user process and the service in the background process say to each other about states. Data only."""

from __future__ import annotations

from dataclasses import dataclass

from shoal.compression.base import CompressionBase


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
class StateMemory(StateCommand):
    """Answers :class:`AllocateState`: the memory follows as a descriptor; or why there is none."""

    download: int
    nbytes: int
    refusal: str | None = None


@dataclass(frozen=True)
class StateCaptured(StateCommand):
    """Answers :class:`CaptureState`: the copy's memory, of ``nbytes`` bytes, follows as a descriptor.

    ``entries``: packed.
    """

    capture: int
    nbytes: int
    entries: bytes
    codecs: tuple[CompressionBase, ...]


@dataclass(frozen=True)
class CaptureFailed(StateCommand):
    """Answers :class:`CaptureState`: there is no copy; the user process's log says why."""

    capture: int
    reason: str


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
    """Have ``get_current_state()`` called and copy what it returns; answered by a command, after some time."""

    capture: int


@dataclass(frozen=True)
class AllocateState(StateCommand):
    """Make memory for a state, in place of what the download had before; answered by a command."""

    download: int
    nbytes: int


@dataclass(frozen=True)
class ShowProgress(StateCommand):
    """How far a download is, in bytes; ``donor``: as people read it."""

    download: int
    donor: str
    received: int
    total: int
