"""Whole peers (host, DHT node, matchmaker) on a simulated network always end in as few left over as sizes allow.

Three kinds of stories, each decided by its seed:

- all start in one instant: no more peers are left over than by the best plan for that many;
- they start one after another: a full group does not wait for peers that will come later, so all that can be asked
  for is that those left over could not have made a group by themselves;
- some are killed and connections break: the same, once the declarations of the dead have expired.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Iterator
from dataclasses import replace

import pytest
from tests.swept import rest_swept

from shoal.averaging.group import GroupInfo, PeerMode
from shoal.averaging.matchmaking.declarations import DECLARATION_LIFETIME
from shoal.averaging.matchmaking.sizes import plan_groups
from shoal.averaging.matchmaking_config import MatchmakingConfig
from shoal.errors import MatchmakingException
from shoal.testing.clock import run
from shoal.testing.matchmaking import SimulatedMatchmaking

KINDS = ("one instant", "one after another", "with faults")


class Story:
    """One run, all of whose choices come from the seed."""

    def __init__(self, seed: int) -> None:
        rng = self.rng = random.Random(f"matchmaking {seed}")
        self.kind = KINDS[seed % 3]
        target = rng.choice([None, 2, 3, 4, 5, 6, 7, 8])
        self.config = MatchmakingConfig(
            target_group_size=target,
            min_group_size=rng.randint(2, target or 4),
            min_matchmaking_time=rng.uniform(2.5, 5.0),
            request_timeout=rng.uniform(1.0, 6.0),
        )
        count = rng.randint(2, 12)
        clients = rng.randint(0, count - 1) if rng.random() < 0.3 else 0
        self.modes = [PeerMode.FULL] * (count - clients) + [PeerMode.CLIENT] * clients
        rng.shuffle(self.modes)
        window = 0.0 if self.kind == "one instant" else rng.uniform(0.05, 0.8)
        self.window = window * self.config.min_matchmaking_time
        self.sim = SimulatedMatchmaking(seed, self.config)
        self.killed: list[int] = []
        self.faults = 0
        self.results: dict[int, GroupInfo | MatchmakingException] = {}

    def __str__(self) -> str:
        modes = "".join(mode[0] for mode in self.modes)
        return f"{self.kind}, peers {modes}, {self.config}, killed {self.killed}, {self.faults} faults"

    async def tell(self) -> None:
        try:
            await self.sim.start(self.modes)
            async with asyncio.TaskGroup() as tasks:
                for number in range(len(self.modes)):
                    tasks.create_task(self.search(number, self.rng.uniform(0, self.window)))
                if self.kind == "with faults":
                    tasks.create_task(self.disturb())
        finally:
            await self.sim.close()

    async def search(self, number: int, delay: float) -> None:
        await asyncio.sleep(delay)
        if number in self.killed:
            return
        # Only what faults have left behind takes this long to be over.
        patience = DECLARATION_LIFETIME if self.kind == "with faults" else 0.0
        task = self.sim.search(number, timeout=patience + 5 * self.config.min_matchmaking_time)
        await asyncio.wait([task])
        if not task.cancelled():
            self.results[number] = task.result()

    async def disturb(self) -> None:
        count = len(self.modes)
        for _ in range(self.rng.randint(1, 3)):
            await asyncio.sleep(self.rng.uniform(0.05, 2.0))
            if self.rng.random() < 0.4:
                number = self.rng.randrange(1, count)  # peer 0 is the one by whom others join the DHT
                if number not in self.killed:
                    self.killed.append(number)
                    await self.sim.kill(number, silently=self.rng.random() < 0.3)
            else:
                first, second = self.rng.sample(range(count), 2)
                self.faults += self.sim.network.drop_connections(f"node{first}", f"node{second}")

    # ---- what must hold

    def check(self) -> None:
        self.check_groups()
        left_over = [
            mode
            for number, mode in enumerate(self.modes)
            if number not in self.killed and isinstance(self.results[number], MatchmakingException)
        ]
        if self.kind == "one instant":
            assert len(left_over) == len(self.modes) - sum(self.plan(self.modes)), (
                "more are left over than need be"
            )
        else:
            assert self.plan(left_over) == (), f"{len(left_over)} left over could have made groups"

    def plan(self, modes: list[PeerMode]) -> tuple[int, ...]:
        leaders = sum(mode.can_lead for mode in modes)
        return plan_groups(len(modes), self.config.target_group_size, self.config.min_group_size, leaders)

    def check_groups(self) -> None:
        agreed: dict[bytes, GroupInfo] = {}
        groups = {number: result for number, result in self.results.items() if isinstance(result, GroupInfo)}
        for number, group in groups.items():
            assert agreed.setdefault(group.group_id, group) == group, "members disagree"
            assert (
                self.config.min_group_size <= len(group) <= (self.config.target_group_size or len(self.modes))
            )
            assert self.sim.dht.identity(number).peer_id in group.peer_ids
            assert group.members[0].mode is PeerMode.FULL
        if self.kind != "with faults":  # else a member may not have heard that its group has begun
            members = [peer_id for group in agreed.values() for peer_id in group.peer_ids]
            assert len(members) == len(set(members)) == len(groups), "somebody is in two groups"


def check(seeds: range, caplog: pytest.LogCaptureFixture) -> None:
    for seed in seeds:
        story = Story(seed)
        try:
            run(story.tell)
            story.check()
        except BaseException as error:
            error.add_note(f"seed {seed}: {story}")
            raise
        errors = [record.getMessage() for record in caplog.records if record.levelname == "ERROR"]
        assert errors == [], f"seed {seed}: {story}"


@pytest.mark.sweep
@pytest.mark.parametrize("first", range(0, 50, 10))
def test_as_few_as_possible_are_left_over(first: int, caplog: pytest.LogCaptureFixture) -> None:
    check(range(first, first + 10), caplog)


@pytest.mark.sweep
@pytest.mark.parametrize("first", [3000, 3004, 3008])
def test_a_request_timeout_above_min_matchmaking_time_keeps_nobody_from_a_group(first: int) -> None:
    for seed in range(first, first + 4):
        story = Story(seed)
        timeout = story.rng.uniform(1.0, 3.0) * story.config.min_matchmaking_time
        story.config = story.sim.config = replace(story.config, request_timeout=timeout)
        run(story.tell)
        story.check()


@pytest.mark.soak
@pytest.mark.parametrize("first", range(50, 2050, 50))
def test_as_few_as_possible_are_left_over_in_many_more_runs(
    first: int, caplog: pytest.LogCaptureFixture
) -> None:
    check(range(first, first + 50), caplog)


def results(seed: int) -> Iterator[str]:
    story = Story(seed)
    run(story.tell)
    for number, result in sorted(story.results.items()):
        yield f"{number} {result}"


@pytest.mark.sweep
def test_the_same_seed_gives_the_same_story() -> None:
    for seed in (3, 4, 5):
        assert list(results(seed)) == list(results(seed))


def search_after_a_death(seed: int, late: float) -> list[GroupInfo | MatchmakingException]:
    """Four peers have a group, one is killed, and the last one looks for a group ``late`` seconds after the others."""
    sim = SimulatedMatchmaking(seed, MatchmakingConfig(4, min_matchmaking_time=3.0))

    async def story() -> list[GroupInfo | MatchmakingException]:
        try:
            await sim.start([PeerMode.FULL] * 4)
            groups = await asyncio.gather(*(sim.search(number) for number in range(4)))
            assert all(group == groups[0] for group in groups)
            for number in range(4):  # the round connects everybody with everybody
                for other in range(number):
                    node = sim.dht.nodes[number]
                    await node.host.connect(sim.dht.identity(other).peer_id, timeout=10)
            await sim.kill(3)
            searches = [sim.search(number, timeout=20.0) for number in range(2)]
            await asyncio.sleep(late)
            return list(await asyncio.gather(*searches, sim.search(2, timeout=20.0)))
        finally:
            await sim.close()

    return run(story)


@pytest.mark.parametrize("late", [2.5, 2.99, 3.01, 4.0])
@pytest.mark.parametrize("seed", range(3))
def test_no_survivor_of_a_death_is_left_alone(seed: int, late: float) -> None:
    """One that has to ask for a round's decision learns of the failure seconds later than the others."""
    groups = search_after_a_death(seed, late)
    assert isinstance(groups[0], GroupInfo)
    assert len(groups[0]) == 3
    assert groups[0] == groups[1] == groups[2]


@pytest.mark.parametrize("count", rest_swept([4, 8, 16], kept=2))
@pytest.mark.parametrize("seed", rest_swept(range(2)))
def test_a_pair_that_cannot_reach_each_other_averages_at_the_second_attempt(seed: int, count: int) -> None:
    """One silent route between two peers: the others, and both of them, have groups without the other one."""
    sim = SimulatedMatchmaking(seed, MatchmakingConfig(4, min_matchmaking_time=3.0))
    pair = random.Random(f"pair {seed} {count}").sample(range(count), 2)

    async def story() -> list[GroupInfo | MatchmakingException]:
        try:
            await sim.start([PeerMode.FULL] * count)
            other = sim.dht.identity(pair[1]).peer_id
            sim.network.silence(*(f"node{number}" for number in pair))
            await asyncio.gather(*(sim.search(number, timeout=30.0) for number in range(count)))
            sim.matchmakers[pair[0]].keep_apart([other])  # what its round would have found out
            return list(await asyncio.gather(*(sim.search(number, timeout=30.0) for number in range(count))))
        finally:
            await sim.close()

    one, other = (sim.dht.identity(number).peer_id for number in pair)
    groups = run(story)
    assert all(isinstance(group, GroupInfo) for group in groups), groups
    for group in groups:
        assert isinstance(group, GroupInfo)
        assert not {one, other} <= set(group.peer_ids)
