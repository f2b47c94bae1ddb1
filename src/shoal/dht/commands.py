"""What the user's process asks of the DHT in its background process: a closed set of commands."""

from __future__ import annotations

from dataclasses import dataclass

from shoal.dht.config import DHTConfig
from shoal.p2p.multiaddr import Multiaddr


@dataclass(frozen=True)
class DHTSetup:
    """All that a DHT node starts with.

    :param validators: pickled by :mod:`shoal.runtime.pickling`: their modules may be heavy, or of the user's
        making
    """

    listen: tuple[Multiaddr, ...]
    announce: tuple[Multiaddr, ...]
    initial_peers: tuple[Multiaddr, ...]
    identity_path: str | None
    config: DHTConfig
    validators: bytes
    clock_offset: float = 0.0
    """Of DHT time in the user's process, so that both begin with the same."""


@dataclass(frozen=True)
class StoreEntry:
    """Answered by whether it was stored."""

    key: bytes
    value: bytes
    expiration_time: float
    subkey: bytes | None


@dataclass(frozen=True)
class GetRecord:
    """Answered by a ValueWithExpiration or None."""

    key: bytes
    latest: bool


@dataclass(frozen=True)
class RunCoroutine:
    """Answered by what ``function(dht, node)`` returned; pickled by :mod:`shoal.runtime.pickling`."""

    function: bytes


@dataclass(frozen=True)
class AddValidators:
    """Answered by None. ``validators`` as in :class:`DHTSetup`."""

    validators: bytes


@dataclass(frozen=True)
class RegisterClasses:
    """Answered by None. ``classes``: a pickled dictionary of type codes to classes, for MSGPackSerializer."""

    classes: bytes


@dataclass(frozen=True)
class DescribeNode:
    """Answered by a :class:`NodeDescription`."""


@dataclass(frozen=True)
class NodeDescription:
    """How the node is seen by others now.

    :param peer_id: as bytes
    :param visible_addresses: where others can dial it, with ``/p2p``; none in client mode
    """

    peer_id: bytes
    client_mode: bool
    visible_addresses: tuple[Multiaddr, ...]
    clock: ClockReading


@dataclass(frozen=True)
class ClockReading:
    """What time it is for the node; also sent by itself when the node's clock was moved.

    :param offset: DHT time minus steady time, which is the same in both processes
    :param moves: how often the clock was moved before: of two readings, that with more counts
    """

    offset: float
    moves: int
