"""Swarms of whole peers that seeds make and strike: what may happen to peers, when, and what must hold after it."""

from __future__ import annotations

import asyncio
import random
import subprocess
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path

import torch

from shoal.averaging.allreduce.round import RoundTimeouts
from shoal.averaging.group import PeerMode
from shoal.averaging.matchmaking.sizes import plan_with_helpers
from shoal.averaging.matchmaking_config import MatchmakingConfig
from shoal.compression import BFloat16Compression
from shoal.dht.config import DHTConfig
from shoal.errors import AllreduceException, IdentityInUse, ShoalError
from shoal.testing.clock import run
from shoal.testing.matchmaking import SCHEMA
from shoal.testing.swarm import Attempt, SimulatedSwarm

PHASES = (
    "searching",
    "forming",
    "copying",
    "scattering",
    "reducing",
    "gathering",
    "ready",
    "voting",
    "deciding",
    "announcing",
    "applying",
)
STEP = 25.0
"""Seconds of a step."""
RECOVERY = 60.0
"""Seconds within which everybody that is left averages, once all faults are over."""
ENDS_WITHIN = 1200.0
"""Virtual seconds of a whole story: nothing waits for ever."""
TROUBLED = 30.0
"""Seconds for which a fault lasts at most."""
ONE_DHT_WITHIN = 60.0
"""Seconds after all that within which all nodes know each other."""
DEATH = 0.001
SKEW = 3.0
OTHER_SCHEMA = b"other".ljust(len(SCHEMA), b".")


class Violation(AssertionError):
    """What must hold does not; says the seed, the commit and the history."""


class Story:
    """One swarm of a seed, some steps of its peers, and what befalls them meanwhile."""

    def __init__(
        self, seed: int, sizes: Sequence[int] = range(2, 17), kinds: Sequence[str] | None = None
    ) -> None:
        """``kinds``: of faults; None: the seed chooses."""
        self.seed = seed
        rng = self.rng = random.Random(f"whole stack {seed}")
        self.size = rng.choice(sizes)
        target = rng.choice([size for size in (2, 3, 4, 8, 16) if size <= max(2, self.size)])
        self.modes = [self._mode(number) for number in range(self.size)]
        codec = BFloat16Compression() if rng.random() < 0.2 else None
        timeouts = rng.choice((RoundTimeouts(), RoundTimeouts(20.0, 3.0, 6.0)))
        self.swarm = SimulatedSwarm(
            seed,
            MatchmakingConfig(target, min_matchmaking_time=rng.choice((3.0, 5.0))),
            codec=codec,
            timeouts=timeouts,
            latency=rng.choice(((0.001, 0.01), (0.001, 0.1), (0.02, 0.2))),
            watch=self._watch,
            take_snapshot=self._snapshot,
        )
        self.network = self.swarm.network
        self.swarm.weights = {
            number: rng.choice((0.0, 0.5, 2.5)) for number in range(self.size) if rng.random() < 0.2
        }
        # each run has a random subset of the features
        if kinds is None:
            kinds = [kind for kind in FAULTS if rng.random() < 0.4]
        self.kinds = [rng.choice(kinds) for _ in range(rng.randint(1, 5))] if kinds else []
        self.rounds = rng.choice((1, 2))
        """Steps of each peer before all faults are over; one more follows."""
        self.steps: dict[int, asyncio.Task[None]] = {}
        self.alive: set[int] = set()
        self.strange: set[int] = set()
        """Peers of which nobody expects an average: another schema, or an identity that is in use."""
        self.twice: set[int] = set()
        """Peers whose identity somebody else had, too."""
        self.wrong: set[int] = set()
        """Peers whose next values are not finite."""
        self.unable: set[int] = set()
        """Peers whose next snapshot fails."""
        self._plans: dict[tuple[int, str], list[Callable[[], Awaitable[None]]]] = {}
        self._striking: set[asyncio.Task[None]] = set()

    def _mode(self, number: int) -> PeerMode:
        if number < 2:
            return PeerMode.FULL
        return self.rng.choices((PeerMode.FULL, PeerMode.CLIENT, PeerMode.AUXILIARY), (8, 2, 1))[0]

    def name(self, number: int) -> str:
        return f"node{number}"

    def someone(self) -> int:
        """Anybody; the first one's machine is how newcomers find the DHT, so it stays where they matter."""
        return self.rng.choice(sorted(self.alive))

    def a_while(self) -> float:
        return self.rng.choice((1.6, 3.0, 12.0, TROUBLED))

    # ---- the course

    def play(self) -> str:
        """Play the whole story; returns how the steps ended.

        :raises Violation:
        """
        try:
            return run(self._main, limit=ENDS_WITHIN)
        except Exception as e:
            what = f"{self.size} peers, {self.kinds}: {type(e).__name__}: {e}"
            history = "\n".join(self.swarm.log)
            raise Violation(f"seed {self.seed} at commit {commit()}: {what}\n{history}") from e

    async def _main(self) -> str:
        swarm = self.swarm
        if "clock skew" in self.kinds:
            skews = {number: self.rng.uniform(-SKEW, SKEW) for number in range(self.size)}
            swarm.sim.dht.clock_errors = skews
            swarm.note(f"clocks are wrong by {skews}")
        try:
            for number, mode in enumerate(self.modes):
                schema = SCHEMA
                if number == 2 and "other schema" in self.kinds:
                    schema = OTHER_SCHEMA
                    self.strange.add(number)
                await swarm.start(number, mode, schema=schema)
                self.alive.add(number)
            for kind in self.kinds:
                self._plan(FAULTS[kind])
            for number in sorted(self.alive):
                self._begin(number)
            await self._until_all_ended()
            swarm.check()
            await self._recover()
            swarm.check()
            await self._check_one_dht()
        finally:
            for task in [*self._striking, *self.steps.values()]:
                task.cancel()
            await asyncio.gather(*self._striking, *self.steps.values(), return_exceptions=True)
            await swarm.close()
        return "committed" if any(one.result.failure is None for one in swarm.attempts) else "nothing"

    def _begin(self, number: int) -> None:
        self.steps[number] = asyncio.ensure_future(self._take_steps(number))

    async def _take_steps(self, number: int) -> None:
        await asyncio.sleep(self.rng.uniform(0.0, 2.0))
        for _ in range(self.rounds):
            await self.swarm.step(number, timeout=STEP, change=lambda values: self._change(number, values))
            await asyncio.sleep(self.rng.uniform(0.0, 1.0))

    async def _until_all_ended(self) -> None:
        while pending := [task for task in (*self.steps.values(), *self._striking) if not task.done()]:
            await asyncio.wait(pending)
        for task in (*self.steps.values(), *self._striking):
            if not task.cancelled():
                task.result()

    async def _recover(self) -> None:
        """All that can average does, soon after the last fault is over."""
        swarm = self.swarm
        self.network.heal()
        self._plans.clear()
        self.unable.clear()
        self.wrong.clear()
        for number in range(self.size):
            self.network.set_link(self.name(number), None)
        await asyncio.sleep(TROUBLED)
        swarm.note("all faults are over")
        numbers = sorted(self.alive - self.strange)
        able = [number for number in numbers if self.modes[number] is not PeerMode.AUXILIARY]
        results = await asyncio.gather(*(swarm.step(number, timeout=RECOVERY) for number in numbers))
        ended = dict(zip(numbers, results, strict=True))
        lonely = {number: why for number in able if (why := _why_no_average(ended[number]))}
        if len(lonely) > self._left_over(numbers):
            raise Violation(f"of {able} some did not average: {lonely}")

    async def _check_one_dht(self) -> None:
        """All nodes that others can dial know each other."""
        nodes = {
            n: self.swarm.sim.dht.nodes[n] for n in sorted(self.alive) if self.modes[n] is not PeerMode.CLIENT
        }
        if self.twice or len(nodes) > DHTConfig().bucket_size:
            return
        known: dict[int, int] = {}
        for _ in range(int(ONE_DHT_WITHIN)):
            peers = {node.peer_id for node in nodes.values()}
            known = {n: len(peers.intersection(node.neighbours)) for n, node in nodes.items()}
            if all(count == len(nodes) - 1 for count in known.values()):
                return
            await asyncio.sleep(1.0)
        raise Violation(f"some nodes of the DHT do not know all {len(nodes) - 1} others: {known}")

    def _left_over(self, numbers: Sequence[int]) -> int:
        """How many of these may stay without an average, since groups have sizes and somebody has to lead them."""
        count = Counter(self.modes[number] for number in numbers)
        full, clients, helpers = (count[m] for m in (PeerMode.FULL, PeerMode.CLIENT, PeerMode.AUXILIARY))
        config = self.swarm.sim.config
        placed = sum(
            plan_with_helpers(full, clients, helpers, config.target_group_size, config.min_group_size)
        )
        weightless = sum(self.swarm.weights.get(number, 1.0) == 0 for number in numbers)
        return full + clients - max(0, placed - helpers) + weightless

    # ---- faults

    def _plan(self, fault: Callable[[Story], Awaitable[None]]) -> None:
        """At a moment of the first steps, or when some peer comes to a phase."""

        async def strike() -> None:
            if self.alive:
                await fault(self)

        if self.rng.random() < 0.5:
            self._strike(self._later(self.rng.uniform(0.0, 20.0), strike))
        else:
            key = (self.someone(), self.rng.choice(PHASES))
            self._plans.setdefault(key, []).append(strike)

    async def _later(self, seconds: float, strike: Callable[[], Awaitable[None]]) -> None:
        await asyncio.sleep(seconds)
        await strike()

    def _strike(self, work: Awaitable[None]) -> None:
        task = asyncio.ensure_future(work)
        self._striking.add(task)

    def _watch(self, number: int, phase: str) -> None:
        for strike in self._plans.pop((number, phase), []):
            self.swarm.note(f"{number} comes to {phase}")
            self._strike(strike())

    async def _snapshot(self, number: int) -> None:
        if number in self.unable:
            self.unable.discard(number)
            raise AllreduceException("no values")

    def _change(self, number: int, values: torch.Tensor) -> None:
        if number in self.wrong:
            self.wrong.discard(number)
            place, value = self.rng.randrange(len(values)), self.rng.choice((float("nan"), float("inf")))
            # A lossy codec clips infinity. Whole peers find it in their own snapshot, which is not simulated.
            values[place] = value if self.swarm.is_lossless else float("nan")

    async def stop(self, number: int) -> None:
        """The peer's step ends with its process."""
        self.alive.discard(number)
        task = self.steps.pop(number, None)
        if task is not None:
            task.cancel()
            await asyncio.wait([task])


def _why_no_average(ended: Attempt | str) -> str | None:
    return ended if isinstance(ended, str) else ended.result.failure


async def crash(story: Story) -> None:
    """A process is killed, or a machine loses power; the first one's too."""
    number, silently = story.someone(), story.rng.random() < 0.3
    story.swarm.note(f"kill {number}{' silently' if silently else ''}")
    story.network.kill(story.name(number), silently=silently)
    await asyncio.sleep(
        DEATH
    )  # its connections have ended before its code does, as in a process that is killed
    await story.stop(number)
    await story.swarm.kill(number, silently=silently)


async def leave(story: Story) -> None:
    number = story.someone()
    story.swarm.note(f"{number} leaves")
    await story.stop(number)
    await story.swarm.leave(number)


async def join(story: Story) -> None:
    """A peer that was not there before; the first one must be, to be found."""
    number = story.size
    if 0 not in story.alive:
        return
    story.size += 1
    story.modes.append(PeerMode.FULL)
    story.swarm.note(f"{number} joins")
    try:
        await story.swarm.start(number)
    except ShoalError as e:  # the first one is cut off, or dies meanwhile
        story.swarm.note(f"{number} cannot join: {e}")
        return
    story.alive.add(number)
    story._begin(number)


async def freeze(story: Story) -> None:
    number, seconds = story.someone(), story.a_while()
    story.swarm.note(f"freeze {number} for {seconds}")
    story.network.freeze(story.name(number), seconds)


async def slow(story: Story) -> None:
    number, speed = story.someone(), story.rng.choice((2000.0, 8000.0, 30_000.0))
    story.swarm.note(f"{number} has {speed:g} B/s")
    story.network.set_link(story.name(number), speed)


async def reset(story: Story) -> None:
    one, other = story.someone(), story.someone()
    story.swarm.note(f"reset {one}-{other}")
    story.network.drop_connections(story.name(one), story.name(other))


async def cut(story: Story) -> None:
    """TCP outlives it, if it is short."""
    one, other, seconds = story.someone(), story.someone(), story.a_while()
    story.swarm.note(f"cut {one}-{other} for {seconds}")
    if one != other:
        story.network.hold(story.name(one), story.name(other), seconds, one_way=story.rng.random() < 0.3)


async def half_open(story: Story) -> None:
    """What one sends another one vanishes."""
    one, other = story.someone(), story.someone()
    if one != other:
        story.swarm.note(f"nothing from {one} to {other} for {TROUBLED}")
        story.network.silence(story.name(one), story.name(other), one_way=True)
        await asyncio.sleep(TROUBLED)
        story.network.heal()


async def part(story: Story) -> None:
    side = [story.name(number) for number in sorted(story.alive) if story.rng.random() < 0.5]
    seconds = story.a_while()
    story.swarm.note(f"only each other reach {side} for {seconds}")
    story.network.partition(side)
    await asyncio.sleep(seconds)
    story.network.heal()


async def be_twice(story: Story) -> None:
    """A copy of a peer starts on another machine, with the same identity."""
    number, copy = story.someone(), 1000
    if 0 not in story.alive or copy in story.swarm.sim.dht.nodes:
        return
    story.swarm.note(f"{number} is there twice")
    story.twice.add(number)
    story.swarm.sim.dht.share_identity(number, copy)
    try:
        await story.swarm.sim.dht.start(copy, [story.swarm.sim.dht.address(0)])
    except IdentityInUse as e:
        story.swarm.note(f"the copy is refused: {e}")
    except ShoalError as e:
        story.swarm.note(f"the copy cannot join: {e}")
    else:
        story.strange.add(number)
        await asyncio.sleep(5.0)
        await story.swarm.sim.dht.stop(copy)


async def send_nonsense(story: Story) -> None:
    number = story.someone()
    story.swarm.note(f"{number} has values that are not finite")
    story.wrong.add(number)


async def lose_snapshot(story: Story) -> None:
    number = story.someone()
    story.swarm.note(f"{number} has no snapshot")
    story.unable.add(number)


async def from_the_start(story: Story) -> None:
    """It is so before anything happens."""


FAULTS: dict[str, Callable[[Story], Awaitable[None]]] = {
    "crash": crash,
    "leave": leave,
    "join": join,
    "freeze": freeze,
    "slow": slow,
    "reset": reset,
    "cut": cut,
    "half-open": half_open,
    "partition": part,
    "duplicate identity": be_twice,
    "wrong data": send_nonsense,
    "no snapshot": lose_snapshot,
    "clock skew": from_the_start,
    "other schema": from_the_start,
}


def commit() -> str:
    """Of the working tree, with which the seed replays."""
    here = Path(__file__).parent
    found = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], cwd=here, capture_output=True, text=True, check=False
    )
    return found.stdout.strip() or "unknown"


def sweep(seeds: Sequence[int], sizes: Sequence[int] = range(2, 17)) -> Counter[str]:
    """All these seeds; how often a story ended in which way."""
    return Counter(Story(seed, sizes).play() for seed in seeds)
