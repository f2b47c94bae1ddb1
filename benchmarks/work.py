"""What is measured: pieces of work, and the sides that do them. Pure values."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, TypeAlias

FLOAT_BYTES = 4
TRAINING_TARGET = 256
"""Samples of an epoch in the benchmark of optimizers."""

Control: TypeAlias = Literal["cubic", "bbr"]
"""Congestion controls, as Linux calls them."""


@dataclass(frozen=True)
class Network:
    """Machines that meet over long links, each with an access link of its own."""

    control: Control
    rtt_ms: float
    """Between any two machines, with empty queues."""
    rate: float
    """Mbit/s of each access link, up and down."""
    loss: float = 0.0
    """Fraction of the segments that get lost, drawn on the sender's uplink."""
    first_up: float | None = None
    """Mbit/s of the first machine's uplink, if it is slower than ``rate``."""


@dataclass(frozen=True)
class Averaging:
    """One group averages fp32 tensors, again and again."""

    peers: int
    megabytes: float
    """Of the tensors of one peer, in 10^6 bytes."""
    network: Network | None = None
    """None: loopback."""
    bandwidth_given: bool = False
    """Each averager is told the bandwidth of its uplink."""
    busy: bool = False
    """Other programs keep every core of the machine busy."""
    training: bool = False
    """The first peer has one core, and calculates on it while rounds run."""
    handed_over: bool = False
    """The averagers' tensors lie in shared memory, so that no copy of them is made."""
    foreign: bool = False
    """Somebody else's connection and ping share the links of the first two machines."""

    @property
    def floats(self) -> int:
        return round(self.megabytes * 1e6 / FLOAT_BYTES)


@dataclass(frozen=True)
class Download:
    """A joiner downloads the state of a donor."""

    megabytes: float
    network: Network | None = None

    @property
    def floats(self) -> int:
        return round(self.megabytes * 1e6 / FLOAT_BYTES)


@dataclass(frozen=True)
class Swarm:
    """Peers average in groups whose members change, as hivemind's own benchmark of averaging has them do."""

    peers: int
    group: int
    steps: int


@dataclass(frozen=True)
class Training:
    """Peers train one model with an optimizer of the swarm, as in hivemind's own benchmark of its optimizer."""

    peers: int
    clients: int
    """How many of them nobody can dial: the last ones."""
    epochs: int
    step_s: tuple[float, float]
    """Seconds of one step without the optimizer's part: least and most."""


@dataclass(frozen=True)
class Lookups:
    """Records are stored in a DHT and found again."""

    nodes: int
    operations: int


Work: TypeAlias = Averaging | Download | Swarm | Training | Lookups


@dataclass(frozen=True)
class Side:
    """A program that does the work."""

    library: Literal["shoal", "hivemind", "gloo", "raw"]
    connections: int = 0
    """TCP connections that raw TCP uses at once."""

    @property
    def name(self) -> str:
        return f"raw {self.connections}" if self.library == "raw" else self.library


SHOAL, HIVEMIND, GLOO = Side("shoal"), Side("hivemind"), Side("gloo")
BEST_RAW = "raw"
"""Stands for the best of the numbers of connections in a row's medians."""


def raw(*connections: int) -> tuple[Side, ...]:
    """Raw TCP with these numbers of connections."""
    return tuple(Side("raw", count) for count in connections)
