"""Whole rounds of a group on the simulated network: real streams and encryption, virtual time, scripted faults."""

from __future__ import annotations

import asyncio
import errno
from collections import Counter
from collections.abc import Callable
from dataclasses import replace

import msgspec
import pytest
import torch

from shoal.averaging.allreduce import streams
from shoal.averaging.allreduce.assignment import SpanId
from shoal.averaging.allreduce.exchange import OwnSpan
from shoal.averaging.allreduce.messages import EXCHANGE, Contribute, FromLeader, Outcome
from shoal.averaging.allreduce.round import Round, RoundResult, RoundTimeouts
from shoal.averaging.allreduce.rounds import MAX_WAITING_STREAMS_PER_PEER
from shoal.averaging.group import GROUP_ID_BYTES
from shoal.errors import AllreduceException, ProtocolViolation, RemoteError
from shoal.p2p.connection_writer import ConnectionWriter
from shoal.p2p.protocol.frames import FrameKind
from shoal.p2p.protocol.wire import decode, encode
from shoal.testing.clock import run
from shoal.testing.network import HostNetwork
from shoal.testing.peers import make_host
from shoal.testing.rounds import PREFIX, SimulatedGroup


@pytest.mark.parametrize(("size", "clients"), [(2, 0), (2, 1), (5, 0), (5, 2)])
def test_a_round_commits_everywhere_with_the_exact_average(size: int, clients: int):
    async def main() -> None:
        weights = [1.0 + member for member in range(size)]
        async with SimulatedGroup(seed=size, size=size, clients=clients, weights=weights) as group:
            rounds = [group.round(member) for member in range(size)]
            results = await asyncio.gather(*(current.run() for current in rounds))
            assert [result.failure for result in results] == [None] * size
            assert [result.weights for result in results] == [tuple(weights)] * size  # clients know them too
            assert results[0].spread is not None
            assert len({result.spread for result in results}) == 1
            group.check_average(list(range(size)))
            sent = sum(result.bytes_sent for result in results)
            assert sent == sum(result.bytes_received for result in results) > 0

    run(main)


def test_members_that_learn_of_the_group_late_are_waited_for():
    async def main() -> None:
        async with SimulatedGroup(seed=1, size=3) as group:

            async def late(member: int) -> RoundResult:
                await asyncio.sleep(2.0 * member)
                return await group.run(member)

            results = await asyncio.gather(*(late(member) for member in range(3)))
            assert [result.failure for result in results] == [None] * 3

    run(main)


@pytest.mark.parametrize(
    "error", [AllreduceException("averaged_tensors[3] has NaN"), RuntimeError("out of memory")]
)
@pytest.mark.parametrize("victim", [0, 2])
def test_a_snapshot_that_fails_fails_its_member_alone(victim: int, error: Exception):
    """It goes on to serve its span, and, as the leader, to lead."""

    async def main() -> None:
        async def fails() -> None:
            raise error

        async with SimulatedGroup(seed=2, size=3) as group:
            others = [member for member in range(3) if member != victim]
            runs = [
                group.run(member, **({"snapshot": fails} if member == victim else {})) for member in range(3)
            ]
            async with asyncio.timeout(60):
                results = await asyncio.gather(*runs)
            assert str(error) in (results[victim].failure or "")
            weights = [0.0 if member == victim else 1.0 for member in range(3)]
            for member in others:
                assert results[member].failure is None
                assert results[member].weights == tuple(weights)
                (exclusion,) = results[member].exclusions
                assert (exclusion.member, exclusion.phase) == (group.peer(victim), "snapshot")
                assert str(error) in exclusion.reason
            group.check_average(others, weights)

    run(main)


def test_a_bug_in_the_leaders_round_costs_the_others_an_election(monkeypatch: pytest.MonkeyPatch):
    async def main() -> None:
        async with SimulatedGroup(seed=2, size=3) as group:
            leader = group.round(0)

            async def bug() -> None:
                await asyncio.sleep(0.5)
                raise KeyError("bug")

            monkeypatch.setattr(leader, "_snapshot", bug)
            async with asyncio.timeout(60):
                results = await asyncio.gather(
                    group.run_round(0, leader), group.run(1), group.run(2), return_exceptions=True
                )
            assert isinstance(results[0], ExceptionGroup)
            for result in results[1:]:
                assert isinstance(result, RoundResult)
                assert (result.failure, result.repairs) == (None, 1)
                assert [one.member for one in result.exclusions] == [group.peer(0)]
            group.check_average([1, 2], [0.0, 1.0, 1.0])

    run(main)


def test_the_round_goes_on_without_a_member_that_owns_nothing_and_never_joins():
    """It cancelled its search when the group had just begun, or did not accept the leader's word: nobody dials it."""

    async def main() -> None:
        async with SimulatedGroup(seed=6, size=3, clients=1) as group:
            async with asyncio.timeout(60):
                results = await asyncio.gather(group.run(0), group.run(1))
            for result in results:
                assert result.failure is None
                (exclusion,) = result.exclusions
                assert (exclusion.member, exclusion.phase) == (group.peer(2), "join")
                assert "did not join the round within 15 s" in exclusion.reason
            group.check_average([0, 1], [1.0, 1.0, 0.0])

    run(main)


def test_the_parts_of_a_member_that_never_joins_go_to_the_others():
    async def main() -> None:
        async with SimulatedGroup(seed=6, size=3) as group:
            async with asyncio.timeout(60):
                results = await asyncio.gather(group.run(0), group.run(1))
            assert [result.failure for result in results] == [None, None]
            assert all(result.repairs for result in results)
            assert results[0].exclusions[0].member == group.peer(2)
            group.check_average([0, 1], [1.0, 1.0, 0.0])

    run(main)


def test_a_member_whose_allreduce_timeout_passes_leaves_the_round():
    async def main() -> None:
        async with SimulatedGroup(seed=3, size=2) as group:
            for member in (0, 1):
                group.network.set_bandwidth(group.name(member), group.name(1 - member), 100.0)
            results = await asyncio.gather(
                *(group.run(member, timeouts=RoundTimeouts(5.0)) for member in range(2))
            )
            assert all("allreduce_timeout=5" in (result.failure or "") for result in results), results

    run(main)


def test_a_connection_that_the_round_does_not_use_may_end():
    """Two members that own nothing may know each other from the DHT; that connection falls idle and is closed."""

    async def main() -> None:
        async with SimulatedGroup(seed=4, size=3, bandwidths=[1.0, 0.0, 0.0]) as group:
            await group.hosts[1].connect(group.hosts[2].peer_id, timeout=10)
            tasks = [
                asyncio.ensure_future(group.run(member, snapshot=lambda: asyncio.sleep(2.0)))
                for member in range(3)
            ]
            await asyncio.sleep(1.0)
            assert group.network.drop_connections(group.name(1), group.name(2)) == 1
            results = await asyncio.gather(*tasks)
            assert [result.failure for result in results] == [None] * 3

    run(main)


def when_decided(monkeypatch: pytest.MonkeyPatch, leader: Round, happens: Callable[[], None]) -> None:
    """Let something happen in the instant between the leader's decision and its first word of it."""
    announce = leader._commitment.announce

    def after(message: FromLeader) -> None:
        if isinstance(message, Outcome):
            happens()
        announce(message)

    monkeypatch.setattr(leader._commitment, "announce", after)


@pytest.mark.parametrize("seconds", [0.0, 0.1, 15.0])
def test_an_outage_when_the_leader_decides_lets_nobody_end_differently(
    seconds: float, monkeypatch: pytest.MonkeyPatch
):
    async def main() -> None:
        async with SimulatedGroup(seed=2, size=2) as group:
            rounds = [group.round(member) for member in range(2)]
            connect, loop, until = HostNetwork.connect, asyncio.get_running_loop(), 0.0

            async def has_no_route(self: HostNetwork, *arguments: object) -> asyncio.Transport:
                if loop.time() < until:
                    raise OSError(errno.ENETUNREACH, "Network is unreachable")
                return await connect(self, *arguments)  # type: ignore[arg-type]

            def outage() -> None:
                nonlocal until
                until = loop.time() + seconds
                assert group.network.drop_connections(group.name(0), group.name(1))

            monkeypatch.setattr(HostNetwork, "connect", has_no_route)
            when_decided(monkeypatch, rounds[0], outage)
            runs = (group.run_round(member, current) for member, current in enumerate(rounds))
            async with asyncio.timeout(60):
                assert [result.failure for result in await asyncio.gather(*runs)] == [None, None]

    run(main)


@pytest.mark.parametrize(("silently", "most"), [(False, 4.0), (True, 30.0)], ids=["killed", "power loss"])
def test_a_leader_that_dies_as_it_decides_is_replaced(
    silently: bool, most: float, monkeypatch: pytest.MonkeyPatch
):
    """Its quorum had accepted: the new leader adopts what was decided."""

    async def main() -> None:
        async with SimulatedGroup(seed=2, size=3) as group:
            rounds = [group.round(member) for member in range(3)]
            died = 0.0

            def die() -> None:
                nonlocal died
                died = asyncio.get_running_loop().time()
                group.network.kill(group.name(0), silently=silently)

            when_decided(monkeypatch, rounds[0], die)
            tasks = [
                asyncio.ensure_future(group.run_round(member, current))
                for member, current in enumerate(rounds)
            ]
            results = await asyncio.gather(*tasks[1:])
            assert [(one.failure, one.exclusions, one.weights) for one in results] == [
                (None, (), (1.0, 1.0, 1.0))
            ] * 2
            assert died
            assert asyncio.get_running_loop().time() - died <= most
            group.check_average([1, 2])
            await tasks[0]

    run(main)


@pytest.mark.parametrize("victim", [0, 2], ids=["leader", "owner"])
def test_a_member_that_is_killed_in_the_exchange_fails_the_round_for_nobody_else(victim: int):
    async def main() -> None:
        async with SimulatedGroup(seed=4, size=4) as group:
            for member in range(4):
                if member != victim:
                    group.network.set_bandwidth(group.name(victim), group.name(member), 2000.0)
            tasks = [asyncio.ensure_future(group.run(member)) for member in range(4)]
            await asyncio.sleep(1.0)
            group.network.kill(group.name(victim))
            await asyncio.gather(*tasks, return_exceptions=True)
            survivors = [member for member in range(4) if member != victim]
            for member in survivors:
                result = tasks[member].result()
                assert result.failure is None
                assert result.repairs >= 1
                assert [one.member for one in result.exclusions] == [group.peer(victim)]
            first = group.results(survivors[0])
            assert all(all(map(torch.equal, first, group.results(member))) for member in survivors)

    run(main)


def test_a_round_keeps_no_streams_of_a_member_that_has_left():
    async def main() -> None:
        async with SimulatedGroup(seed=4, size=3) as group:
            trigger = asyncio.Event()
            rounds = [
                group.round(0, snapshot=trigger.wait),  # type: ignore[arg-type]
                group.round(1),
                group.round(2),
            ]
            tasks = [
                asyncio.ensure_future(group.run_round(member, current))
                for member, current in enumerate(rounds)
            ]

            def open_streams(member: int) -> list[set[int]]:
                serving = rounds[member]._exchange._serving.values()
                return [set(rounds[member]._commitment._streams), *(set(one.streams) for one in serving)]

            await asyncio.sleep(1.0)
            assert open_streams(0) == [{1, 2}, {1, 2}]
            group.network.kill(group.name(2))
            await asyncio.sleep(1.0)
            assert all(members == {1} for members in open_streams(0))  # of its own span, and a repaired one
            trigger.set()
            assert [(await task).failure for task in tasks[:2]] == [None, None]
            for member in (0, 1):
                assert not any(open_streams(member))
            await tasks[2]

    run(main)


@pytest.mark.parametrize("says_goodbye", [True, False], ids=["goodbye", "killed"])
def test_half_of_a_group_goes_on_with_the_casting_vote(says_goodbye: bool):
    """The founder of four leaves, and another member dies. Two are a quorum if the founder handed its vote on."""

    async def main() -> None:
        async with SimulatedGroup(seed=4, size=4) as group:
            for member in range(1, 4):
                group.network.set_bandwidth(group.name(0), group.name(member), 2000.0)
            rounds = [group.round(member) for member in range(4)]
            tasks = [asyncio.ensure_future(group.run_round(member, one)) for member, one in enumerate(rounds)]
            await asyncio.sleep(1.0)
            if says_goodbye:
                rounds[0].leave("its averager is shut down")
                await asyncio.sleep(0.1)
                group.hosts[0].leave()
            else:
                group.network.kill(group.name(0))
            group.network.kill(group.name(3))
            await asyncio.gather(*tasks, return_exceptions=True)
            results = [tasks[member].result() for member in (1, 2)]
            if says_goodbye:
                assert [one.failure for one in results] == [None, None]
                assert all(map(torch.equal, group.results(1), group.results(2)))
            else:
                assert all(one.failure is not None and not one.in_doubt for one in results)

    run(main)


def test_two_members_that_cannot_dial_each_other_are_kept_apart():
    """They know each other by an address at which nobody is; the leader reaches both, and averages everything."""

    async def main() -> None:
        async with SimulatedGroup(seed=1, size=3, strangers=True) as group:
            members = [
                msgspec.structs.replace(member, addresses=("/ip4/10.9.9.9/tcp/1",))
                for member in group.group.members
            ]
            group.group = replace(group.group, members=tuple(members))
            rounds = [group.round(member) for member in range(3)]
            results = await asyncio.gather(*(current.run() for current in rounds))
            assert [(result.failure, result.exclusions) for result in results] == [(None, ())] * 3
            spans = rounds[0].core.ledger.assignment.spans
            assert {span.owner for span in spans} == {0}
            group.check_average(range(3))

    run(main)


def test_a_stranger_is_refused():
    async def main() -> None:
        async with SimulatedGroup(seed=5, size=2) as group:
            stranger = await make_host(group.network, "stranger", seed=5)
            current = group.round(0)
            stranger.add_addresses(group.hosts[0].peer_id, group.hosts[0].announced_addresses)
            async with stranger.open_stream(group.hosts[0].peer_id, EXCHANGE, timeout=10) as stream:
                await stream.send(Contribute(PREFIX, group.group.group_id, SpanId(0)))
                with pytest.raises(RemoteError, match="no member of this group"):
                    await stream.receive()
            assert not current.core.failure
            await stranger.close()

    run(main)


def test_strangers_take_no_places_from_members_whose_streams_are_early():
    async def main() -> None:
        async with SimulatedGroup(seed=5, size=3) as group:
            stranger = await make_host(group.network, "stranger", seed=5)
            owner = group.hosts[1].peer_id
            stranger.add_addresses(owner, group.hosts[1].announced_addresses)

            async def open_early() -> str:
                async with stranger.open_stream(owner, EXCHANGE) as stream:
                    await stream.send(Contribute(PREFIX, bytes(GROUP_ID_BYTES), SpanId(1)))
                    with pytest.raises(RemoteError) as caught:
                        await stream.receive()
                    return caught.value.code

            flood = [asyncio.ensure_future(open_early()) for _ in range(200)]
            early = [asyncio.ensure_future(group.run(member)) for member in (0, 2)]
            await asyncio.sleep(1.0)
            results = await asyncio.gather(*early, group.run(1))
            assert [result.failure for result in results] == [None] * 3
            codes = Counter(await asyncio.gather(*flood))
            assert codes == {"busy": 200 - MAX_WAITING_STREAMS_PER_PEER, "no_such_round": 8}
            assert not group.rounds[1]._waiting
            await stranger.close()

    run(main)


@pytest.mark.parametrize("length", [0, 15, 17, 1 << 16])
def test_a_group_id_of_another_length_breaks_the_protocol(length: int):
    with pytest.raises(ProtocolViolation):
        decode(encode(Contribute(PREFIX, bytes(length), SpanId(0))), Contribute, "message")


def test_a_slow_link_full_of_parts_is_not_taken_for_a_dead_member():
    async def main() -> None:
        async with SimulatedGroup(seed=3, size=2) as group:
            for member in (0, 1):  # the exchange takes 12 s, in which the other connections hear nothing
                group.network.set_bandwidth(group.name(member), group.name(1 - member), 2000.0)
            results = await asyncio.gather(*(group.run(member) for member in range(2)))
            assert [result.failure for result in results] == [None, None]

    run(main)


@pytest.mark.parametrize("method", ["average", "to_return"])
def test_an_owner_whose_own_arithmetic_fails_leaves_the_round_with_the_reason(
    method: str, monkeypatch: pytest.MonkeyPatch
):
    async def main() -> None:
        async with SimulatedGroup(seed=3, size=3) as group:
            rounds = [group.round(member) for member in range(3)]
            original, calls = getattr(OwnSpan, method), iter(range(1000))

            def short_of_memory(own: OwnSpan, *arguments: int) -> object:
                if own._me == 1 and next(calls) == 2:
                    raise RuntimeError("can't allocate memory")
                return original(own, *arguments)

            monkeypatch.setattr(OwnSpan, method, short_of_memory)
            runs = (group.run_round(member, current) for member, current in enumerate(rounds))
            async with asyncio.timeout(10):
                results = await asyncio.gather(*runs)
            story = "RuntimeError while it averaged: can't al"
            assert story in (results[1].failure or "")
            for member in (0, 2):
                assert results[member].failure is None
                (exclusion,) = results[member].exclusions
                assert exclusion.member == group.peer(1)
                assert story in exclusion.reason
            assert not results[1].exclusions  # nobody else is blamed

    run(main)


def test_a_failed_round_holds_nothing_for_a_member_that_keeps_its_streams_open(
    monkeypatch: pytest.MonkeyPatch,
):
    async def main() -> None:
        async with SimulatedGroup(seed=3, size=3, clients=1, shapes=[(800_000,)]) as group:
            monkeypatch.setattr(streams, "WINDOW_BYTES", 4096)
            monkeypatch.setattr(streams, "MAX_WINDOW_BYTES", 4096)
            rounds = [group.round(member) for member in range(3)]
            never = asyncio.Event()
            # it neither takes averages nor leaves when it hears the end
            monkeypatch.setattr(rounds[2]._exchange, "_receive_averages", lambda *_: never.wait())
            monkeypatch.setattr(rounds[2]._commitment, "_hear_leader", lambda *_: never.wait())
            tasks = [
                asyncio.ensure_future(group.run_round(member, current))
                for member, current in enumerate(rounds)
            ]
            await asyncio.sleep(3.0)
            assert all(
                current._exchange._serving[SpanId(me)].own._spare for me, current in enumerate(rounds[:2])
            )
            for method in ("stop_contributing", "close"):  # it does not leave when it hears the end
                monkeypatch.setattr(rounds[2]._exchange, method, lambda *_: None)
            for owner in rounds[:2]:
                owner.withdraw("enough")
            results = await asyncio.gather(*tasks[:2])
            assert all("enough" in (result.failure or "") for result in results)
            await asyncio.sleep(1.0)
            for host, current in zip(group.hosts, rounds[:2], strict=False):
                for serving in current._exchange._serving.values():
                    assert not serving.own._arrived
                    assert not serving.own._spare
                assert not any(one.calls.handlers for one in host._connections._connections)
            tasks[2].cancel()
            await asyncio.gather(tasks[2], return_exceptions=True)

    run(main)


def test_a_round_that_is_over_keeps_nothing_for_a_member_that_confirms_nothing(
    monkeypatch: pytest.MonkeyPatch,
):
    """Everything was sent to it over several lanes. Until it confirms that, pieces may be sent again."""

    async def main() -> None:
        async with SimulatedGroup(
            seed=3, size=3, clients=1, shapes=[(200_000,)], lanes=3, part_bytes=1 << 17
        ) as group:
            send_frame = ConnectionWriter.send_frame

            def withhold(writer: ConnectionWriter, kind: FrameKind, stream_id: int, body: bytes) -> None:
                is_silent = any(one.writer is writer for one in group.hosts[2]._connections._connections)
                if kind is not FrameKind.RECEIVED or not is_silent:
                    send_frame(writer, kind, stream_id, body)

            monkeypatch.setattr(ConnectionWriter, "send_frame", withhold)
            rounds = [
                group.round(member, timeouts=RoundTimeouts(sender=4.0, reducer=4.0)) for member in range(3)
            ]
            never = asyncio.Event()
            monkeypatch.setattr(rounds[2]._exchange, "_receive_averages", lambda *_: never.wait())
            monkeypatch.setattr(rounds[2]._commitment, "_hear_leader", lambda *_: never.wait())
            for method in ("stop_contributing", "close"):  # it does not leave when it hears the end
                monkeypatch.setattr(rounds[2]._exchange, method, lambda *_: None)
            tasks = [
                asyncio.ensure_future(group.run_round(member, current))
                for member, current in enumerate(rounds)
            ]
            results = await asyncio.gather(*tasks[:2])
            assert [result.failure for result in results] == [None, None]
            assert [one.member for one in results[0].exclusions] == [group.peer(2)]
            assert rounds[0]._exchange._serving[SpanId(0)].is_done(2)
            await asyncio.sleep(1.0)
            for host in group.hosts[:2]:
                assert not any(one.calls.handlers for one in host._connections._connections)
                for bundle in host._connections._stripes._bundles:
                    assert bundle._scheduler.is_idle
            tasks[2].cancel()
            await asyncio.gather(tasks[2], return_exceptions=True)

    run(main)
