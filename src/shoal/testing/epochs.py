"""A swarm whose peers end epochs together, simulated on the virtual clock: the real rules, a DHT that only takes time.

Steps, rounds, reads and stores are waits. What is decided (when to tell, when to look, when an epoch is over) is the
code of :mod:`shoal.optim.progress`. Each peer has a steady clock of its own, off by as much as it likes. Rounds succeed
here, so that peers need not look while they wait for one, as the tracker does.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import random
from collections.abc import Iterator
from dataclasses import dataclass, field

from shoal.optim.progress.forecast import Periods, Sighting, forecast
from shoal.optim.progress.ledger import Ledger
from shoal.optim.progress.values import ProgressRecord
from shoal.utils.tasks import TaskSet

__all__ = ["EpochSwarm", "PeerPlan"]


@dataclass(frozen=True)
class PeerPlan:
    """One peer. Times are virtual seconds."""

    batch_size: int
    step_time: float
    client_mode: bool = False
    clock_error: float = 0.0
    joins_at: float = 0.0
    leaves_at: float = math.inf
    fails_at: float = math.inf
    """It is gone without a word, in the middle of whatever it does."""


@dataclass
class _Stored:
    record: ProgressRecord
    expires_at: float


@dataclass
class EpochSwarm:
    """Runs peers, and notes what they do.

    :param latency: seconds that one call of the DHT takes, at least and at most
    :param round_time: the same of the end of an epoch: search, averaging, inner step
    """

    seed: int
    target: int
    latency: tuple[float, float] = (0.02, 0.3)
    round_time: tuple[float, float] = (0.5, 1.5)
    lifetime: float = 60.0
    periods: Periods = Periods()
    stored: dict[int, _Stored] = field(default_factory=dict)
    samples: dict[int, int] = field(default_factory=dict)
    """By epoch: what all peers together processed in it. Peers that left before it was complete have
    taken their samples with them; those that failed did so when their records expired.
    """
    begun: dict[int, list[float]] = field(default_factory=dict)
    """By epoch: when each peer began it."""
    loads: int = 0
    """How often a peer took the state of others since it was too far behind."""
    longest_behind: float = 0.0
    """Seconds for which a peer was an epoch or more behind the first of the swarm, since it joined."""
    longest_behind_epochs: int = 0
    """Epochs that a peer was behind when it moved on; newcomers apart."""
    looks: int = 0
    stores: int = 0

    def __post_init__(self) -> None:
        self.rng = random.Random(f"epochs {self.seed}")

    async def run(self, plans: list[PeerPlan], seconds: float) -> None:
        """Let the peers train for ``seconds``."""
        tasks = TaskSet()
        peers = [_Peer(self, number, plan, tasks) for number, plan in enumerate(plans)]
        for peer in peers:
            tasks.start(peer.live(seconds), f"peer {peer.number}")
        await asyncio.sleep(seconds)
        await tasks.close()

    def delay(self, bounds: tuple[float, float]) -> float:
        return self.rng.uniform(*bounds)

    def highest_epoch(self) -> int:
        """The epoch that the first peer is in."""
        return max(self.begun, default=0)

    def complete_epochs(self) -> list[int]:
        """Epochs that have ended, the first one apart, into which peers come at different times."""
        return [epoch for epoch in sorted(self.samples) if 0 < epoch < self.highest_epoch()]


class _Peer:
    def __init__(self, swarm: EpochSwarm, number: int, plan: PeerPlan, tasks: TaskSet) -> None:
        self.swarm, self.number, self.plan, self._tasks = swarm, number, plan, tasks
        self.ledger = Ledger(swarm.target, swarm.periods, self.clock())
        self._seen: dict[int, Sighting] = {}
        self._changed = asyncio.Event()
        self._is_paused = False
        self._has_looked = False

    def clock(self) -> float:
        return asyncio.get_running_loop().time() + self.plan.clock_error

    async def live(self, seconds: float) -> None:
        await asyncio.sleep(self.plan.joins_at)
        watch = self._tasks.start(self._watch(), f"watch {self.number}")
        end = min(self.plan.leaves_at, self.plan.fails_at, seconds) - self.plan.joins_at
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(max(0.0, end)):
                await self._train()
        watch.cancel()
        if self.now() >= seconds:
            return
        if self.plan.fails_at < self.plan.leaves_at:
            await asyncio.sleep(self.swarm.lifetime)  # so long its samples count
        self.swarm.stored.pop(self.number, None)
        total = self.swarm.samples.get(self.ledger.epoch, 0)
        if total < self.swarm.target:
            self.swarm.samples[self.ledger.epoch] = total - self.ledger.samples

    # What an optimizer does

    async def _train(self) -> None:
        while not self._has_looked:
            self._changed.clear()
            await self._changed.wait()
        if self.ledger.epoch < self.ledger.forecast.epoch:
            await self._load()  # a newcomer begins where the others are
        while True:
            if self.ledger.epoch < self.ledger.forecast.epoch - 1:
                await self._load()
            began = self.clock()
            await asyncio.sleep(self.plan.step_time * self.swarm.rng.uniform(0.9, 1.1))
            self._report(self.plan.batch_size, self.clock() - began)
            if self.ledger.is_over():
                await self._end_epoch()

    async def _load(self) -> None:
        with self._paused():
            await asyncio.sleep(self.swarm.delay(self.swarm.round_time))
            self.swarm.loads += 1
            self._begin(self.ledger.forecast.epoch)

    async def _end_epoch(self) -> None:
        with self._paused():
            await asyncio.sleep(self.swarm.delay(self.swarm.round_time))
            epoch = max(self.ledger.epoch + 1, self.ledger.forecast.epoch)
            self.swarm.longest_behind_epochs = max(
                self.swarm.longest_behind_epochs, self.swarm.highest_epoch() - self.ledger.epoch
            )
            since = max(min(self.swarm.begun.get(self.ledger.epoch + 1, [self.now()])), self.plan.joins_at)
            self.swarm.longest_behind = max(self.swarm.longest_behind, self.now() - since)
            self._begin(epoch)

    # What a tracker does

    def now(self) -> float:
        return asyncio.get_running_loop().time()

    def _report(self, count: int, interval: float) -> None:
        epoch = self.ledger.epoch
        self.swarm.samples[epoch] = self.swarm.samples.get(epoch, 0) + count
        self.ledger.report(self.ledger.samples + count, count / interval, self.clock())
        self._changed.set()

    def _begin(self, epoch: int) -> None:
        self.ledger.begin(epoch, self.clock())
        self.swarm.begun.setdefault(epoch, []).append(self.now())
        self._changed.set()

    @contextlib.contextmanager
    def _paused(self) -> Iterator[None]:
        self._is_paused = True
        try:
            yield
        finally:
            self._is_paused = False
            self._changed.set()

    async def _watch(self) -> None:
        while True:
            wakes_at = self.ledger.agenda.tells_at() if self._is_paused else self.ledger.agenda.wakes_at()
            if wakes_at > self.clock():
                self._changed.clear()
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(
                        None if math.isinf(wakes_at) else wakes_at - self.clock() + 1e-6
                    ):
                        await self._changed.wait()
                continue
            if self.ledger.agenda.tells_at() <= self.clock():
                self.ledger.agenda.told(self.clock())
                self._tasks.start(self._store(self._record()), f"store {self.number}")
            if not self._is_paused and self.ledger.agenda.next_look <= self.clock():
                await self._look()

    def _record(self) -> ProgressRecord:
        age = self.clock() - self.ledger.reported_at
        return self.ledger.record(client_mode=self.plan.client_mode, age=age)

    async def _store(self, record: ProgressRecord) -> None:
        self.swarm.stores += 1
        await asyncio.sleep(self.swarm.delay(self.swarm.latency))
        if self.now() >= min(self.plan.leaves_at, self.plan.fails_at):
            return
        known = self.swarm.stored.get(self.number)
        place = (record.epoch, record.samples)
        if known is None or (known.record.epoch, known.record.samples) <= place:
            self.swarm.stored[self.number] = _Stored(record, self.now() + self.swarm.lifetime)

    async def _look(self) -> None:
        self.swarm.looks += 1
        begun = self.ledger.epochs_begun
        await asyncio.sleep(self.swarm.delay(self.swarm.latency))
        found = {
            number: stored.record
            for number, stored in self.swarm.stored.items()
            if number != self.number
            and stored.expires_at > self.now()
            and (stored.record.samples or stored.record.samples_before)
        }
        await asyncio.sleep(self.swarm.delay(self.swarm.latency))
        now = self.clock()
        self._seen = {number: self._sighting(number, record, now) for number, record in found.items()}
        found_now = forecast(
            self._record(),
            self._seen.values(),
            target=self.swarm.target,
            now=now,
            periods=self.swarm.periods,
        )
        self.ledger.found(found_now, begun, now)
        self._has_looked = True
        self._changed.set()

    def _sighting(self, number: int, record: ProgressRecord, now: float) -> Sighting:
        known = self._seen.get(number)
        return known if known is not None and known.record == record else Sighting(record, now)
