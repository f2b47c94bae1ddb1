"""Many more peers than one group holds, through real processes and sockets: they meet in every round."""

from __future__ import annotations

import asyncio
import time
from typing import Any

import pytest
import torch
from real_swarm import Swarm

import shoal
from shoal.averaging.matchmaking import leaders
from shoal.averaging.matchmaking.search import Search
from shoal.errors import AllreduceException, InvalidTypeError, InvalidValueError, MatchmakingException

pytestmark = [pytest.mark.xdist_group("averaging"), pytest.mark.timeout(300)]

PATIENCE = 60.0
"""Seconds for a step: only against hanging, on machines with fewer cores than peers."""


def make(swarm: Swarm, count: int, size: int, **options: object) -> list[shoal.DecentralizedAverager]:
    """Peers number 0, 1, ... that hold their numbers."""
    return [
        swarm.peer([torch.full((4,), float(number), dtype=torch.float64)], size, **options)
        for number in range(count)
    ]


def values(averagers: list[shoal.DecentralizedAverager]) -> list[float]:
    held = []
    for averager in averagers:
        with averager.get_tensors() as (tensor,):
            held.append(float(tensor[0]))
    return held


def step_all(averagers: list[shoal.DecentralizedAverager], **options: object) -> list[shoal.StepControl]:
    """One round of all; the steps, once all are over."""
    steps = [averager.step(wait=False, timeout=PATIENCE, **options) for averager in averagers]
    for step in steps:
        step.exception(2 * PATIENCE)
    return steps


@pytest.mark.sweep
def test_8_peers_in_pairs_with_2_bits_hold_the_exact_average_after_3_rounds(swarm: Swarm):
    averagers = make(swarm, 8, 2)
    for number, averager in enumerate(averagers):
        averager.set_group_bits(format(number // 2, "02b"))
    for _ in range(3):
        assert values(averagers) != [3.5] * 8
        bits = {averager.get_group_bits() for averager in averagers}
        assert bits == {"00", "01", "10", "11"}
        for step in step_all(averagers):
            assert len(step.result()) == 2
    assert values(averagers) == [3.5] * 8  # sums of eighths are exact


def test_bits_can_be_set_and_asked_for_with_and_without_waiting(swarm: Swarm):
    averager, other = make(swarm, 2, 2, initial_group_bits="10")
    assert averager.get_group_bits() == "10"
    assert averager.set_group_bits("011", wait=False).result(10) is None
    assert averager.get_group_bits(wait=False).result(10) == "011"
    averager.set_group_bits("")
    assert averager.get_group_bits() == ""
    step = averager.step(wait=False, timeout=PATIENCE)
    other.set_group_bits("")
    assert len(other.step(timeout=PATIENCE)) == len(step.result(PATIENCE)) == 2
    with pytest.raises(InvalidValueError, match=r"group_bits must be at most 64 .*, got '2'"):
        averager.set_group_bits("2")
    with pytest.raises(InvalidTypeError, match="group_bits must be a text, got 3"):
        averager.set_group_bits(3)


def test_the_report_of_a_search_that_failed_holds_its_story_as_data(swarm: Swarm):
    averager, other = make(swarm, 2, 3, initial_group_bits="1")
    steps = [one.step(wait=False, timeout=3.0) for one in (averager, other)]
    assert all(isinstance(step.exception(30), MatchmakingException) for step in steps)
    leaders = []
    for step in steps:
        story = step.report.to_dict()["search"]
        assert story["key"] == f"{swarm.prefix}.0b1"
        assert story["seconds"] == pytest.approx(3.0, abs=1.0)
        leaders += [peer for peer, answer in story["asked"]]
    assert leaders in ([str(averager.peer_id)], [str(other.peer_id)])


async def cancel_the_next_search_when_the_group_stands(dht: Any, node: Any) -> None:
    """As a step that is cancelled then does."""
    run, finish = Search.run, Search._finish
    tasks = {}

    async def run_and_remember(self: Search) -> Any:
        tasks[self] = asyncio.current_task()
        return await run(self)

    def finish_and_cancel(self: Search, effect: Any) -> None:
        Search.run, Search._finish = run, finish
        finish(self, effect)
        tasks[self].cancel()

    Search.run, Search._finish = run_and_remember, finish_and_cancel


async def cancel_the_next_search_when_it_is_told_of_the_group(dht: Any, node: Any) -> None:
    """As a step that is cancelled while that is on its way does."""
    run, receive = Search.run, leaders.receive_members
    tasks = []

    async def run_and_remember(self: Search) -> Any:
        tasks.append(asyncio.current_task())
        return await run(self)

    async def cancel(stream: Any, size: int, terms: bytes) -> Any:
        Search.run, leaders.receive_members = run, receive
        tasks[-1].cancel()
        await asyncio.sleep(1.0)
        raise AssertionError("it still listens")

    Search.run, leaders.receive_members = run_and_remember, cancel


@pytest.mark.parametrize(
    "cancel",
    [cancel_the_next_search_when_the_group_stands, cancel_the_next_search_when_it_is_told_of_the_group],
)
def test_who_is_cancelled_while_the_group_begins_does_not_hold_up_the_others(swarm: Swarm, cancel):
    averagers = make(swarm, 2, 2)
    averagers[1].dht.run_coroutine(cancel)
    now = shoal.get_dht_time()
    steps = [
        averager.step(wait=False, timeout=PATIENCE, scheduled_time=now + 5 + number, allow_retries=False)
        for number, averager in enumerate(averagers)
    ]
    began = time.monotonic()
    assert isinstance(steps[0].exception(PATIENCE), AllreduceException)
    assert time.monotonic() - began < 5.0  # a member that says nothing is waited for twice as long
    assert steps[1].exception(PATIENCE) is not None


def all_gather(swarm: Swarm, runs: int) -> None:
    averagers = make(swarm, 8, 4)
    for run in range(runs):
        steps = [
            averager.step(wait=False, timeout=PATIENCE, gather={"number": number, "run": run})
            for number, averager in enumerate(averagers)
        ]
        results = [step.result(2 * PATIENCE) for step in steps]
        number_of = {averager.peer_id: number for number, averager in enumerate(averagers)}
        for averager, result in zip(averagers, results, strict=True):
            assert averager.peer_id in result
            assert len(result) == 4
            assert result == {peer: {"number": number_of[peer], "run": run} for peer in result}
        for averager, result in zip(averagers, results, strict=True):
            assert all(results[number_of[peer]] == result for peer in result), averager.peer_id


@pytest.mark.sweep
def test_all_gather_of_8_peers_in_groups_of_4_works_every_time(swarm: Swarm):
    all_gather(swarm, 5)


@pytest.mark.soak
@pytest.mark.timeout(1200)
def test_all_gather_works_50_times(swarm: Swarm):
    all_gather(swarm, 50)


@pytest.mark.sweep
def test_16_peers_in_pairs_find_groups_within_5_seconds_in_every_round(swarm: Swarm):
    averagers = make(swarm, 16, 2)
    spread = float(torch.tensor(values(averagers)).std())
    for _ in range(5):
        reports = [step.report for step in step_all(averagers)]
        in_time = [one for one in reports if one is not None and one.succeeded and one.phases.search <= 5.0]
        assert len(in_time) >= 15, [str(one) for one in reports]
    assert float(torch.tensor(values(averagers)).std()) < 0.5 * spread  # the same pairs again: 0.7
