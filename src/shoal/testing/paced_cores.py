"""Groups of pure cores whose members take their time: to start, and to send and receive each part. No faults.

:class:`PacedCores` is one round in simulated time. :func:`run_rounds` is many, with deadlines that adapt or do not::

    rounds = draw_rounds(random.Random(1), [Conditions(rounds=50)])
    print(run_rounds(rounds, RoundTimeouts(None, 20.0, 40.0), adaptive=True).mean)
"""

from __future__ import annotations

import random
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from shoal.averaging.allreduce.deadlines import Deadlines
from shoal.averaging.allreduce.events import RoundTimeouts
from shoal.testing.allreduce_cores import Cores
from shoal.testing.allreduce_members import Member

__all__ = ["Conditions", "Outcomes", "PacedCores", "PacedRound", "draw_rounds", "run_rounds"]

PART_BYTES = 1 << 19
LIMIT = 1e6
"""Simulated seconds for a round."""


@dataclass(frozen=True)
class Conditions:
    """What some rounds of a group are like. Times of members are log-normal around these medians.

    :param offset: seconds until a member's user has its tensors ready
    :param part: seconds for which one part keeps the link between two members busy
    :param owners: members that average a share; the others only contribute, as those with a slow link would
    :param parts: of each owner's span
    :param sigma: of the logarithm of a time
    :param slow: how likely a member is slow to start, and how likely its links are slow, in one round
    :param times_slow: so many times as long
    :param alike: whether a member is slow in both or in none; else each is drawn by itself
    """

    rounds: int
    size: int = 8
    owners: int = 2
    offset: float = 40.0
    part: float = 0.3
    parts: int = 100
    sigma: float = 0.5
    slow: float = 0.05
    times_slow: float = 10.0
    alike: bool = False


@dataclass(frozen=True)
class PacedRound:
    """The times of the members in one round, in seconds, and how many parts each owner has: the first members."""

    offsets: tuple[float, ...]
    part_times: tuple[float, ...]
    owners: int
    parts: int


def draw_rounds(rng: random.Random, phases: Iterable[Conditions]) -> list[PacedRound]:
    """Rounds of these phases, one after the other."""
    return [_draw_round(rng, phase) for phase in phases for _ in range(phase.rounds)]


def _draw_round(rng: random.Random, phase: Conditions) -> PacedRound:
    def draw(median: float, slow: list[bool]) -> tuple[float, ...]:
        return tuple(
            median * (phase.times_slow if is_slow else 1.0) * rng.lognormvariate(0.0, phase.sigma)
            for is_slow in slow
        )

    starts = [rng.random() < phase.slow for _ in range(phase.size)]
    links = starts if phase.alike else [rng.random() < phase.slow for _ in range(phase.size)]
    return PacedRound(draw(phase.offset, starts), draw(phase.part, links), phase.owners, phase.parts)


class PacedCores(Cores):
    """A group whose members all contribute, and start and send at a pace of their own."""

    def __init__(
        self, rng: random.Random, paced: PacedRound, timeouts: Sequence[RoundTimeouts], *, min_size: int = 2
    ) -> None:
        size = len(paced.offsets)
        super().__init__(rng, size, auxiliaries=0.0, clients=0.0, parts=(paced.parts,), min_size=min_size)
        owned = tuple(paced.parts if member < paced.owners else 0 for member in range(size))
        self.parts = sum(owned)
        self.members = [
            Member(replace(one.core.roles, parts_owned=owned), limits, 1.0)
            for one, limits in zip(self.members, timeouts, strict=True)
        ]
        self.paced = paced
        self.ended_at: dict[int, float] = {}

    def snapshot_after(self, member: int) -> float:
        return self.paced.offsets[member]

    def transfer_time(self, source: int, target: int, message: Any) -> float:
        match message:
            case ("part", _) | ("average", _, _):
                return max(self.paced.part_times[source], self.paced.part_times[target])
        return super().transfer_time(source, target, message)

    def _leave(self, me: int) -> None:
        self.ended_at.setdefault(me, self.now)
        super()._leave(me)

    @property
    def seconds(self) -> float:
        """Until the last one that commits held the average; until the last one knew that there is none."""
        return max(self.ended_at[me] for me in self.committed or self.ended_at)


@dataclass(frozen=True)
class Outcomes:
    """What became of many rounds: for each, its seconds, and how many members are not in its average."""

    seconds: tuple[float, ...]
    lost: tuple[int, ...]

    @property
    def mean(self) -> float:
        """Seconds of a round."""
        return statistics.fmean(self.seconds)


def run_rounds(
    rounds: Sequence[PacedRound], limits: RoundTimeouts, *, adaptive: bool = False, seed: int = 0
) -> Outcomes:
    """Run one round after the other.

    :param adaptive: each member's deadlines follow what it has seen itself; the limits are their ceilings
    :raises Violation: members that committed hold something else than the outcome says
    """
    size = len(rounds[0].offsets)
    deadlines = [Deadlines(limits) for _ in range(size)] if adaptive else []
    seconds: list[float] = []
    lost: list[int] = []
    for number, paced in enumerate(rounds):
        timeouts = [one.timeouts(PART_BYTES) for one in deadlines] or [limits] * size
        cores = PacedCores(random.Random(seed * 1_000_003 + number), paced, timeouts)
        cores.run(until=LIMIT)
        cores.check()
        seconds.append(cores.seconds)
        lost.append(size - len(cores.committed))
        for one, member in zip(deadlines, cores.members, strict=False):
            one.learn(member.core.ledger.waits, PART_BYTES)
    return Outcomes(tuple(seconds), tuple(lost))
