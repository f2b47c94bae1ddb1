"""From the records of all peers to the swarm's epoch, its samples, and when it will end. Pure.

An epoch ends by samples: when those that peers have *reported* reach the target. The estimated end only says when to
look again, and when to begin to search for a group. So an estimate that is off ends no epoch too early.

Peers do not believe everything. See :func:`global_epoch` for epochs. A record with more samples than :data:`MAX_SHARE`
times the target is left out. Within that a peer can still lie of its own work: no signature tells.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable
from dataclasses import dataclass

from shoal.optim.progress.values import ProgressRecord
from shoal.utils import figures

MAX_SHARE = 100
"""Times the target that one peer can have contributed to one epoch: a single step may be larger than the target."""
LOOK_SHARE = 0.02
"""Share of an epoch's length that passes between two looks at least: more would be of no use, but cost the DHT."""
LOOK_COST = 0.0005
"""Seconds between two looks, for each peer whose record is read, at least: some 280 kB a second."""


@dataclass(frozen=True)
class Periods:
    """When to look at the progress of others. Seconds, apart from ``drift_*``."""

    minimum: float = 0.1
    maximum: float = 10.0
    default: float = 3.0
    """As long as no speed is known."""
    drift_peers: float = 3.0
    """Peers that may join before the epoch ends."""
    drift_rate: float = 0.2
    """Share of peers that may join before the epoch ends."""


@dataclass(frozen=True, slots=True)
class Sighting:
    """Another peer's record, and when the reader first saw that content, on the reader's steady clock."""

    record: ProgressRecord
    seen_at: float
    is_gone: bool = False
    """Whether the peer has ended since. Its samples still count, as they do for others; nobody waits for it."""

    def age(self, now: float) -> float:
        """Seconds since the peer's report."""
        return self.record.age + max(0.0, now - self.seen_at)


@dataclass(frozen=True)
class Forecast:
    """What the records of all say, without the own samples, which change with each report."""

    epoch: int
    others_samples: int
    """Samples of this epoch that other peers have reported."""
    num_peers: int
    num_clients: int
    eta: float
    """Seconds until the epoch is expected to end; infinite if no speed is known."""
    next_look: float
    """Seconds until the next look."""
    pace: float
    """Seconds between two looks, and two records of this peer, at least."""
    companions: int = 0
    """Other peers in the epoch of this one."""
    others_are_gone: bool = False
    """Whether there were other peers, and all of them have ended."""

    def __str__(self) -> str:
        end = "at an unknown time" if math.isinf(self.eta) else f"in {figures.duration(self.eta)}"
        return (
            f"epoch {self.epoch} ends {end}: {figures.count(self.others_samples, 'sample')} of others, "
            f"{figures.count(self.num_peers, 'peer')}, {figures.count(self.num_clients, 'client')} among them"
        )

    def samples(self, own_epoch: int, own_samples: int) -> int:
        """Samples of the epoch with the own ones, if they belong to it."""
        return self.others_samples + (own_samples if own_epoch == self.epoch else 0)

    def is_over(self, own_epoch: int, own_samples: int, target: int) -> bool:
        """Whether a peer has to end its epoch: the swarm has done so, or the samples are complete."""
        return self.epoch > own_epoch or (
            self.epoch == own_epoch and self.samples(own_epoch, own_samples) >= target
        )


def global_epoch(own: int, others: Collection[int]) -> int:
    """The swarm's epoch: the highest one that enough peers confirm, or the own one if that is higher.

    An epoch is confirmed by peers that are in it or in the one after it. Two of the ``others`` are needed, or the only
    one. So one peer that states a giant epoch, or always the next one, steers nobody. A newcomer whose peers confirm
    none of each other's epochs believes the lowest one.

    :param others: epochs of all other peers that are no clients
    """
    counts: dict[int, int] = {}
    for epoch in others:
        counts[epoch] = counts.get(epoch, 0) + 1
    needed = min(2, len(others))
    confirmed = [epoch for epoch in counts if counts[epoch] + counts.get(epoch + 1, 0) >= needed]
    if not confirmed and counts and min(counts) > own:
        return min(counts)
    return max([own, *confirmed])


def forecast(
    own: ProgressRecord,
    others: Iterable[Sighting],
    *,
    target: int,
    now: float,
    periods: Periods,
) -> Forecast:
    """What a peer knows at ``now``, on its steady clock.

    :param own: what it has done itself
    :param others: the records of others, without the own one
    """
    plausible = [
        sighting
        for sighting in others
        if max(sighting.record.samples, sighting.record.samples_before) <= MAX_SHARE * target
    ]
    # What one that is gone had begun can be loaded from nobody, unless others are there, too.
    full = [s.record.epoch for s in plausible if not (s.record.client_mode or s.is_gone)]
    epoch = global_epoch(own.epoch, full)
    near = [sighting for sighting in plausible if abs(sighting.record.epoch - epoch) <= 1]
    reported = sum(_samples_in(epoch, sighting.record) for sighting in near)
    near = [sighting for sighting in near if not sighting.is_gone]
    current = Sighting(own, now)
    counted = [*near, current] if abs(own.epoch - epoch) <= 1 else near
    expected = reported + _samples_in(epoch, own) + _under_way(epoch, counted, now)
    rate = sum(sighting.record.samples_per_second for sighting in counted)
    eta = max(0.0, target - expected) / rate if rate > 0 else math.inf
    num_peers = len(near) + 1
    pace = max(periods.minimum, LOOK_COST * num_peers, LOOK_SHARE * target / rate if rate else 0.0)
    pace = min(pace, periods.maximum)
    return Forecast(
        epoch=epoch,
        others_samples=reported,
        num_peers=num_peers,
        num_clients=sum(sighting.record.client_mode for sighting in [*near, current]),
        eta=eta,
        next_look=_next_look(eta, num_peers, pace, periods),
        pace=pace,
        companions=sum(sighting.record.epoch == own.epoch for sighting in plausible if not sighting.is_gone),
        others_are_gone=bool(plausible) and all(sighting.is_gone for sighting in plausible),
    )


def _samples_in(epoch: int, record: ProgressRecord) -> int:
    """What a peer has contributed to an epoch, which it may have left a moment ago."""
    if record.epoch == epoch:
        return record.samples
    return record.samples_before if record.epoch == epoch + 1 else 0


def _under_way(epoch: int, sightings: Iterable[Sighting], now: float) -> float:
    """Samples that peers of the epoch have processed since their reports, by their speeds."""
    return sum(
        sighting.record.samples_per_second * sighting.age(now)
        for sighting in sightings
        if sighting.record.epoch == epoch
    )


def _next_look(eta: float, num_peers: int, pace: float, periods: Periods) -> float:
    if math.isinf(eta):
        return periods.default
    drifted = max(num_peers + periods.drift_peers, num_peers * (1 + periods.drift_rate))
    return min(max(eta * num_peers / drifted, pace), periods.maximum)
