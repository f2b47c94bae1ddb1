"""DHT nodes on a simulated network, made from one seed: addresses, keys, delays and choices are all drawn from it."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Sequence

from shoal.dht.config import DHTConfig
from shoal.dht.node import DHTNode
from shoal.dht.validation import RecordValidatorBase
from shoal.p2p.config import HostConfig
from shoal.p2p.host import Host
from shoal.p2p.identity import Identity
from shoal.p2p.multiaddr import Multiaddr
from shoal.testing.network import SimulatedNetwork
from shoal.utils.timed import DHTClock

PORT = 4000
EVERYWHERE = Multiaddr("ip4", "0.0.0.0", PORT)  # noqa: S104
EPOCH = 1_700_000_000.0
"""What right wall clocks show when the simulation starts."""


class SimulatedDHT:
    """Makes nodes; node ``number`` lives on the machine ``node<number>`` and listens on :data:`PORT`."""

    def __init__(self, seed: int, *, latency: tuple[float, float] = (0.005, 0.05)) -> None:
        self.rng = random.Random(seed)
        self.network = SimulatedNetwork(random.Random(self.rng.getrandbits(64)), latency=latency)
        self.nodes: dict[int, DHTNode] = {}
        self.clock_offset = 0.0
        """Seconds for which all machines have slept: the event loop's time does not show them."""
        self.clock_errors: dict[int, float] = {}
        """By how many seconds the wall clocks of nodes that are made later are ahead."""
        self.clocks: dict[int, DHTClock] = {}
        self.listen_everywhere = False
        """Whether nodes that are made later listen on all interfaces, as a machine does whose address may change."""
        self._identities: dict[int, Identity] = {}
        self._seed = seed

    def now(self) -> float:
        """What right wall clocks show."""
        return EPOCH + self._steady()

    def clock(self, number: int) -> DHTClock:
        """The DHT time of a node, which keeps it if it is made again."""
        if number not in self.clocks:
            self.clocks[number] = DHTClock(EPOCH + self.clock_errors.get(number, 0.0), self._steady)
        return self.clocks[number]

    def _steady(self) -> float:
        return asyncio.get_running_loop().time() + self.clock_offset

    def identity(self, number: int) -> Identity:
        """The key of a node, which it keeps if it is made again."""
        if number not in self._identities:
            self._identities[number] = Identity.generate(
                random.Random(f"{self._seed}/{number}").randbytes(32)
            )
        return self._identities[number]

    def address(self, number: int, *, with_peer_id: bool = True) -> Multiaddr:
        """Where a node listens, also before it was made."""
        address = self.network.host(f"node{number}").address(PORT)
        return address.with_peer_id(self.identity(number).peer_id) if with_peer_id else address

    def share_identity(self, number: int, copy: int) -> None:
        """The key file of node ``number`` is copied to the machine of node ``copy``."""
        self._identities[copy] = self.identity(number)

    def make_host(self, number: int, config: HostConfig = HostConfig()) -> Host:
        """The host of a node, not started."""
        return Host(
            self.identity(number),
            self.network.host(f"node{number}"),
            config,
            clock=self.clock(number),
            rng=random.Random(self.rng.getrandbits(64)),
        )

    async def start_host(self, number: int, *, client_mode: bool = False) -> Host:
        """The host of a node, listening unless it is in client mode."""
        host = self.make_host(number, HostConfig(client_mode=client_mode))
        address = EVERYWHERE if self.listen_everywhere else self.address(number, with_peer_id=False)
        await host.start([] if client_mode else [address])
        return host

    async def start(
        self,
        number: int,
        initial_peers: Sequence[Multiaddr] = (),
        config: DHTConfig = DHTConfig(),
        *,
        validators: Sequence[RecordValidatorBase] = (),
    ) -> DHTNode:
        """Make a node with its host; both are ended by :meth:`stop` or :meth:`close`."""
        host = await self.start_host(number, client_mode=config.client_mode)
        try:
            node = await DHTNode.create(
                host,
                config,
                initial_peers=initial_peers,
                validators=validators,
                clock=self.clock(number),
                rng=random.Random(self.rng.getrandbits(64)),
            )
        except BaseException:
            await host.close()
            raise
        self.nodes[number] = node
        return node

    async def start_many(self, count: int, config: DHTConfig = DHTConfig()) -> list[DHTNode]:
        """A DHT of ``count`` nodes, all of which know each other if a k-bucket holds that many."""
        first = await self.start(0, (), config)
        others = (self.start(number, [self.address(0)], config) for number in range(1, count))
        nodes = [first, *await asyncio.gather(*others)]
        wanted = min(count - 1, config.bucket_size)
        async with asyncio.timeout(120):
            while any(len(node.neighbours) < wanted for node in nodes):  # noqa: ASYNC110 - virtual time
                await asyncio.sleep(0.5)
        return nodes

    async def stop(self, number: int) -> None:
        """End a node in order."""
        node = self.nodes.pop(number)
        await node.shutdown()
        await node.host.close()

    async def kill(self, number: int, *, silently: bool = False) -> None:
        """The machine is gone: its connections break, or, silently, just carry nothing any more."""
        self.network.kill(f"node{number}", silently=silently)
        await self.stop(number)

    async def close(self) -> None:
        """End all nodes."""
        for number in list(self.nodes):
            await self.stop(number)
