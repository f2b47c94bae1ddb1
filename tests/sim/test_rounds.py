"""Rounds on the simulated network in which members stall, leave, die, send nonsense or only help; and sweeps over
seeds: whoever lives and is not excluded ends alike.
"""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from collections.abc import Awaitable, Callable

import pytest
import torch

from shoal.averaging.allreduce import streams
from shoal.averaging.allreduce.assignment import SpanId
from shoal.averaging.allreduce.messages import EXCHANGE, Contribute, DeclareWeight
from shoal.averaging.allreduce.round import Round, RoundResult, RoundTimeouts
from shoal.averaging.group import PeerMode
from shoal.averaging.timeouts import settle
from shoal.compression import BFloat16Compression
from shoal.errors import AllreduceException, RemoteError
from shoal.p2p.rpc import Stream
from shoal.testing.arena import tensor_in, vector_in
from shoal.testing.clock import run
from shoal.testing.rounds import PREFIX, SimulatedGroup

TIMEOUTS = RoundTimeouts(None, sender=2.0, reducer=4.0)


async def forever() -> None:
    """A user who never gives the trigger."""
    await asyncio.Event().wait()


def later(seconds: float) -> Callable[[], Awaitable[None]]:
    return lambda: asyncio.sleep(seconds)


async def all_of(group: SimulatedGroup, **options: object) -> list[RoundResult]:
    runs = (group.run(member, **options) for member in range(group.size))  # type: ignore[arg-type]
    async with asyncio.timeout(120):
        return await asyncio.gather(*runs)


def check_exclusion(group: SimulatedGroup, results: list[RoundResult], victim: int, *, reason: str) -> None:
    """The round committed for all others, which name the same victim; it knows why."""
    for member, result in enumerate(results):
        if member == victim:
            assert reason in (result.failure or ""), result
        else:
            assert result.failure is None, (member, result)
            (exclusion,) = result.exclusions
            assert exclusion.member == group.peer(victim)
            assert reason in exclusion.reason
            assert result.weights[victim] == 0


# exclusion


def test_a_sender_that_stalls_is_excluded_and_learns_it():
    async def main() -> None:
        async with SimulatedGroup(seed=1, size=3, clients=1) as group:
            tasks = [asyncio.ensure_future(group.run(member, timeouts=TIMEOUTS)) for member in range(3)]
            await asyncio.sleep(0.25)
            group.network.silence(group.name(1), group.name(2))  # noticed by the transport only after 3 s
            results = await asyncio.gather(*tasks)
            check_exclusion(group, results, 2, reason="within sender_timeout=2 s")
            (exclusion,) = results[0].exclusions
            assert exclusion.phase == "exchange"
            assert 2.0 <= exclusion.seconds < 3.0
            assert group.peer(1) in exclusion.reason  # who noticed

    run(main)


def test_a_sender_that_never_begins_is_excluded():
    async def main() -> None:
        async with SimulatedGroup(seed=1, size=3, clients=1) as group:
            late = asyncio.ensure_future(group.run(2, snapshot=forever, timeouts=TIMEOUTS))
            results = await asyncio.gather(*(group.run(member, timeouts=TIMEOUTS) for member in (0, 1)), late)
            check_exclusion(group, list(results), 2, reason="it sent no part within sender_timeout=2 s")
            group.check_average([0, 1], [1.0, 1.0, 0.0])

    run(main)


@pytest.mark.parametrize("given", [{}, {"allreduce_timeout": 300.0}], ids=["none", "allreduce_timeout"])
@pytest.mark.parametrize("victim", [0, 1, 3], ids=["leader", "owner", "client"])
def test_without_a_sender_timeout_one_that_never_begins_costs_the_group_that_member(
    victim: int, given: dict[str, float]
):
    times = settle(given)
    timeouts = RoundTimeouts.of(
        given.get("allreduce_timeout"), times.sender_timeout, times.reducer_timeout, times.each_part
    )

    async def main() -> None:
        async with SimulatedGroup(seed=2, size=4, clients=1) as group:
            loop = asyncio.get_running_loop()
            began = loop.time()
            snapshots = [forever if member == victim else later(0.0) for member in range(4)]
            runs = [
                group.run(member, snapshot=snapshot, timeouts=timeouts)
                for member, snapshot in enumerate(snapshots)
            ]
            results = await asyncio.gather(*runs)
            reason = f"it sent no part within sender_timeout={times.sender_timeout:g} s"
            check_exclusion(group, results, victim, reason=reason)
            assert loop.time() - began < times.sender_timeout + 5
            weights = [float(member != victim) for member in range(4)]
            group.check_average([member for member in range(4) if member != victim], weights)

    run(main)


def test_a_sender_whose_parts_all_come_in_time_may_take_too_long_in_all():
    """What it has delivered by then counts."""
    timeouts = RoundTimeouts(None, sender=2.0, reducer=4.0, each_part=0.1)

    async def main() -> None:
        async with SimulatedGroup(seed=3, size=3, clients=1, shapes=[(12_000,)]) as group:
            for owner in (0, 1):
                group.network.set_bandwidth(group.name(2), group.name(owner), 2000.0)  # a part in 0.5 s
            results = await all_of(group, timeouts=timeouts)
            parts = len(group.partition().parts_of(0))
            check_exclusion(
                group, results, 2, reason=f"its parts took more than {2 + 0.1 * parts:g} s in all"
            )
            assert results[0].partial
            assert results[0].allreduce_seconds < 2.0 + 0.1 * parts + 1.0

    run(main)


def test_a_member_that_takes_no_averages_costs_the_group_that_member(monkeypatch: pytest.MonkeyPatch):
    """The leader gives it up before the members that are ready give up the leader."""
    times = settle({})
    timeouts = RoundTimeouts.of(None, times.sender_timeout, times.reducer_timeout, times.each_part)

    async def main() -> None:
        async with SimulatedGroup(seed=3, size=4, clients=1) as group:
            rounds = [group.round(member, timeouts=timeouts) for member in range(3)]
            rounds.append(group.round(3))  # it has no limits itself
            monkeypatch.setattr(rounds[3]._exchange, "_receive_averages", lambda *_: forever())
            results = await asyncio.gather(*(group.run_round(*item) for item in enumerate(rounds)))
            check_exclusion(group, results, 3, reason="it said nothing for 361 s")

    run(main)


@pytest.mark.parametrize("given", [{}, {"sender_timeout": 5.0}], ids=["no timeouts", "short timeouts"])
def test_a_leader_that_lives_and_never_decides_is_replaced_in_time(
    given: dict[str, float], monkeypatch: pytest.MonkeyPatch
):
    times = settle(given)
    timeouts = RoundTimeouts.of(None, times.sender_timeout, times.reducer_timeout, times.each_part)

    async def main() -> None:
        async with SimulatedGroup(seed=2, size=4) as group:
            loop = asyncio.get_running_loop()
            rounds = [group.round(member, timeouts=timeouts) for member in range(4)]
            monkeypatch.setattr(rounds[0].core.decision.coordinator, "_propose", lambda outcome: [])
            tasks = [asyncio.ensure_future(group.run_round(*item)) for item in enumerate(rounds)]
            began = loop.time()
            results = await asyncio.gather(*tasks[1:])
            assert [result.failure for result in results] == [None] * 3
            assert loop.time() - began <= timeouts.leader + 30.0
            group.check_average([1, 2, 3])
            await asyncio.wait_for(tasks[0], 30)

    run(main)


def test_a_sender_is_awaited_from_the_owners_own_snapshot_on():
    async def main() -> None:
        async with SimulatedGroup(seed=1, size=3) as group:
            results = await all_of(group, snapshot=later(30.0), timeouts=TIMEOUTS)
            assert [result.failure for result in results] == [None] * 3
            assert all(not result.exclusions for result in results)

    run(main)


@pytest.mark.parametrize("victim", [0, 2])
def test_an_excluded_owner_serves_its_span_to_the_others(victim: int):
    """Also if it leads."""

    async def main() -> None:
        async with SimulatedGroup(seed=2, size=3) as group:
            snapshots = [forever if member == victim else later(0.0) for member in range(3)]
            runs = [
                group.run(member, snapshot=snapshot, timeouts=TIMEOUTS)
                for member, snapshot in enumerate(snapshots)
            ]
            results = await asyncio.gather(*runs)
            check_exclusion(group, results, victim, reason="it sent no part within sender_timeout=2 s")
            weights = [float(member != victim) for member in range(3)]
            group.check_average([member for member in range(3) if member != victim], weights)

    run(main)


def test_a_sender_that_is_held_is_not_excluded_with_the_one_for_which_it_waits(
    monkeypatch: pytest.MonkeyPatch,
):
    monkeypatch.setattr(streams, "HELD_BYTES", 2048)  # two parts

    async def main() -> None:
        async with SimulatedGroup(seed=3, size=3, clients=2, shapes=[(8000,)]) as group:
            running = asyncio.ensure_future(all_of(group, snapshot=later(2.0), timeouts=TIMEOUTS))
            await asyncio.sleep(1.0)  # the streams are open
            group.network.set_bandwidth(group.name(0), group.name(1), 4000.0)  # a part in 0.26 s
            await asyncio.sleep(4.0)
            group.network.silence(group.name(0), group.name(1))
            results = await running
            assert [result.failure is None for result in results] == [True, False, True]
            assert [one.member for one in results[0].exclusions] == [group.peer(1)]
            assert results[0].allreduce_seconds > 3.0  # member 2, which is fast, was held most of the time

    run(main)


@pytest.mark.parametrize(
    ("shape", "reason"),
    [
        (3000, "everything was averaged, but it said nothing for 5 s"),
        (400_000, "it sent no further part, or took no average, within sender_timeout=2 s"),
    ],
    ids=["all of them fit into its buffers", "the owners hold it back"],
)
def test_a_member_that_takes_no_averages_is_excluded(
    shape: int, reason: str, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(streams, "HELD_BYTES", 2048)
    monkeypatch.setattr(streams, "WINDOW_BYTES", 2048)
    monkeypatch.setattr(streams, "MAX_WINDOW_BYTES", 2048)

    async def main() -> None:
        async with SimulatedGroup(seed=3, size=4, clients=1, shapes=[(shape,)]) as group:
            rounds = [group.round(member, timeouts=TIMEOUTS) for member in range(3)]
            rounds.append(group.round(3))  # it has no limits itself
            monkeypatch.setattr(rounds[3]._exchange, "_receive_averages", lambda *_: forever())
            runs = (group.run_round(member, current) for member, current in enumerate(rounds))
            async with asyncio.timeout(60):
                results = await asyncio.gather(*runs)
            check_exclusion(group, results, 3, reason=reason)

    run(main)


def test_a_member_with_a_slow_link_that_does_take_averages_is_waited_for():
    """It contributes nothing but its link: the others have averaged everything long before."""

    async def main() -> None:
        weights = [1.0, 1.0, 0.0]
        async with SimulatedGroup(seed=3, size=3, clients=1, weights=weights, shapes=[(30_000,)]) as group:
            for member in (0, 1):
                group.network.set_bandwidth(group.name(member), group.name(2), 8000.0)  # a part in 0.13 s
            results = await all_of(group, timeouts=TIMEOUTS)
            assert [result.failure for result in results] == [None] * 3
            assert not results[0].exclusions
            assert results[0].allreduce_seconds > 6.0

    run(main)


def test_a_client_that_is_killed_does_not_fail_the_round():
    async def main() -> None:
        async with SimulatedGroup(seed=4, size=4, clients=1, shapes=[(50_000,)]) as group:
            for member in range(3):
                group.network.set_bandwidth(group.name(3), group.name(member), 20_000.0)
            tasks = [asyncio.ensure_future(group.run(member)) for member in range(4)]
            await asyncio.sleep(1.0)
            group.network.kill(group.name(3))
            results = await asyncio.gather(*tasks[:3])
            tasks[3].cancel()
            await asyncio.gather(tasks[3], return_exceptions=True)
            assert [result.failure for result in results] == [None] * 3
            assert {result.exclusions[0].member for result in results} == {group.peer(3)}
            assert all(torch.equal(group.results(0)[0], group.results(member)[0]) for member in (1, 2))

    run(main)


@pytest.mark.parametrize("bandwidths", [[1.0, 1.0, 1.0], [1.0, 1.0, 0.0]], ids=["owner", "owns nothing"])
def test_a_sender_of_nan_is_excluded_and_named(bandwidths: list[float]):
    async def main() -> None:
        async with SimulatedGroup(seed=5, size=3, bandwidths=bandwidths) as group:
            tensor_in(group.layout, group.arenas[2].snapshot, 0)[17] = float("nan")
            results = await all_of(group, timeouts=TIMEOUTS)
            check_exclusion(group, results, 2, reason="not finite")

    run(main)


def test_a_member_too_far_from_the_average_to_be_told_is_excluded_and_nobody_gets_a_wrong_one():
    """A difference of two finite values can be beyond the range of their dtype."""

    async def main() -> None:
        weights = [4.0, 4.0, 1.0]
        async with SimulatedGroup(
            seed=5, size=3, weights=weights, codec=BFloat16Compression(), shapes=[(3000,)]
        ) as group:
            for arena, value in zip(group.arenas, (3e38, 3e38, -3e38), strict=True):
                tensor_in(group.layout, arena.snapshot, 0).fill_(value)
            results = await all_of(group, timeouts=TIMEOUTS)
            check_exclusion(group, results, 2, reason="further from the average than float32 reaches")
            for member in (0, 1):
                for owner, average in ((0, 7 / 9), (1, 7 / 9), (2, 7 / 9)):
                    span = group.partition().spans[owner]
                    seen = group.results(member)[0][span.start : span.start + span.count]
                    assert bool((seen > 0.9 * average * 3e38).all()), (member, owner)

    run(main)


def test_an_owner_that_returns_nothing_loses_its_span_to_the_others(monkeypatch: pytest.MonkeyPatch):
    async def main() -> None:
        async with SimulatedGroup(seed=6, size=3) as group:
            rounds = [group.round(member, timeouts=TIMEOUTS) for member in range(3)]
            monkeypatch.setattr(rounds[1]._exchange, "release", lambda span, averaged: None)
            results = await asyncio.gather(*(current.run() for current in rounds))
            assert [(result.failure, result.repairs) for result in results] == [(None, 1)] * 3
            assert not results[0].exclusions  # it contributes all the same
            group.check_average([0, 1, 2])

    run(main)


def test_a_slow_third_sender_does_not_count_against_an_owner():
    """It may take all of sender_timeout for each part; reducer_timeout is twice that."""

    async def main() -> None:
        async with SimulatedGroup(seed=7, size=3, clients=2, shapes=[(3000,)]) as group:
            timeouts = RoundTimeouts(None, sender=0.4, reducer=0.8)
            snapshots = [later(2.3), later(2.0), later(2.31)]
            runs = [
                asyncio.ensure_future(group.run(member, snapshot=snapshot, timeouts=timeouts))
                for member, snapshot in enumerate(snapshots)
            ]
            await asyncio.sleep(1.0)  # the streams are open
            group.network.set_bandwidth(group.name(0), group.name(2), 3000.0)  # a part in 0.35 s
            results = await asyncio.gather(*runs)
            assert [result.failure for result in results] == [None] * 3
            assert not results[0].exclusions
            assert results[1].allreduce_seconds > 4.0

    run(main)


def test_a_process_that_was_stopped_blames_nobody():
    async def main() -> None:
        async with SimulatedGroup(seed=8, size=2, bandwidths=[1.0, 0.0]) as group:
            owner = group.round(0, timeouts=TIMEOUTS)
            owner_runs = asyncio.ensure_future(owner.run())
            await asyncio.sleep(0.5)
            # as if it had been stopped for a minute, in which the other member's parts have come
            loop, clocks = asyncio.get_running_loop(), owner.core.ledger.collections[SpanId(0)].clocks
            clocks.shift(-60.0)
            driver = owner._driver
            assert driver._timer is not None
            driver._timer.cancel()
            driver._due = clocks.deadline
            driver._timer = loop.call_at(clocks.deadline, driver._on_timer)
            results = await asyncio.gather(owner_runs, group.run(1, timeouts=TIMEOUTS))
            assert [result.failure for result in results] == [None] * 2
            assert not results[0].exclusions

    run(main)


def test_an_owner_tells_a_sender_itself_that_it_is_excluded(monkeypatch: pytest.MonkeyPatch):
    async def main() -> None:
        async with SimulatedGroup(seed=8, size=2, clients=1) as group:
            tensor_in(group.layout, group.arenas[1].snapshot, 0)[17] = float("nan")
            rounds = [group.round(member) for member in range(2)]
            monkeypatch.setattr(rounds[0]._commitment, "announce", lambda message: None)
            results = await asyncio.gather(*(current.run() for current in rounds))
            assert f"excluded by {group.peer(0)}: it sent values" in (results[1].failure or "")

    run(main)


def test_a_second_exchange_with_the_same_owner_is_refused():
    async def main() -> None:
        async with SimulatedGroup(seed=8, size=2, clients=1) as group:
            rounds = [group.round(0), group.round(1, snapshot=later(1.0))]
            tasks = [asyncio.ensure_future(current.run()) for current in rounds]
            await asyncio.sleep(0.5)
            owner = group.hosts[0].peer_id
            async with group.hosts[1].open_stream(owner, EXCHANGE, timeout=5.0) as stream:
                await stream.send(Contribute(PREFIX, group.group.group_id, SpanId(0)))
                with pytest.raises(RemoteError, match="opened an exchange that it has no part in"):
                    await stream.receive()
            assert [(await task).failure for task in tasks] == [None, None]  # the first one goes on

    run(main)


def test_sender_timeout_bounds_the_wait_for_members_to_join():
    async def main() -> None:
        async with SimulatedGroup(seed=9, size=3, clients=1) as group:
            options = {"snapshot": later(1.0), "timeouts": TIMEOUTS}
            results = await asyncio.gather(*(group.run(member, **options) for member in (0, 1)))
            for result in results:
                assert result.failure is None
                assert "did not join the round within 2 s" in result.exclusions[0].reason
                assert result.allreduce_seconds < 3.0

    run(main)


# weights and roles


@pytest.mark.parametrize("codec", [None, BFloat16Compression()], ids=["lossless", "lossy"])
def test_a_member_with_weight_0_gets_the_average_and_counts_for_nothing(codec: BFloat16Compression | None):
    async def main() -> None:
        async with SimulatedGroup(
            seed=10, size=4, clients=1, weights=[1.0, 3.0, 0.0, 0.0], codec=codec
        ) as group:
            results = await all_of(group)
            assert [result.failure for result in results] == [None] * 4
            assert all(result.weights == (1.0, 3.0, 0.0, 0.0) and result.applies for result in results)
            assert results[3].bytes_sent == 0
            if codec is None:
                group.check_average(range(4))
            for index, reference in enumerate(group.averages(group.weights)):
                for member in (2, 3):
                    assert torch.allclose(group.results(member)[index].double(), reference, atol=0.05)

    run(main)


def test_when_all_weights_are_0_the_round_fails_for_all():
    async def main() -> None:
        async with SimulatedGroup(seed=10, size=3, weights=[0.0] * 3) as group:
            results = await all_of(group)
            assert all("nobody contributes" in (result.failure or "") for result in results), results

    run(main)


def test_the_weight_is_read_after_the_snapshot():
    async def main() -> None:
        async with SimulatedGroup(seed=11, size=2) as group:

            async def snapshot() -> None:
                await asyncio.sleep(1.0)
                group.weights[0] = 5.0

            results = await asyncio.gather(group.run(0, snapshot=snapshot), group.run(1))
            assert all(result.weights == (5.0, 1.0) for result in results)
            group.check_average([0, 1])

    run(main)


def lie_about_weights(monkeypatch: pytest.MonkeyPatch, told: list[float]) -> None:
    """What members tell owners, one after the other; their leader hears the truth."""
    send = Stream.send

    async def lie(stream: Stream, message: object) -> None:
        if isinstance(message, DeclareWeight) and message.weight == 0.125:
            message = DeclareWeight(told.pop())
        await send(stream, message)

    monkeypatch.setattr(Stream, "send", lie)


def test_a_member_that_tells_different_weights_is_named(monkeypatch: pytest.MonkeyPatch):
    async def main() -> None:
        async with SimulatedGroup(seed=12, size=3, clients=1, weights=[1.0, 1.0, 0.125]) as group:
            lie_about_weights(monkeypatch, [0.125, 100.0])
            results = await all_of(group)
            assert all("contributed with different weights" in (result.failure or "") for result in results)
            assert all((result.failure or "").startswith(group.peer(2)) for result in results[:2])

    run(main)


@pytest.mark.parametrize("weight", [-1.0, float("inf")])
def test_a_member_that_tells_no_weight_is_excluded(weight: float, monkeypatch: pytest.MonkeyPatch):
    async def main() -> None:
        async with SimulatedGroup(seed=12, size=3, clients=1, weights=[1.0, 1.0, 0.125]) as group:
            lie_about_weights(monkeypatch, [weight, weight])
            results = await all_of(group)
            assert [result.failure is None for result in results] == [True, True, False]
            assert f"declared the weight {weight}" in results[0].exclusions[0].reason
            group.check_average([0, 1], [1.0, 1.0, 0.0])

    run(main)


def test_an_auxiliary_member_helps_and_keeps_its_tensors():
    async def main() -> None:
        async with SimulatedGroup(seed=13, size=4, auxiliaries=1, clients=1) as group:
            assert group.modes[2] is PeerMode.AUXILIARY
            before = bytes(group.arenas[2].snapshot)
            results = await all_of(group)
            assert [result.failure for result in results] == [None] * 4
            assert [result.applies for result in results] == [True, True, False, True]
            assert results[0].weights == (1.0, 1.0, 0.0, 1.0)
            group.check_average([0, 1, 3])
            spans = group.partition().spans
            assert spans[2].count > spans[0].count
            assert group.arenas[2].snapshot == before
            itemsize = 4
            assert results[2].bytes_received == 3 * spans[2].count * itemsize  # parts of its own span alone

    run(main)


def test_members_that_know_the_leader_alone_dial_each_other_by_what_they_have_signed():
    """In a large DHT many pairs have never heard of each other's addresses."""

    async def story() -> None:
        async with SimulatedGroup(seed=19, size=5, clients=1, strangers=True) as group:
            assert not group.hosts[1].addresses_of(group.hosts[2].peer_id)
            results = await all_of(group)
            assert [result.failure for result in results] == [None] * 5
            group.check_average(range(5))

    run(story)


@pytest.mark.parametrize("bandwidth", [0.0, 1.0], ids=["owns nothing", "owns a span"])
def test_an_auxiliary_leader_coordinates_a_round_of_clients(bandwidth: float):
    async def story() -> None:
        bandwidths = [bandwidth, 1.0, 1.0, 1.0]
        async with SimulatedGroup(seed=17, size=4, auxiliaries=2, clients=2, bandwidths=bandwidths) as group:
            results = await asyncio.gather(*(group.run(member) for member in range(4)))
            assert [result.failure for result in results] == [None] * 4
            assert [result.applies for result in results] == [False, False, True, True]
            assert results[0].weights == (0.0, 0.0, 1.0, 1.0)
            group.check_average([2, 3])

    run(story)


def test_an_auxiliary_member_that_is_never_triggered_holds_up_nobody_without_a_span():
    async def main() -> None:
        async with SimulatedGroup(seed=13, size=3, auxiliaries=1, bandwidths=[1.0, 1.0, 0.0]) as group:
            snapshots = [later(0.0), later(0.0), forever]
            results = await asyncio.gather(
                *(group.run(member, snapshot=snapshot) for member, snapshot in enumerate(snapshots))
            )
            assert [result.failure for result in results] == [None] * 3

    run(main)


def test_spans_follow_bandwidth():
    async def main() -> None:
        bandwidths = [30.0, 10.0, 0.0, None, 0.5]
        async with SimulatedGroup(seed=14, size=5, bandwidths=bandwidths, min_size=2000) as group:
            spans = [span.count for span in group.partition().spans]
            assert spans[0] > spans[3] > 0  # None: the mean of those given
            assert spans[2] == spans[4] == 0  # nothing, and less than min_size
            results = await all_of(group)
            assert [result.failure for result in results] == [None] * 5
            group.check_average(range(5))
            itemsize, others = 4, 4
            for result, count in zip(results, spans, strict=True):
                total = group.layout.numel
                assert result.bytes_received == itemsize * (others * count + total - count)

    run(main)


def test_a_group_in_which_nobody_can_own_is_a_named_error():
    group = SimulatedGroup(seed=14, size=2, clients=2)
    with pytest.raises(AllreduceException, match="none of the group's 2 members can average anything"):
        group.partition()


def test_everybody_reports_the_same_spread():
    async def main() -> None:
        async with SimulatedGroup(seed=15, size=3, clients=1, shapes=[(3000,), (40, 40)]) as group:
            results = await all_of(group)
            (spread,) = {result.spread for result in results}
            assert spread is not None
            averages = torch.cat(group.averages([1.0] * 3))
            members = torch.stack([torch.cat([t.double().reshape(-1) for t in own]) for own in group.tensors])
            distance = (members - averages).square().mean().sqrt().item()
            assert spread.distance == pytest.approx(distance, rel=1e-4)
            assert spread.relative == pytest.approx(
                distance / averages.square().mean().sqrt().item(), rel=1e-4
            )

    run(main)


def test_tensors_of_zeros_have_no_relative_spread():
    async def main() -> None:
        async with SimulatedGroup(seed=15, size=2) as group:
            for arena in group.arenas:
                arena.snapshot[:] = bytes(len(arena.snapshot))
            (result, _) = await all_of(group)
            assert result.spread is not None
            assert (result.spread.distance, result.spread.relative) == (0.0, None)

    run(main)


# cancelling


@pytest.mark.parametrize("victim", [0, 1, 2], ids=["leader", "owner", "client"])
@pytest.mark.parametrize("before_trigger", [True, False], ids=["before the trigger", "during all-reduce"])
def test_cancelling_frees_the_groupmates_at_once(victim: int, before_trigger: bool):
    """They go on without the member; if it is the leader, with another one."""

    async def main() -> None:
        async with SimulatedGroup(seed=16, size=4, clients=2) as group:
            snapshots = [forever if before_trigger else later(0.0)] * 3
            rounds = [  # the last member keeps the others waiting
                group.round(member, snapshot=snapshot)
                for member, snapshot in enumerate([*snapshots, forever])
            ]
            tasks = [
                asyncio.ensure_future(group.run_round(member, current))
                for member, current in enumerate(rounds)
            ]
            await asyncio.sleep(3.0)
            assert not any(task.done() for task in tasks)
            rounds[victim].withdraw("its user cancelled the step")
            await asyncio.wait([tasks[victim]], timeout=0.5)
            assert "cancelled the step" in (tasks[victim].result().failure or "")
            await asyncio.sleep(2.0)  # a new leader waits a second for the promise of the old one
            others = [rounds[member] for member in range(4) if member != victim]
            assert all(victim in other.core.ledger.excluded for other in others)
            for other in others:
                other.withdraw("the end of the test")
            await asyncio.gather(*tasks)

    run(main)


# repair


async def strike(
    group: SimulatedGroup, victims: list[int], *, after: float = 0.5, speed: float = 20_000.0
) -> dict[int, RoundResult]:
    """Kill members in the midst of the exchange; what became of all others."""
    for victim in victims:
        for member in range(group.size):
            if member != victim:
                group.network.set_bandwidth(group.name(victim), group.name(member), speed)
    tasks = [asyncio.ensure_future(group.run(member)) for member in range(group.size)]
    await asyncio.sleep(after)
    for victim in victims:
        group.network.kill(group.name(victim))
    living = [member for member in range(group.size) if member not in victims]
    async with asyncio.timeout(60):
        results = await asyncio.gather(*(tasks[member] for member in living))
    for victim in victims:
        tasks[victim].cancel()
    await asyncio.gather(*(tasks[victim] for victim in victims), return_exceptions=True)
    return dict(zip(living, results, strict=True))


def exact_average(group: SimulatedGroup, result: RoundResult) -> torch.Tensor:
    """What a report says of who is in the average of which part, worked out in float64."""
    layout, partition = group.layout, group.partition()
    values = [vector_in(layout, arena.snapshot).double() for arena in group.arenas]
    total = sum(weight * value for weight, value in zip(result.weights, values, strict=True))
    weights = torch.full_like(values[0], sum(result.weights))
    for member, first, stop in result.partial:
        for part in partition.parts[first:stop]:
            where = slice(part.start, part.start + part.count)
            total[where] += group.weights[member] * values[member][where]  # type: ignore[index]
            weights[where] += group.weights[member]
    return total / weights  # type: ignore[operator]


def check_survivors(group: SimulatedGroup, results: dict[int, RoundResult], victims: list[int]) -> None:
    """They hold the same bits, and those are the average that their reports tell."""
    first = next(iter(results))
    for member, result in results.items():
        assert result.failure is None, (member, result)
        assert {one.member for one in result.exclusions} == {group.peer(victim) for victim in victims}
        assert result.partial == results[first].partial
        assert all(map(torch.equal, group.results(member), group.results(first))), member
    average = vector_in(group.layout, group.arenas[first].average).double()
    assert torch.allclose(average, exact_average(group, results[first]), atol=1e-6)


@pytest.mark.parametrize("victim", [0, 1, 3], ids=["leader", "successor", "owner"])
def test_an_owner_that_is_killed_costs_the_others_a_repair(victim: int):
    """What it had delivered stays in the average."""

    async def main() -> None:
        async with SimulatedGroup(seed=20, size=4, shapes=[(40_000,)]) as group:
            results = await strike(group, [victim], after=1.0)
            check_survivors(group, results, [victim])
            assert all(result.repairs >= 1 for result in results.values())
            (partial,) = {result.partial for result in results.values()}
            assert {member for member, _, _ in partial} == {victim}

    run(main)


def test_leader_and_successor_are_killed_in_a_group_of_eight():
    async def main() -> None:
        async with SimulatedGroup(seed=21, size=8, shapes=[(40_000,)]) as group:
            results = await strike(group, [0, 1], after=1.0)
            check_survivors(group, results, [0, 1])

    run(main)


def test_under_a_lossy_codec_all_survivors_of_an_owner_agree_within_its_error():
    async def main() -> None:
        async with SimulatedGroup(seed=22, size=4, shapes=[(40_000,)], codec=BFloat16Compression()) as group:
            results = await strike(group, [2], after=1.0)
            assert all(result.failure is None and result.repairs for result in results.values())
            expected = exact_average(group, results[0])
            for member in results:
                average = vector_in(group.layout, group.arenas[member].average).double()
                assert torch.allclose(average, expected, atol=0.05)

    run(main)


@pytest.mark.parametrize("one_way", [False, True], ids=["both ways", "one way"])
def test_two_followers_that_are_cut_off_from_each_other_both_commit(one_way: bool):
    async def main() -> None:
        async with SimulatedGroup(seed=23, size=4, shapes=[(40_000,)]) as group:
            group.network.silence(group.name(1), group.name(2), one_way=one_way)
            results = await all_of(group)
            assert [(result.failure, result.exclusions) for result in results] == [(None, ())] * 4
            assert results[0].repairs >= 1
            group.check_average(range(4))

    run(main)


# sweeps


class Trouble:
    """What befalls one round of a group, chosen by a seed."""

    KINDS = (
        "kill",
        "drop",
        "withdraw",
        "silence",
        "no snapshot",
        "nan",
        "never triggered",
        "takes nothing",
        "nothing",
    )

    def __init__(self, rng: random.Random) -> None:
        self.rng = rng
        self.kind = rng.choice(self.KINDS)
        self.size = rng.randint(2, 6)
        clients = rng.randint(0, (self.size - 1) // 2)
        auxiliaries = rng.randint(0, 1) if self.size - clients > 2 else 0
        self.group = SimulatedGroup(
            rng.randrange(1 << 30),
            self.size,
            clients=clients,
            auxiliaries=auxiliaries,
            weights=[rng.choice((0.0, 1.0, 2.5)) if rng.random() < 0.3 else 1.0 for _ in range(self.size)],
            bandwidths=[rng.choice((None, 1.0, 4.0, 0.0)) for _ in range(self.size)],
        )
        self.victim = rng.randrange(self.size)
        self.rounds: list[Round] = []

    def snapshot(self, member: int) -> Callable[[], Awaitable[None]]:
        async def fails() -> None:
            raise AllreduceException("NaN of its own")

        if member == self.victim and self.kind == "no snapshot":
            return fails
        if member == self.victim and self.kind == "never triggered":
            return forever
        return later(self.rng.choice((0.0, 0.0, 0.3)))

    def strike(self) -> None:
        group, victim = self.group, self.victim
        other = self.rng.choice([member for member in range(self.size) if member != victim])
        match self.kind:
            case "kill":
                group.network.kill(group.name(victim))
            case "drop":
                group.network.drop_connections(group.name(victim), group.name(other))
            case "withdraw":
                self.rounds[victim].withdraw("its user cancelled the step")
            case "silence" if self.size > 2:
                group.network.silence(group.name(victim), group.name(other))

    async def run(self, seed: int) -> str:
        group = self.group
        async with group:
            if self.kind == "nan":
                tensor_in(group.layout, group.arenas[self.victim].snapshot, 0)[:] = float("nan")
            limits = RoundTimeouts(60.0, 2.0, 4.0)
            self.rounds = [
                group.round(member, snapshot=self.snapshot(member), timeouts=limits)
                for member in range(self.size)
            ]
            tasks = [
                asyncio.ensure_future(group.run_round(member, current))
                for member, current in enumerate(self.rounds)
            ]
            if self.kind == "takes nothing":
                self.rounds[self.victim]._exchange._receive_averages = lambda *_: forever()  # type: ignore[method-assign]
            await asyncio.sleep(self.rng.uniform(0.0, 0.8))
            self.strike()
            await asyncio.wait(tasks, timeout=300)
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            dead = {self.victim} if self.kind == "kill" else set()
            living = [member for member in range(self.size) if member not in dead]
            assert all(tasks[member].done() and not tasks[member].cancelled() for member in living), seed
            return self.check(seed, {member: tasks[member].result() for member in living})

    def check(self, seed: int, results: dict[int, RoundResult]) -> str:
        group = self.group
        committed = [member for member, result in results.items() if result.applies and not result.failure]
        if not committed:
            return "failed"
        exclusions = {results[member].exclusions for member in committed}
        assert len(exclusions) == 1, (seed, exclusions)
        names = {one.member for one in exclusions.pop()}
        excluded = {member for member in range(self.size) if group.peer(member) in names}
        story = {member: result.failure for member, result in results.items()}
        expected = [member for member in results if results[member].applies and member not in excluded]
        assert committed == expected, (seed, self.kind, excluded, story)
        for member in committed:
            assert all(map(torch.equal, group.results(member), group.results(committed[0]))), (seed, member)
        if not excluded:
            group.check_average(committed)
        return "committed without some" if excluded else "committed"


def sweep(seeds: range) -> None:
    endings: Counter[str] = Counter()
    for seed in seeds:
        trouble = Trouble(random.Random(seed))
        endings[run(lambda trouble=trouble, seed=seed: trouble.run(seed))] += 1  # type: ignore[misc]
    assert set(endings) >= {"committed", "committed without some"}, endings


@pytest.mark.sweep
@pytest.mark.parametrize("block", range(4))
def test_whatever_happens_all_end_alike(block: int):
    sweep(range(block * 25, block * 25 + 25))


@pytest.mark.soak
@pytest.mark.parametrize("block", range(20))
def test_whatever_happens_all_end_alike_soak(block: int):
    sweep(range(1000 + block * 100, 1100 + block * 100))
