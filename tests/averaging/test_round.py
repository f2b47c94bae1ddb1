"""Whole rounds of a group on the simulated network: real streams and encryption, virtual time, scripted faults."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Awaitable, Callable

import pytest
import torch

from shoal.averaging.allreduce import AskForOutcome, Phase
from shoal.averaging.exchange import Arena
from shoal.averaging.group import (
    GROUP_ID_BYTES,
    NONCE_BYTES,
    SCHEMA_HASH_BYTES,
    GroupInfo,
    MemberInfo,
    PeerMode,
)
from shoal.averaging.load_balancing import load_balance_peers
from shoal.averaging.partition import Layout, Partition
from shoal.averaging.round import Round, RoundResult
from shoal.averaging.rounds import Rounds
from shoal.averaging.router import Router
from shoal.errors import AllreduceException
from shoal.p2p.config import HostConfig
from shoal.p2p.host import Host
from shoal.testing.clock import run
from shoal.testing.network import SimulatedNetwork
from shoal.testing.peers import make_host

SHAPES = [(5000,), (), (37, 11)]
PREFIX = "test"

Snapshot = Callable[[], Awaitable[None]]


class SimulatedGroup:
    """Hosts on one simulated network that know each other, and an arena with random tensors for each."""

    def __init__(
        self,
        seed: int,
        size: int,
        *,
        clients: int = 0,
        weights: list[float] | None = None,
        bandwidths: list[float] | None = None,
    ) -> None:
        self.weights = weights or [1.0] * size
        self.bandwidths = bandwidths or [1.0] * size
        self.rng = random.Random(seed)
        self.seed = seed
        self.size = size
        self.modes = [PeerMode.CLIENT if i >= size - clients else PeerMode.FULL for i in range(size)]
        self.network = SimulatedNetwork(self.rng)
        generator = torch.Generator().manual_seed(seed)
        self.tensors = [[torch.randn(shape, generator=generator) for shape in SHAPES] for _ in range(size)]
        self.layout = Layout.from_tensors(self.tensors[0])
        self.arenas = [self._arena(tensors) for tensors in self.tensors]
        self.hosts: list[Host] = []
        self.rounds: list[Rounds] = []

    def _arena(self, tensors: list[torch.Tensor]) -> Arena:
        arena = Arena(*(torch.zeros(self.layout.nbytes, dtype=torch.uint8) for _ in range(2)))
        for index, tensor in enumerate(tensors):
            self.layout.tensor_view(arena.snapshot, index).copy_(tensor.reshape(-1))
        return arena

    def name(self, member: int) -> str:
        return f"member{member}"

    async def __aenter__(self) -> SimulatedGroup:
        for member, mode in enumerate(self.modes):
            config = HostConfig(client_mode=mode is PeerMode.CLIENT)
            self.hosts.append(await make_host(self.network, self.name(member), config, seed=self.seed))
        for host in self.hosts:
            for other in self.hosts:
                if other is not host:
                    host.add_addresses(other.peer_id, other.announced_addresses)
        for host in self.hosts[1:]:
            await host.connect(self.hosts[0].peer_id, timeout=10)
        self.rounds = [Rounds(Router.of(host), PREFIX) for host in self.hosts]
        self.group = self.make_group(b"g" * GROUP_ID_BYTES)
        return self

    async def __aexit__(self, *_: object) -> None:
        for host in self.hosts:
            await host.close()

    def make_group(self, group_id: bytes) -> GroupInfo:
        members = tuple(
            MemberInfo(
                peer_id=host.peer_id.to_bytes(),
                leader=self.hosts[0].peer_id.to_bytes(),
                key="test.0b",
                schema_hash=bytes(SCHEMA_HASH_BYTES),
                mode=mode,
                bandwidth=bandwidth,
                addresses=(),
                gather=b"",
                start_time=0.0,
                signed_at=0.0,
                nonce=bytes(NONCE_BYTES),
                weight=weight,
            )
            for host, mode, weight, bandwidth in zip(
                self.hosts, self.modes, self.weights, self.bandwidths, strict=True
            )
        )
        return GroupInfo(group_id, "test.0b", members)

    def round(
        self,
        member: int,
        *,
        snapshot: Snapshot | None = None,
        timeout: float | None = None,
    ) -> Round:
        owned = load_balance_peers(
            self.layout.data_nbytes,
            self.bandwidths,
            can_own=[mode is not PeerMode.CLIENT for mode in self.modes],
        )

        async def nothing() -> None:
            pass

        made = Round(
            self.hosts[member],
            PREFIX,
            self.group,
            Partition.create(self.layout, owned, 1024),
            self.arenas[member],
            take_snapshot=snapshot or nothing,
            timeout=timeout,
        )
        self.rounds[member].begin(made)
        return made

    async def run(self, member: int, **options: object) -> RoundResult:
        current = self.round(member, **options)  # type: ignore[arg-type]
        try:
            return await current.run()
        finally:
            self.rounds[member].end(current)

    def check_average(self, members: list[int]) -> None:
        for index in range(len(SHAPES)):
            inputs = torch.stack([tensors[index].double().reshape(-1) for tensors in self.tensors])
            column = torch.tensor(self.weights, dtype=torch.float64).view(-1, 1)
            reference = (inputs * column).sum(0) / sum(self.weights)
            for member in members:
                result = self.layout.tensor_view(self.arenas[member].average, index).double()
                assert bool(((result - reference).abs() <= 1e-6 * inputs.abs().mean(0)).all())


@pytest.mark.parametrize(("size", "clients"), [(2, 0), (2, 1), (5, 0), (5, 2)])
def test_a_round_commits_everywhere_with_the_exact_average(size: int, clients: int):
    async def main() -> None:
        weights = [1.0 + member for member in range(size)]
        async with SimulatedGroup(seed=size, size=size, clients=clients, weights=weights) as group:
            rounds = [group.round(member) for member in range(size)]
            results = await asyncio.gather(*(current.run() for current in rounds))
            assert [current.weight for current in rounds] == [sum(weights)] * size  # clients know it too
            assert [result.failure for result in results] == [None] * size
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


def test_a_member_whose_snapshot_fails_fails_the_round_for_all_with_its_reason():
    async def main() -> None:
        async def no_snapshot() -> None:
            raise AllreduceException("averaged_tensors[3] has NaN")

        async with SimulatedGroup(seed=2, size=3) as group:
            results = await asyncio.gather(group.run(0), group.run(1, snapshot=no_snapshot), group.run(2))
            assert all("averaged_tensors[3] has NaN" in (result.failure or "") for result in results), results
            assert str(group.hosts[1].peer_id) in (results[2].failure or "")

    run(main)


def test_a_snapshot_that_raises_anything_else_fails_the_round_for_all_too():
    async def main() -> None:
        async def out_of_memory() -> None:
            raise RuntimeError("CUDA out of memory")

        for victim in (0, 2):
            async with SimulatedGroup(seed=2, size=3) as group:
                runs = [group.run(i, snapshot=out_of_memory if i == victim else None) for i in range(3)]
                async with asyncio.timeout(60):
                    results = await asyncio.gather(*runs)
                assert all("CUDA out of memory" in (result.failure or "") for result in results), results

    run(main)


def test_a_bug_in_the_leaders_round_fails_it_for_all(monkeypatch: pytest.MonkeyPatch):
    async def main() -> None:
        async with SimulatedGroup(seed=2, size=3) as group:
            leader = group.round(0)

            async def bug() -> None:
                await asyncio.sleep(0.5)
                raise KeyError("bug")

            monkeypatch.setattr(leader, "_snapshot", bug)
            async with asyncio.timeout(60):
                results = await asyncio.gather(
                    leader.run(), group.run(1), group.run(2), return_exceptions=True
                )
            assert isinstance(results[0], ExceptionGroup)
            for result in results[1:]:
                assert isinstance(result, RoundResult)
                assert "KeyError" in (result.failure or "")

    run(main)


def test_a_member_that_owns_nothing_and_never_joins_fails_the_round_for_the_others():
    """It cancelled its search when the group had just begun, or did not accept the leader's word: nobody dials it."""

    async def main() -> None:
        async with SimulatedGroup(seed=6, size=3, clients=1) as group:
            async with asyncio.timeout(60):
                results = await asyncio.gather(group.run(0), group.run(1))
            for result in results:
                assert str(group.hosts[2].peer_id) in (result.failure or "")
                assert "did not join" in (result.failure or "")

    run(main)


def test_allreduce_timeout_fails_the_round_for_all():
    async def main() -> None:
        async with SimulatedGroup(seed=3, size=2) as group:
            for member in (0, 1):
                group.network.set_bandwidth(group.name(member), group.name(1 - member), 100.0)
            results = await asyncio.gather(*(group.run(member, timeout=5.0) for member in range(2)))
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


def test_an_orphan_that_knows_the_outcome_waits_for_no_further_answer():
    async def main() -> None:
        async with SimulatedGroup(seed=4, size=3) as group:
            release = asyncio.Event()

            async def until_released() -> None:
                await release.wait()

            current = group.round(1)
            others = [group.round(member, snapshot=until_released) for member in (0, 2)]
            tasks = [asyncio.ensure_future(other.run()) for other in (current, *others)]
            await asyncio.sleep(1.0)
            # as if this member had been ready when it lost the leader, and the last member had heard of a failure
            current.core.phase = Phase.ORPHANED
            group.network.kill(group.name(0), silently=True)
            others[1].withdraw("on purpose")
            current._carry_out(AskForOutcome((0, 2)))
            began = asyncio.get_running_loop().time()
            assert (await tasks[0]).failure
            assert asyncio.get_running_loop().time() - began < 3.0  # asking the leader takes 5 s
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    run(main)


@pytest.mark.parametrize("victim", [0, 2])
def test_a_member_that_is_killed_in_the_exchange_fails_the_round_for_the_others(victim: int):
    async def main() -> None:
        async with SimulatedGroup(seed=4, size=4) as group:
            for member in range(4):
                if member != victim:
                    group.network.set_bandwidth(group.name(victim), group.name(member), 2000.0)
            tasks = [asyncio.ensure_future(group.run(member)) for member in range(4)]
            await asyncio.sleep(1.0)
            group.network.kill(group.name(victim))
            await asyncio.gather(*tasks, return_exceptions=True)
            survivors = [tasks[member].result() for member in range(4) if member != victim]
            assert all(result.failure for result in survivors)
            assert all(str(group.hosts[victim].peer_id) in (result.failure or "") for result in survivors)

    run(main)


def test_a_stranger_and_a_second_exchange_are_refused():
    async def main() -> None:
        async with SimulatedGroup(seed=5, size=2) as group:
            stranger = await make_host(group.network, "stranger", seed=5)
            from shoal.averaging.round_messages import EXCHANGE, Contribute
            from shoal.errors import RemoteError

            current = group.round(0)
            stranger.add_addresses(group.hosts[0].peer_id, group.hosts[0].announced_addresses)
            async with stranger.open_stream(group.hosts[0].peer_id, EXCHANGE, timeout=10) as stream:
                await stream.send(Contribute(PREFIX, group.group.group_id))
                with pytest.raises(RemoteError, match="no member of this group"):
                    await stream.receive()
            assert not current.core.failure
            await stranger.close()

    run(main)


async def run_with_faults(seed: int) -> set[str | None]:
    """One round in which something happens to some member at some moment; what the survivors end with."""
    rng = random.Random(seed)
    size = rng.randint(2, 6)
    async with SimulatedGroup(seed=seed, size=size) as group:
        tasks = [asyncio.ensure_future(group.run(member, timeout=60.0)) for member in range(size)]
        await asyncio.sleep(rng.uniform(0.0, 0.6))
        victim = rng.randrange(size)
        if rng.random() < 0.5:
            group.network.kill(group.name(victim))
            survivors = [member for member in range(size) if member != victim]
        else:
            other = rng.choice([member for member in range(size) if member != victim])
            group.network.drop_connections(group.name(victim), group.name(other))
            survivors = list(range(size))
        await asyncio.wait(tasks, timeout=300)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        assert all(tasks[member].done() and not tasks[member].cancelled() for member in survivors), seed
        results = [tasks[member].result() for member in survivors]
        if results[0].failure is None:
            group.check_average(survivors)
        outcomes = {"committed" if result.failure is None else "failed" for result in results}
        assert len(outcomes) == 1, (seed, [result.failure for result in results])
        return outcomes


def sweep(seeds: range) -> None:
    outcomes: set[str | None] = set()
    for seed in seeds:
        outcomes |= run(lambda seed=seed: run_with_faults(seed))  # type: ignore[misc]
    assert outcomes == {"committed", "failed"}, "the sweep must meet both outcomes, or it proves nothing"


@pytest.mark.parametrize("block", range(4))
def test_whatever_fails_the_survivors_agree(block: int):
    sweep(range(block * 25, block * 25 + 25))


@pytest.mark.soak
@pytest.mark.parametrize("block", range(20))
def test_whatever_fails_the_survivors_agree_soak(block: int):
    sweep(range(1000 + block * 100, 1100 + block * 100))


def test_a_slow_link_full_of_parts_is_not_taken_for_a_dead_member():
    async def main() -> None:
        async with SimulatedGroup(seed=3, size=2) as group:
            for member in (0, 1):  # the exchange takes 12 s, in which the other connections hear nothing
                group.network.set_bandwidth(group.name(member), group.name(1 - member), 2000.0)
            results = await asyncio.gather(*(group.run(member) for member in range(2)))
            assert [result.failure for result in results] == [None, None]

    run(main)
