"""A group of peers on the simulated network that can run rounds of all-reduce, made from a seed."""

from __future__ import annotations

import random
from collections.abc import Awaitable, Callable, Sequence

import torch

from shoal.averaging.allreduce.round import Round, RoundResult, RoundTimeouts
from shoal.averaging.allreduce.rounds import Rounds
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
from shoal.averaging.router import Router
from shoal.compression.base import CompressionBase, NoCompression
from shoal.p2p.config import HostConfig
from shoal.p2p.host import Host
from shoal.testing.arena import make_arena, tensors_in
from shoal.testing.network import SimulatedNetwork
from shoal.testing.peers import make_host

__all__ = ["PREFIX", "SimulatedGroup", "Snapshot"]

SHAPES: tuple[tuple[int, ...], ...] = ((5000,), (), (37, 11))
PREFIX = "test"
PART_BYTES = 1024
NO_LIMITS = RoundTimeouts()

Snapshot = Callable[[], Awaitable[None]]


async def take_at_once() -> None:
    """A snapshot that lies in the arena already."""


class SimulatedGroup:
    """Hosts on one simulated network that know each other, and an arena with random tensors for each.

    The last ``clients`` members cannot be dialed, the ``auxiliaries`` before them contribute nothing. ``weights`` are
    what the members contribute with; ``bandwidths`` decide who owns how much. ``strangers`` know the leader alone.
    ``lanes``: over so many lanes long parts are striped; 0: none.
    """

    def __init__(
        self,
        seed: int,
        size: int,
        *,
        clients: int = 0,
        auxiliaries: int = 0,
        weights: Sequence[float] | None = None,
        bandwidths: Sequence[float | None] | None = None,
        min_size: int = 0,
        shapes: Sequence[tuple[int, ...]] = SHAPES,
        codec: CompressionBase | None = None,
        strangers: bool = False,
        part_bytes: int = PART_BYTES,
        network: SimulatedNetwork | None = None,
        lanes: int = 0,
    ) -> None:
        modes = [PeerMode.FULL] * (size - clients - auxiliaries)
        self.modes = [*modes, *[PeerMode.AUXILIARY] * auxiliaries, *[PeerMode.CLIENT] * clients]
        self.weights = list(weights or [1.0] * size)
        self.bandwidths = list(bandwidths or [1.0] * size)
        self.min_size = min_size
        self.rng = random.Random(seed)
        self.strangers = strangers
        self.part_bytes = part_bytes
        self.seed = seed
        self.size = size
        self.lanes = lanes
        self.network = network or SimulatedNetwork(self.rng)
        generator = torch.Generator().manual_seed(seed)
        self.tensors = [[torch.randn(shape, generator=generator) for shape in shapes] for _ in range(size)]
        self.layout = Layout.from_tensors(self.tensors[0], [codec or NoCompression()] * len(shapes))
        self.arenas = [make_arena(self.layout, tensors) for tensors in self.tensors]
        self.hosts: list[Host] = []
        self.rounds: list[Rounds] = []

    def name(self, member: int) -> str:
        """The name of a member's host in the network."""
        return f"member{member}"

    def peer(self, member: int) -> str:
        """The PeerID by which reports call a member."""
        return str(self.hosts[member].peer_id)

    async def __aenter__(self) -> SimulatedGroup:
        for member, mode in enumerate(self.modes):
            config = HostConfig(client_mode=mode is PeerMode.CLIENT, lanes_per_peer=self.lanes)
            self.hosts.append(await make_host(self.network, self.name(member), config, seed=self.seed))
        for host in self.hosts:
            for other in self.hosts:
                if other is not host and not (self.strangers and self.hosts[0] not in (host, other)):
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
        """What matchmaking would have agreed on."""
        members = tuple(
            MemberInfo(
                peer_id=host.peer_id.to_bytes(),
                leader=self.hosts[0].peer_id.to_bytes(),
                key="test.0b",
                schema_hash=bytes(SCHEMA_HASH_BYTES),
                mode=mode,
                bandwidth=bandwidth,
                addresses=("no address", *map(str, host.announced_addresses)),
                gather=b"",
                start_time=0.0,
                signed_at=0.0,
                nonce=bytes(NONCE_BYTES),
            )
            for host, mode, bandwidth in zip(self.hosts, self.modes, self.bandwidths, strict=True)
        )
        return GroupInfo(group_id, "test.0b", members)

    def partition(self) -> Partition:
        """The vector divided as every member divides it."""
        owned = load_balance_peers(
            self.layout.data_nbytes,
            self.bandwidths,
            self.min_size,
            can_own=[mode is not PeerMode.CLIENT for mode in self.modes],
            contributes=[mode is not PeerMode.AUXILIARY for mode in self.modes],
        )
        return Partition.create(self.layout, owned, self.part_bytes)

    def round(
        self, member: int, *, snapshot: Snapshot = take_at_once, timeouts: RoundTimeouts = NO_LIMITS
    ) -> Round:
        """A member's round, which streams of the others find from now on."""
        made = Round(
            self.hosts[member],
            PREFIX,
            self.group,
            self.partition(),
            self.arenas[member],
            take_snapshot=snapshot,
            weight=lambda: self.weights[member],
            timeouts=timeouts,
        )
        self.rounds[member].begin(made)
        return made

    async def run_round(self, member: int, current: Round) -> RoundResult:
        """Run what :meth:`round` returned, to its end."""
        try:
            return await current.run()
        finally:
            self.rounds[member].end(current)

    async def run(
        self, member: int, *, snapshot: Snapshot = take_at_once, timeouts: RoundTimeouts = NO_LIMITS
    ) -> RoundResult:
        """One round of one member."""
        return await self.run_round(member, self.round(member, snapshot=snapshot, timeouts=timeouts))

    def results(self, member: int) -> list[torch.Tensor]:
        """Where a member's averages lie."""
        return tensors_in(self.layout, self.arenas[member].average)

    def averages(self, weights: Sequence[float]) -> list[torch.Tensor]:
        """The exact averages of the members' tensors, flat, in float64."""
        column = torch.tensor(weights, dtype=torch.float64).view(-1, 1)
        inputs = [
            torch.stack([tensor.double().reshape(-1) for tensor in versions])
            for versions in zip(*self.tensors, strict=True)
        ]
        return [(stack * column).sum(0) / sum(weights) for stack in inputs]

    def check_average(self, members: Sequence[int], weights: Sequence[float] | None = None) -> None:
        """These members hold the exact average, bit for bit equal; ``weights`` of all members: by default their own."""
        if weights is None:
            weights = [
                0.0 if mode is PeerMode.AUXILIARY else weight
                for mode, weight in zip(self.modes, self.weights, strict=True)
            ]
        for index, reference in enumerate(self.averages(weights)):
            size = (
                torch.stack([tensors[index].double().reshape(-1) for tensors in self.tensors]).abs().mean(0)
            )
            for member in members:
                result = self.results(member)[index]
                assert bool(((result.double() - reference).abs() <= 1e-6 * size).all()), (member, index)
                assert torch.equal(result, self.results(members[0])[index]), (member, index)
