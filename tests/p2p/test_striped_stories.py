"""Stories of two hosts that stripe payloads to each other while connections, senders and hosts end at any moment.

What is taken is right, whatever happens; everybody comes to an end; and nothing is left over.
"""

from __future__ import annotations

import asyncio
import random

import pytest
from tests.p2p.test_host import Number, Swarm

from shoal.errors import ShoalError
from shoal.p2p.config import HostConfig
from shoal.p2p.host import Host
from shoal.p2p.rpc import Lane, Payload, Stream
from shoal.testing.clock import run
from shoal.testing.conformance.world import STREAM

SIZE = 300_000
COUNT = 8


class Story:
    """One of them."""

    def __init__(self, seed: int) -> None:
        self.rng = random.Random(f"striped story {seed}")
        self.taken = 0
        self.closed: list[Host] = []

    def content(self, tag: int) -> bytes:
        return random.Random(tag).randbytes(SIZE - tag % 5 * 70_000)

    async def serve(self, stream: Stream) -> None:
        """Take payloads and send them back."""
        memory = [bytearray(SIZE) for _ in range(COUNT)]
        stream.accept_payloads(lambda tag, n: memoryview(memory[tag % COUNT])[:n], 3 * SIZE)
        await stream.send(Number(0))
        async for item in stream:
            assert isinstance(item, Payload)
            assert item.data == self.content(item.tag)
            self.taken += 1
            await stream.send_payload(item.tag, bytes(item.data))

    async def send(self, sender: Host, receiver: Host, first: int) -> None:
        """Send payloads, take what comes back, and overwrite what was sent once the stream was left."""
        await asyncio.sleep(self.rng.uniform(0.0, 1.0))
        memory = [bytearray(self.content(first + index)) for index in range(COUNT)]
        async with sender.open_stream(receiver.peer_id, STREAM, timeout=60, lane=Lane.BULK) as stream:
            stream.accept_payloads(None, 3 * SIZE)
            await stream.receive()
            await asyncio.sleep(self.rng.uniform(0.0, 0.5))

            async def push() -> None:
                for index, data in enumerate(memory):
                    await stream.send_payload(first + index, data)
                await stream.finish()

            pushing = asyncio.ensure_future(push())
            try:
                for index in range(COUNT):
                    item = await stream.receive()
                    assert (item.tag, item.data) == (first + index, self.content(first + index))
                    self.taken += 1
                await pushing
            finally:
                pushing.cancel()
                await asyncio.gather(pushing, return_exceptions=True)
        for data in memory:
            data[:] = bytes(len(data))

    async def disturb(self, swarm: Swarm, tasks: list[asyncio.Task[None]]) -> None:
        rng = self.rng
        for _ in range(rng.randint(2, 12)):
            await asyncio.sleep(rng.uniform(0.0, 0.8))
            host = rng.choice(swarm.hosts)
            connections = list(host._connections._connections)
            stripes = [one for one in connections if one.lane is Lane.STRIPE]
            what = rng.random()
            if what < 0.4 and stripes:
                rng.choice(stripes).abort("cut")
            elif what < 0.5:
                for one in stripes:
                    one.abort("cut")
            elif what < 0.55 and connections:
                rng.choice(connections).close("closed")
            elif what < 0.65:
                rng.choice(tasks).cancel()
            elif what < 0.85:
                swarm.network.hold("a", "b", rng.uniform(0.1, 4.0), one_way=rng.random() < 0.5)
            elif what < 0.88 and not self.closed:
                self.closed.append(host)
                await host.close()

    async def tell(self) -> None:
        rng = self.rng
        async with Swarm(latency=(0.001, 0.05)) as swarm:
            server = await swarm.host(
                "a", HostConfig(lanes_per_peer=rng.randint(2, 5), bulk_lanes=rng.randint(1, 2))
            )
            is_client = rng.random() < 0.5
            other = await swarm.host("b", HostConfig(lanes_per_peer=rng.randint(2, 5), client_mode=is_client))
            await other.connect(server.listen_addresses[0], timeout=10)
            for host in swarm.hosts:
                host.serve_stream(STREAM, self.serve)
                swarm.network.set_link("a", rng.choice([1e6, 4e6]))
            tasks = [
                asyncio.ensure_future(self.send(one, two, 1000 * number))
                for number, (one, two) in enumerate([(server, other), (other, server)] * 2)
            ]
            await self.disturb(swarm, tasks)
            async with asyncio.timeout(150):
                ends = await asyncio.gather(*tasks, return_exceptions=True)
            for end in ends:
                assert end is None or isinstance(end, ShoalError | EOFError | asyncio.CancelledError), end
            await asyncio.sleep(65.0)
            for host in swarm.hosts:
                opener = host._connections._stripes
                assert not opener.dials
                assert not any(bundle.is_busy for bundle in opener._bundles)
                assert all(bundle._scheduler.is_idle for bundle in opener._bundles)
                for peer in host._connections._peers.values():
                    assert peer.opening == 0


def tell(seed: int) -> int:
    story = Story(seed)
    run(story.tell)
    return story.taken


@pytest.mark.parametrize("seed", range(3))
def test_a_story(seed: int):
    assert tell(seed) > 0


@pytest.mark.sweep
@pytest.mark.parametrize("block", range(4))
def test_more_stories(block: int):
    assert sum(tell(100 + 25 * block + number) for number in range(25)) > 0
