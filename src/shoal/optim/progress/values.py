"""What a peer says of its progress, and what follows for the swarm. Pure."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from shoal.errors import InvalidValueError

MAX_EPOCH = 2**48
MAX_SAMPLES = 2**53
MAX_RATE = 1e12
MAX_AGE = 3600.0
"""What a record may state at most; one that states more is left out."""


@dataclass(frozen=True)
class LocalTrainingProgress:
    """What one peer has done in its epoch."""

    peer_id: bytes
    epoch: int
    samples_accumulated: int
    """Samples processed in this epoch."""
    samples_per_second: float
    time: float
    """DHT time of the report; for this peer's own use, other peers are told an age."""
    client_mode: bool


@dataclass(frozen=True)
class GlobalTrainingProgress:
    """What the swarm has done in its epoch, as far as this peer knows."""

    epoch: int
    samples_accumulated: int
    """Samples that all peers have reported for this epoch."""
    target_batch_size: int
    num_peers: int
    """Peers of this epoch, the own one and clients included; those one epoch away, too: they follow, or lead."""
    num_clients: int
    eta_next_epoch: float
    """DHT time at which the epoch is expected to end; infinite as long as no speed is known."""
    next_fetch_time: float
    """DHT time at which other peers' progress is read next."""


@dataclass(frozen=True, slots=True)
class ProgressRecord:
    """What a peer stores in the DHT. It states an age instead of a time, so that clocks do not matter."""

    epoch: int
    samples: int
    samples_before: int
    """What it contributed to the epoch before: those who are still in that one count on it."""
    samples_per_second: float
    age: float
    """Seconds between the report and the moment at which this record was stored."""
    client_mode: bool

    def encode(self) -> list[Any]:
        return [
            self.epoch,
            self.samples,
            self.samples_before,
            self.samples_per_second,
            round(self.age, 3),
            self.client_mode,
        ]

    @classmethod
    def decode(cls, value: Any) -> ProgressRecord:
        """:raises InvalidValueError: a stranger's value is no record, or states what cannot be"""
        if not isinstance(value, list | tuple) or len(value) != 6:
            raise InvalidValueError(f"a record of progress must be a list of 6 values, got {value!r:.80}")
        epoch, samples, before, rate, age, client = value
        counts = ((epoch, MAX_EPOCH), (samples, MAX_SAMPLES), (before, MAX_SAMPLES))
        numbers = ((rate, MAX_RATE), (age, MAX_AGE))
        if not (
            all(type(count) is int and 0 <= count <= most for count, most in counts)
            and all(_is_number(number) and 0 <= number <= most for number, most in numbers)
            and isinstance(client, bool)
        ):
            raise InvalidValueError(f"a record of progress must hold counts and numbers, got {value!r:.120}")
        return cls(epoch, samples, before, float(rate), float(age), client)


WITHDRAWN = ProgressRecord(0, 0, 0, 0.0, 0.0, client_mode=True)
"""Takes the place of the record of a peer that has left, or has nothing to report."""


def _is_number(value: Any) -> bool:
    return type(value) in (int, float)  # NaN fails every comparison
