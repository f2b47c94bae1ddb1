"""Whole peers in simulated time: each has a node of the DHT, searches for groups, and averages in them.

Only the processes and the sockets of a real peer are missing. Every peer averages values of its own in each step, so
that an average shows whose values are in it: :meth:`SimulatedSwarm.check` compares it with the exact one in float64.
"""

from __future__ import annotations

import asyncio
from collections import defaultdict
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

import torch

from shoal.averaging.allreduce.core import AllReduce
from shoal.averaging.allreduce.round import Round, RoundResult, RoundTimeouts
from shoal.averaging.allreduce.rounds import Rounds
from shoal.averaging.background.division import Division
from shoal.averaging.group import GroupInfo, PeerMode
from shoal.averaging.matchmaking_config import MatchmakingConfig
from shoal.averaging.partition import Layout, Partition
from shoal.averaging.router import Router
from shoal.compression.base import CompressionBase, NoCompression
from shoal.errors import MatchmakingException
from shoal.p2p.identity import PeerID
from shoal.sansio.trace import Turn
from shoal.testing.arena import make_arena, tensor_in
from shoal.testing.faults import PHASES
from shoal.testing.matchmaking import PREFIX, SCHEMA, SimulatedMatchmaking

__all__ = ["Attempt", "Mismatch", "SimulatedSwarm"]

PART_BYTES = 1024
NO_LIMITS = RoundTimeouts()
RETRY_PAUSE = 0.5
"""Seconds between two attempts of a step."""
LOSSY = 0.02
"""How far a lossy codec may be from the exact average, relative to the largest value."""

Watch = Callable[[int, str], None]
Snapshot = Callable[[int], Awaitable[None]]


class Mismatch(AssertionError):
    """Members of one group ended differently, or an average is not the one that its report describes."""


@dataclass(frozen=True)
class Attempt:
    """How a round ended at one peer."""

    number: int
    group: GroupInfo
    partition: Partition
    result: RoundResult
    average: torch.Tensor
    """The averages, flat; of no meaning if the round did not commit."""


async def take_at_once(_: int) -> None:
    """A snapshot that lies in the arena already."""


class SimulatedSwarm:
    """Peers 0, 1, ... on the machines ``node0``, ``node1``, ... of ``self.network``.

    :param count: elements of the vector of each peer
    :param watch: called with a peer's number and a phase when it comes to it: *searching*, *forming* (it has a group),
      *copying*, *applying*, and those of :data:`.faults.PHASES` that a round goes through
    :param take_snapshot: called with a peer's number before its values count; may raise what a real snapshot may
    """

    def __init__(
        self,
        seed: int,
        config: MatchmakingConfig,
        *,
        count: int = 2000,
        codec: CompressionBase | None = None,
        timeouts: RoundTimeouts = NO_LIMITS,
        latency: tuple[float, float] = (0.001, 0.1),
        watch: Watch = lambda number, phase: None,
        take_snapshot: Snapshot = take_at_once,
    ) -> None:
        self.sim = SimulatedMatchmaking(seed, config, latency=latency)
        self.network = self.sim.network
        codec = codec or NoCompression()
        self.is_lossless = codec.lossless(torch.float32)
        self.layout = Layout.from_tensors([torch.zeros(count)], [codec])
        self.timeouts = timeouts
        self.watch = watch
        self.take_snapshot = take_snapshot
        self.weights: dict[int, float] = {}
        """Of each peer; 1 if it is not here."""
        self.attempts: list[Attempt] = []
        """Of all peers, in the order in which they ended."""
        self.log: list[str] = []
        """What happened, and when."""
        self.numbers: dict[PeerID, int] = {}
        """Of all peers that were ever there."""
        self._config = config
        self._division = Division(self.layout, part_size_bytes=PART_BYTES, min_vector_size=0)
        self._rounds: dict[int, Rounds] = {}
        self._values: dict[tuple[bytes, int], torch.Tensor] = {}
        """What a peer put into the round of a group."""
        self._generator = torch.Generator().manual_seed(seed)

    def note(self, text: str) -> None:
        """Add a line to the log."""
        self.log.append(f"{asyncio.get_running_loop().time():.3f} {text}")

    # ---- peers

    async def start(self, number: int, mode: PeerMode = PeerMode.FULL, *, schema: bytes = SCHEMA) -> None:
        """Start one peer, joining the DHT by peer 0."""
        self.numbers[self.sim.dht.identity(number).peer_id] = number
        await self.sim.start_one(number, mode, schema=schema)
        self._rounds[number] = Rounds(Router.of(self.sim.dht.nodes[number].host), PREFIX)

    async def leave(self, number: int) -> None:
        """A peer ends in order; its step must have been cancelled."""
        del self._rounds[number]
        await self.sim.matchmakers.pop(number).close()
        await self.sim.dht.stop(number)

    async def kill(self, number: int, *, silently: bool = False) -> None:
        """The machine of a peer is gone; its step must have been cancelled."""
        del self._rounds[number]
        await self.sim.kill(number, silently=silently)

    async def close(self) -> None:
        """End all peers."""
        await self.sim.close()

    # ---- steps

    async def step(
        self, number: int, *, timeout: float = 30.0, change: Callable[[torch.Tensor], None] | None = None
    ) -> Attempt | str:
        """Search and average until a round commits, is in doubt, or ``timeout`` has passed; the last attempt, or why
        there was no group.

        :param change: makes the peer's values others, before each attempt
        """
        loop = asyncio.get_running_loop()
        deadline = loop.time() + timeout
        while True:
            left = deadline - loop.time()
            self.watch(number, "searching")
            try:
                group = await self._find_group(number, left)
            except MatchmakingException as e:
                self.note(f"{number} found no group: {str(e)[:100]}")
                return str(e)
            self.watch(number, "forming")
            attempt = await self._average(number, group, change)
            if attempt.result.failure is None or attempt.result.in_doubt or loop.time() >= deadline:
                return attempt
            await asyncio.sleep(RETRY_PAUSE)

    async def _find_group(self, number: int, seconds: float) -> GroupInfo:
        now = self.sim.dht.clock(number)()
        return await self.sim.matchmakers[number].find_group(
            start_time=now + min(self._config.min_matchmaking_time, seconds / 2),
            deadline=now + seconds,
            weight=self.weights.get(number, 1.0),
        )

    async def _average(
        self, number: int, group: GroupInfo, change: Callable[[torch.Tensor], None] | None
    ) -> Attempt:
        matchmaker, rounds = self.sim.matchmakers[number], self._rounds[number]
        values = torch.randn(self.layout.numel, generator=self._generator)
        self._values[group.group_id, number] = values.clone()
        if change is not None:
            change(values)
        arena = make_arena(self.layout, [values])

        async def snapshot() -> None:
            self.watch(number, "copying")
            await self.take_snapshot(number)

        current = Round(
            self.sim.dht.nodes[number].host,
            PREFIX,
            group,
            self._division.among(group),
            arena,
            take_snapshot=snapshot,
            weight=lambda: self.weights.get(number, 1.0),
            timeouts=self.timeouts,
            min_size=self._config.min_group_size,
        )
        self._watch_core(number, current.core)
        rounds.begin(current)
        matchmaker.watch_members(lambda peer, why: rounds.lose_member(group.group_id, peer, why))
        try:
            result = await current.run()
        finally:
            rounds.end(current)
        excluded = [peer for peer in group.peer_ids if str(peer) in {one.member for one in result.exclusions}]
        unreached = current.unreached
        matchmaker.keep_apart(unreached)
        matchmaker.hear_of_exclusions(group.leader, excluded)
        if result.failure is None:
            self.watch(number, "applying")
            matchmaker.round_committed(group, {*excluded, *unreached})
        attempt = Attempt(
            number, group, self._division.among(group), result, tensor_in(self.layout, arena.average, 0)
        )
        self.attempts.append(attempt)
        ending = "is in doubt" if result.in_doubt else result.failure or "committed"
        self.note(f"{number} in {group.group_id.hex()[:6]} of {len(group)}: {ending}")
        return attempt

    def _watch_core(self, number: int, core: AllReduce) -> None:
        """Tell the watcher of this peer's phases: the trace of the process does not know whose turn one is."""
        handle = core.handle

        def watched(event: object, now: float) -> object:
            effects = handle(event, now)  # type: ignore[arg-type]
            turn = Turn("allreduce", "", now, event, tuple(effects))
            for phase, matches in PHASES.items():
                if matches(turn):
                    self.watch(number, phase)
            return effects

        core.handle = watched  # type: ignore[method-assign, assignment]

    # ---- what must hold

    def check(self) -> None:
        """Members that committed one group hold the average that their reports describe, alike; and nobody that they
        count on has failed plainly.

        :raises Mismatch:
        """
        groups: dict[bytes, list[Attempt]] = defaultdict(list)
        for attempt in self.attempts:
            groups[attempt.group.group_id].append(attempt)
        for attempts in groups.values():
            committed = [one for one in attempts if one.result.failure is None]
            if committed:
                self._check_alike(committed)
                self._check_counted(attempts, committed[0])
                self._check_average(committed)

    def _check_alike(self, committed: list[Attempt]) -> None:
        first = committed[0]
        for one in committed:
            reports = [
                (each.result.exclusions, each.result.weights, each.result.partial) for each in (first, one)
            ]
            if reports[0] != reports[1]:
                raise Mismatch(f"{first.number} and {one.number} report differently: {reports}")
            takes = first.result.applies and one.result.applies
            if takes and self.is_lossless and not torch.equal(first.average, one.average):
                raise Mismatch(
                    f"{first.number} and {one.number} committed other bits: {first.group.group_id.hex()}"
                )

    def _check_counted(self, attempts: list[Attempt], committed: Attempt) -> None:
        out = {one.member for one in committed.result.exclusions}
        for one in attempts:
            is_out = str(self.sim.dht.identity(one.number).peer_id) in out or not one.result.applies
            if one.result.failure is not None and not one.result.in_doubt and not is_out:
                raise Mismatch(f"{one.number} failed, though it counts: {one.result.failure}")

    def _check_average(self, committed: list[Attempt]) -> None:
        first = committed[0]
        peers, result = first.group.peer_ids, first.result
        numbers = [self.numbers[peer] for peer in peers]
        for index, part in enumerate(first.partition.parts):
            weights = dict(enumerate(result.weights))
            for member, begin, end in result.partial:
                if begin <= index < end:
                    weights[member] = self.weights.get(numbers[member], 1.0)
            counted = {member: weight for member, weight in weights.items() if weight}
            where = slice(part.start, part.start + part.count)
            inputs = {
                member: self._values[first.group.group_id, numbers[member]][where].double()
                for member in counted
            }
            exact = sum((counted[member] * inputs[member] for member in counted), torch.zeros(1).double())
            exact = exact / sum(counted.values())
            largest = max(float(values.abs().max()) for values in inputs.values())
            limit = (1e-6 if self.is_lossless else LOSSY) * largest
            for one in committed:
                if one.result.applies and float((one.average[where].double() - exact).abs().max()) > limit:
                    raise Mismatch(f"part {index} at {one.number} is not the average of {counted}")
