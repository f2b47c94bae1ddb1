"""Nodes whose clocks are wrong come to one time, and nobody's wrong clock moves a DHT that runs."""

from __future__ import annotations

import asyncio
import logging
import statistics
from collections.abc import Awaitable, Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shoal.dht.config import DHTConfig
from shoal.dht.swarm_time import TOLERANCE, ClockSample, choose_change
from shoal.dht.timekeeping import PERIOD, TIME, TimeRequest, TimeResponse
from shoal.p2p.identity import PeerID
from shoal.testing.clock import run
from shoal.testing.dht import SimulatedDHT
from shoal.utils.timed import DHTClock

PEER = PeerID.from_public_key(bytes(32))
AGREED = 0.2
"""Seconds between clocks that agree: the tolerance, and what delays that differ make of it."""
Story = Callable[[SimulatedDHT], Awaitable[None]]


def simulate(story: Story, errors: dict[int, float], seed: int = 1) -> None:
    async def told() -> None:
        sim = SimulatedDHT(seed)
        sim.clock_errors.update(errors)
        try:
            await story(sim)
        finally:
            await sim.close()

    run(told)


def sample(ahead: float, *, is_settled: bool = True, error: float = 0.0) -> ClockSample:
    return ClockSample(PEER, ahead, error, is_settled)


def off(sim: SimulatedDHT, number: int) -> float:
    """By how much a node's time differs from that of right clocks."""
    return sim.clock(number)() - sim.now()


# ---- the choice


def test_a_newcomer_takes_the_time_of_those_that_are_there() -> None:
    assert choose_change([sample(90.0)], is_settled=False).seconds == 90.0
    change = choose_change([sample(-40.0), sample(-40.2), sample(7.0)], is_settled=False)
    assert change.seconds == -40.0
    assert not change.counted_own


def test_a_newcomer_does_not_listen_to_other_newcomers() -> None:
    samples = [sample(5.0), *[sample(90.0, is_settled=False)] * 3]
    assert choose_change(samples, is_settled=False).seconds == 5.0
    assert choose_change(samples[1:], is_settled=True).seconds == 0.0


def test_two_that_begin_at_once_meet_in_the_middle() -> None:
    assert choose_change([sample(90.0, is_settled=False)], is_settled=False).seconds == 45.0
    assert choose_change([sample(-90.0)], is_settled=True).seconds == -45.0


def test_small_differences_move_nobody() -> None:
    assert choose_change([sample(TOLERANCE)], is_settled=False).seconds == 0.0
    assert choose_change([sample(0.5, error=0.5)], is_settled=False).seconds == 0.0
    assert choose_change([], is_settled=True).seconds == 0.0


@given(
    st.lists(st.floats(-1e-2, 1e-2), min_size=1, max_size=7),
    st.lists(st.floats(-1e12, 1e12), max_size=7),
)
def test_a_minority_cannot_move_a_settled_node(honest: list[float], liars: list[float]) -> None:
    liars = liars[: len(honest)]  # the own clock is one more
    samples = [sample(ahead) for ahead in honest + liars]
    assert choose_change(samples, is_settled=True).seconds == 0.0


@given(st.lists(st.floats(-1e3, 1e3), min_size=2, max_size=9))
def test_peers_that_see_each_other_agree_at_once(clocks: list[float]) -> None:
    moved = []
    for mine in clocks:
        others = [*clocks]
        others.remove(mine)
        moved.append(
            mine + choose_change([sample(other - mine) for other in others], is_settled=True).seconds
        )
    middle = statistics.median(clocks)
    assert all(abs(one - middle) <= TOLERANCE + 1e-9 for one in moved)


# ---- clocks


def test_only_a_move_makes_dht_time_jump() -> None:
    now = 10.0
    clock = DHTClock(1000.0, lambda: now)
    frozen = clock.frozen()
    now += 5
    clock.move(90.0)
    assert clock() == 1105.0
    assert frozen() == 1015.0
    assert clock.from_steady(clock.to_steady(1234.5)) == 1234.5


# ---- nodes


@pytest.mark.parametrize("error", [40.0, -40.0, 90.0, -90.0, -1.7e9])
def test_a_node_with_a_wrong_clock_joins_the_time_of_the_dht(
    error: float, caplog: pytest.LogCaptureFixture
) -> None:
    async def story(sim: SimulatedDHT) -> None:
        first = await sim.start(0)
        late = await sim.start(1, [sim.address(0)])
        assert abs(off(sim, 0)) == 0
        assert abs(off(sim, 1)) < AGREED
        assert await late.store("key", "value", sim.clock(1)() + 10)
        await asyncio.sleep(5)
        found = await first.get("key", latest=True)
        assert found is not None
        assert found.value == "value"
        await asyncio.sleep(6)
        assert await first.get("key", latest=True) is None
        assert await late.get("key", latest=True) is None
        await asyncio.sleep(3 * PERIOD)
        assert off(sim, 0) == 0

    simulate(story, {1: error})
    warnings = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert len(warnings) == 1
    assert "the clock of this machine is" in warnings[0]
    assert f"{abs(error):.0f}." in warnings[0]
    assert ("ahead of" if error > 0 else "behind") in warnings[0]


def test_clocks_that_agree_are_left_alone() -> None:
    async def story(sim: SimulatedDHT) -> None:
        await sim.start_many(5)
        await asyncio.sleep(3 * PERIOD)
        assert [sim.clock(number).moves for number in range(5)] == [0] * 5

    simulate(story, {})


def test_two_first_peers_meet_in_the_middle() -> None:
    async def story(sim: SimulatedDHT) -> None:
        both = [sim.address(0), sim.address(1)]
        await asyncio.gather(sim.start(0, both), sim.start(1, both))
        await asyncio.sleep(30)
        assert abs(off(sim, 0) - off(sim, 1)) < AGREED
        assert 0 <= off(sim, 0) <= 90 + AGREED

    simulate(story, {1: 90.0})


def test_a_node_that_finds_the_dht_late_takes_its_time_then() -> None:
    async def story(sim: SimulatedDHT) -> None:
        config = DHTConfig(bootstrap_timeout=1.0, ensure_bootstrap_success=False)
        await sim.start(1, [sim.address(0)], config)
        assert off(sim, 1) == 90.0
        await sim.start(0)
        await asyncio.sleep(10)
        assert off(sim, 0) == 0.0
        assert abs(off(sim, 1)) < AGREED

    simulate(story, {1: 90.0})


def test_two_dhts_that_become_one_agree_on_the_time_of_most() -> None:
    async def story(sim: SimulatedDHT) -> None:
        # Each of them is the first of a DHT, until the network lets them meet.
        both = [sim.address(0), sim.address(1)]
        sim.network.partition(["node0", "node2"], ["node1"])
        config = DHTConfig(bootstrap_timeout=1.0)
        await asyncio.gather(*(sim.start(number, both, config) for number in (0, 1)))
        await sim.start(2, [sim.address(0)])
        assert off(sim, 1) == 90.0
        sim.network.heal()
        await asyncio.sleep(2 * PERIOD)
        assert max(abs(off(sim, number)) for number in range(3)) < AGREED

    simulate(story, {1: 90.0})


def test_a_minority_that_lies_moves_nobody_and_is_named(caplog: pytest.LogCaptureFixture) -> None:
    async def story(sim: SimulatedDHT) -> None:
        nodes = await sim.start_many(5)

        async def lie(peer: PeerID, request: TimeRequest) -> TimeResponse:
            return TimeResponse(sim.now() + 1000.0, True)

        for liar in nodes[3:]:
            liar.host.stop_serving(TIME)
            liar.host.serve(TIME, lie)
        await asyncio.sleep(5 * PERIOD)
        assert [sim.clock(number).moves for number in range(3)] == [0] * 3
        for liar in nodes[3:]:
            assert f"the clock of {liar.peer_id} is 1000.0 s ahead of the other peers'" in caplog.text

    simulate(story, {})


def test_a_time_that_is_no_number_counts_for_nothing() -> None:
    async def story(sim: SimulatedDHT) -> None:
        first = await sim.start(0)

        async def lie(peer: PeerID, request: TimeRequest) -> TimeResponse:
            return TimeResponse(float("nan"), True)

        first.host.stop_serving(TIME)
        first.host.serve(TIME, lie)
        await sim.start(1, [sim.address(0)])
        assert off(sim, 1) == 7.0

    simulate(story, {1: 7.0})
