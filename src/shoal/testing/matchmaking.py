"""Matchmakers on a simulated DHT: whole peers from host to matchmaker, all of whose choices come from one seed."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Sequence

from shoal.averaging.agreement import Agreement
from shoal.averaging.group import SCHEMA_HASH_BYTES, GroupInfo, PeerMode
from shoal.averaging.matchmaking.matchmaker import Matchmaker
from shoal.averaging.matchmaking_config import MatchmakingConfig
from shoal.averaging.router import Router
from shoal.dht.config import DHTConfig
from shoal.errors import MatchmakingException
from shoal.testing.dht import SimulatedDHT

__all__ = ["SimulatedMatchmaking"]

PREFIX = "swarm"
SCHEMA = b"schema".ljust(SCHEMA_HASH_BYTES, b".")


class SimulatedMatchmaking:
    """Makes matchmakers; that of peer ``number`` lives on the machine ``node<number>``.

    Peers in client mode are so in the DHT too, except for peer 0, which the others need to find it.
    """

    def __init__(
        self, seed: int, config: MatchmakingConfig, *, latency: tuple[float, float] = (0.001, 0.1)
    ) -> None:
        self.config = config
        self.dht = SimulatedDHT(seed, latency=latency)
        self.network = self.dht.network
        self.matchmakers: dict[int, Matchmaker] = {}
        self.searches: dict[int, asyncio.Task[GroupInfo | MatchmakingException]] = {}

    def now(self) -> float:
        return self.dht.now()

    async def start(self, modes: Sequence[PeerMode], *, schema: bytes = SCHEMA) -> None:
        """Start peers 0, 1, ... with these modes."""
        for number, mode in enumerate(modes):
            await self.start_one(number, mode, schema=schema)

    async def start_one(
        self,
        number: int,
        mode: PeerMode = PeerMode.FULL,
        *,
        schema: bytes = SCHEMA,
        agreement: Agreement | None = None,
    ) -> Matchmaker:
        """Start one peer, joining the DHT by peer 0."""
        client = mode is PeerMode.CLIENT and number != 0
        dht_config = DHTConfig(client_mode=client, check_reachability=False)
        node = await self.dht.start(number, [self.dht.address(0)] if number else [], dht_config)
        matchmaker = self.matchmakers[number] = Matchmaker(
            node,
            Router.of(node.host),
            prefix=PREFIX,
            schema_hash=schema,
            config=self.config,
            mode=mode,
            agreement=agreement,
            clock=self.dht.clock(number),
            rng=random.Random(self.dht.rng.getrandbits(64)),
        )
        return matchmaker

    def search(
        self,
        number: int,
        *,
        starts_in: float | None = None,
        timeout: float | None = 60.0,
        gather: bytes = b"",
        bits: str | None = None,
    ) -> asyncio.Task[GroupInfo | MatchmakingException]:
        """Let a peer search; the task's result is the group, or the error of a search that failed."""
        now = self.dht.clock(number)()
        starts_in = self.config.min_matchmaking_time if starts_in is None else starts_in
        deadline = None if timeout is None else now + timeout
        matchmaker = self.matchmakers[number]

        if bits is not None:
            matchmaker.set_bits(bits)

        async def find() -> GroupInfo | MatchmakingException:
            try:
                return await matchmaker.find_group(
                    start_time=now + starts_in, deadline=deadline, gather=gather
                )
            except MatchmakingException as error:
                return error

        task = self.searches[number] = asyncio.get_running_loop().create_task(find(), name=f"search {number}")
        return task

    async def kill(self, number: int, *, silently: bool = False) -> None:
        """The machine of a peer is gone, in the middle of whatever it was doing."""
        self.network.kill(f"node{number}", silently=silently)
        search = self.searches.pop(number, None)
        if search is not None:
            search.cancel()
            await asyncio.wait([search])
        await self.matchmakers.pop(number).close()
        await self.dht.stop(number)

    async def close(self) -> None:
        """End all searches and peers."""
        for search in self.searches.values():
            search.cancel()
        if self.searches:
            await asyncio.wait(list(self.searches.values()))
        await asyncio.gather(*(matchmaker.close() for matchmaker in self.matchmakers.values()))
        await self.dht.close()
