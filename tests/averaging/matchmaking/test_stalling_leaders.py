"""Leaders that accept followers and never begin: they cost a search a bounded time, and the next one none."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Awaitable, Callable, Sequence

import pytest
from tests.swept import rest_swept

from shoal.averaging.group import GroupInfo, PeerMode, group_key
from shoal.averaging.matchmaking.declarations import DECLARATION_LIFETIME, SEARCHES
from shoal.averaging.matchmaking.matchmaker import REGROUP
from shoal.averaging.matchmaking.memory import AVOIDED_FOR, Fault
from shoal.averaging.matchmaking.messages import (
    JOIN,
    Accepted,
    Declaration,
    DeclaredState,
    Dismissed,
    DismissReason,
    JoinRequest,
    Postponed,
)
from shoal.averaging.matchmaking.patience import Patience
from shoal.averaging.matchmaking.sizes import plan_groups
from shoal.averaging.matchmaking_config import MatchmakingConfig
from shoal.averaging.router import Router
from shoal.dht.declarations import Declarations
from shoal.errors import MatchmakingException
from shoal.p2p.identity import PeerID
from shoal.p2p.rpc import Stream
from shoal.sansio.core import NEVER
from shoal.testing.clock import run
from shoal.testing.matchmaking import SCHEMA, SimulatedMatchmaking
from shoal.testing.matchmaking_cores import StallingCore, SwarmOfCores, core_peer_id
from shoal.utils.tasks import TaskSet

KEY = group_key("swarm")
WAIT, REQUEST_TIMEOUT = 5.0, 3.0
HONEST = 4
FIRST_EVIL = 20


class StallingLeader:
    """A stranger that comes first in the order and holds whoever asks it."""

    def __init__(
        self, sim: SimulatedMatchmaking, number: int, hold: Callable[[Stream], Awaitable[None]]
    ) -> None:
        self.sim = sim
        self.number = number
        self.hold = hold
        self.requests = 0
        self.tasks = TaskSet()

    @property
    def peer_id(self) -> PeerID:
        return self.sim.dht.identity(self.number).peer_id

    async def start(self) -> None:
        node = await self.sim.dht.start(self.number, [self.sim.dht.address(0)])
        Router.of(node.host).register(JOIN, "swarm", self.attend)
        self.declarations = Declarations(
            node, SEARCHES, self.tasks, self.sim.now, lifetime=DECLARATION_LIFETIME
        )

    async def declare(self, start_time: float) -> None:
        declared: asyncio.Future[str | None] = asyncio.get_running_loop().create_future()
        address = str(self.sim.dht.address(self.number, with_peer_id=False))
        self.declarations.declare(
            KEY,
            Declaration(start_time, DeclaredState.LOOKING, SCHEMA, PeerMode.FULL, (address,)),
            lambda seconds, failure: declared.set_result(failure),
        )
        assert await declared is None

    async def attend(self, stream: Stream, request: JoinRequest) -> None:
        self.requests += 1
        await self.hold(stream)


async def postpone_for_ever(stream: Stream) -> None:
    await stream.send(Accepted(5.0))
    while True:
        await asyncio.sleep(2.0)
        await stream.send(Postponed(5.0))


async def say_nothing(stream: Stream) -> None:
    await stream.send(Accepted(5.0))
    await asyncio.sleep(3600.0)


async def let_go_in_the_end(stream: Stream) -> None:
    """Holds a follower for almost as long as one leader may, and leaves it to the next."""
    await stream.send(Accepted(5.0))
    for _ in range(3):
        await asyncio.sleep(2.0)
        await stream.send(Postponed(5.0))
    await asyncio.sleep(1.0)
    await stream.send(Dismissed(DismissReason.BETTER_CUT))


async def honest_groups(
    sim: SimulatedMatchmaking, *, timeout: float = 60.0
) -> tuple[list[GroupInfo | MatchmakingException], float]:
    """What the honest peers find in one search, and how long the last of them takes."""
    began = sim.now()
    searches = [sim.search(number, timeout=timeout) for number in range(HONEST)]
    return [await search for search in searches], sim.now() - began


def tell(
    hold: Callable[[Stream], Awaitable[None]],
    leaders: int,
    story: Callable[[SimulatedMatchmaking, Sequence[StallingLeader]], Awaitable[None]],
    *,
    target: int | None = HONEST,
    minimum: int = 2,
) -> None:
    async def main() -> None:
        config = MatchmakingConfig(target, minimum, WAIT, REQUEST_TIMEOUT)
        sim = SimulatedMatchmaking(0, config, latency=(0.005, 0.02))
        evil = [StallingLeader(sim, FIRST_EVIL + number, hold) for number in range(leaders)]
        try:
            await sim.start([PeerMode.FULL] * HONEST)
            for leader in evil:
                await leader.start()
                await leader.declare(sim.now() - 1000.0)
            await story(sim, evil)
        finally:
            for leader in evil:
                await leader.tasks.close()
            await sim.close()

    run(main)


def assert_found(groups: Sequence[GroupInfo | MatchmakingException], evil: Sequence[StallingLeader]) -> None:
    """Everybody has a group, of honest peers alone, of which all members know."""
    assert all(isinstance(group, GroupInfo) for group in groups), groups
    found = {group.group_id: group for group in groups if isinstance(group, GroupInfo)}
    members = [peer for group in found.values() for peer in group.peer_ids]
    assert len(members) == len(set(members)) == len(groups)
    assert not set(members) & {leader.peer_id for leader in evil}


@pytest.mark.parametrize("hold", rest_swept([postpone_for_ever, say_nothing]))
@pytest.mark.parametrize(("target", "minimum"), [(HONEST, 2), (None, 2), (HONEST, HONEST), (HONEST + 1, 2)])
def test_a_leader_that_never_begins_costs_one_wait(
    hold: Callable[[Stream], Awaitable[None]], target: int | None, minimum: int
):
    async def story(sim: SimulatedMatchmaking, evil: Sequence[StallingLeader]) -> None:
        groups, seconds = await honest_groups(sim)
        assert_found(groups, evil)
        assert evil[0].requests >= 1
        # Its own wait, one more for the leader, and what it takes the others to leave it, too.
        assert seconds < 2 * WAIT + REQUEST_TIMEOUT + REGROUP + 1.0

    tell(hold, 1, story, target=target, minimum=minimum)


def test_the_next_search_does_not_ask_it():
    async def story(sim: SimulatedMatchmaking, evil: Sequence[StallingLeader]) -> None:
        groups, _ = await honest_groups(sim)
        assert_found(groups, evil)
        asked = evil[0].requests
        await evil[0].declare(sim.now() - 1000.0)
        groups, seconds = await honest_groups(sim)
        assert_found(groups, evil)
        assert seconds < 2.0
        assert evil[0].requests == asked

    tell(postpone_for_ever, 1, story, minimum=HONEST)


def test_a_newcomer_that_has_seen_nothing_is_not_sent_to_it():
    """Most of the others name it, and so it is planned with nobody."""

    async def story(sim: SimulatedMatchmaking, evil: Sequence[StallingLeader]) -> None:
        groups, _ = await honest_groups(sim)
        assert_found(groups, evil)
        asked = evil[0].requests
        await sim.start_one(HONEST)
        await evil[0].declare(sim.now() - 1000.0)
        searches = [sim.search(number) for number in range(1, HONEST)]
        await asyncio.sleep(0.5)
        searches.append(sim.search(HONEST))
        groups = [await search for search in searches]
        assert_found(groups, evil)
        assert evil[0].requests == asked

    tell(postpone_for_ever, 1, story, target=HONEST + 1)


def test_it_is_asked_again_when_that_is_forgotten():
    async def story(sim: SimulatedMatchmaking, evil: Sequence[StallingLeader]) -> None:
        await honest_groups(sim)
        asked = evil[0].requests
        await asyncio.sleep(AVOIDED_FOR[Fault.STALLED])
        await evil[0].declare(sim.now() - 1000.0)
        groups, _ = await honest_groups(sim)
        assert_found(groups, evil)
        assert evil[0].requests > asked

    tell(postpone_for_ever, 1, story, minimum=HONEST)


@pytest.mark.parametrize("hold", rest_swept([let_go_in_the_end, postpone_for_ever]))
def test_many_such_leaders_cost_one_wait_and_a_little_more_each(hold: Callable[[Stream], Awaitable[None]]):
    async def story(sim: SimulatedMatchmaking, evil: Sequence[StallingLeader]) -> None:
        groups, seconds = await honest_groups(sim)
        assert_found(groups, evil)
        assert seconds < 45.0

    tell(hold, 6, story)


def test_a_leader_that_is_short_of_members_is_followed_for_as_long_as_it_takes():
    """It has good reason to put its group off: without it, its followers would be in no group either."""

    async def story(sim: SimulatedMatchmaking, evil: Sequence[StallingLeader]) -> None:
        began = sim.now()
        searches = [sim.search(number, timeout=None) for number in range(2)]
        await asyncio.sleep(10 * WAIT)
        searches += [sim.search(number, timeout=None) for number in (2, 3)]
        groups = [await search for search in searches]
        assert_found(groups, evil)
        assert sim.now() - began < 11 * WAIT

    tell(postpone_for_ever, 0, story, minimum=3)


# ---- any number of peers, sizes and liars


def make_swarm(seed: int) -> tuple[SwarmOfCores, list[StallingCore]]:
    """Honest peers that start within some seconds, and one to three liars among them or before all of them."""
    rng = random.Random(f"stalling {seed}")
    target = rng.choice([None, 2, 3, 4, 6, 8])
    config = MatchmakingConfig(
        target_group_size=target,
        min_group_size=rng.randint(2, min(target or 4, 4)),
        min_matchmaking_time=rng.uniform(3.0, 6.0),
        request_timeout=rng.uniform(1.0, 4.0),
    )
    swarm = SwarmOfCores(seed, config)
    honest, window = rng.randint(2, 10), rng.choice([0.0, 2.0])
    for number in range(honest):
        mode = PeerMode.CLIENT if number and rng.random() < 0.1 else PeerMode.FULL
        swarm.search(core_peer_id(number), rng.uniform(0.5, 0.5 + window), mode, waits=20)
    before_all = rng.random() < 0.7
    liars = [
        swarm.stall(core_peer_id(100 + number), 0.0 if before_all else rng.uniform(0.5, 0.5 + window))
        for number in range(rng.randint(1, 3))
    ]
    return swarm, liars


def check_swarm(seed: int) -> bool:
    """Nobody is left over that could be in a group; whether a liar held somebody."""
    swarm, liars = make_swarm(seed)
    swarm.run_until(3600.0)
    left = swarm.left_over()
    sizes = plan_groups(
        len(left),
        swarm.config.target_group_size,
        swarm.config.min_group_size,
        sum(peer.mode.can_lead for peer in left),
    )
    assert sizes == (), (
        f"seed {seed}: {swarm.config}: {len(left)} left over could have made groups of {sizes}"
    )
    return any(liar.asked for liar in liars)


def check_swarms(seeds: range) -> int:
    """In how many of these swarms a liar held somebody."""
    return sum(check_swarm(seed) for seed in seeds)


@pytest.mark.parametrize("first", rest_swept(range(0, 400, 50)))
def test_no_seed_strands_honest_peers_among_stalling_leaders(first: int):
    assert check_swarms(range(first, first + 50)) > 25


def test_without_patience_these_seeds_strand_somebody(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(Patience, "ends_at", lambda self, latency: NEVER)
    with pytest.raises(AssertionError, match="could have made groups"):
        check_swarms(range(10))


@pytest.mark.soak
@pytest.mark.parametrize("first", range(400, 5400, 500))
def test_no_more_seeds_strand_honest_peers_among_stalling_leaders(first: int):
    check_swarms(range(first, first + 500))
