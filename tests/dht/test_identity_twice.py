"""Two running peers with one identity: one of them stops, and third peers notice nothing."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Awaitable, Callable

import pytest

from shoal.dht.config import DHTConfig
from shoal.dht.node import DHTNode
from shoal.errors import IdentityInUse
from shoal.p2p.config import HostConfig
from shoal.p2p.host import Host
from shoal.p2p.lease import make_sure
from shoal.p2p.protocol import wire
from shoal.p2p.protocol.claims import RECOVERING, SILENCE, Claim, sign_claim
from shoal.testing.clock import run
from shoal.testing.dht import SimulatedDHT

Story = Callable[[SimulatedDHT], Awaitable[None]]
FIRST, OLDER, COPY = 0, 1, 2
"""The numbers of nodes: an honest third peer, and two that have one key."""


def simulate(story: Story, seed: int = 0) -> None:
    async def main() -> None:
        sim = SimulatedDHT(seed)
        sim.share_identity(OLDER, COPY)
        try:
            await story(sim)
        finally:
            await sim.close()

    run(main)


def now() -> float:
    return asyncio.get_running_loop().time()


async def works(sim: SimulatedDHT, *numbers: int) -> None:
    """These nodes store and get through each other."""
    for number in numbers:
        key = f"of {number} at {now()}"
        assert await sim.nodes[number].store(key, number, sim.now() + 60)
        for other in numbers:
            assert (await sim.nodes[other].get(key) or ("lost",))[0] == number


@pytest.mark.parametrize("client_mode", [False, True])
def test_a_newcomer_is_refused_by_whoever_knows_the_older_one(client_mode: bool) -> None:
    async def story(sim: SimulatedDHT) -> None:
        await sim.start(FIRST)
        await sim.start(OLDER, [sim.address(FIRST)], DHTConfig(client_mode=client_mode))
        await asyncio.sleep(0.2)
        began = now()
        with pytest.raises(IdentityInUse) as caught:
            await sim.start(COPY, [sim.address(FIRST)])
        assert now() - began < 1
        older = sim.address(OLDER, with_peer_id=False)
        assert caught.value.address == (f"{older.host} (it is a client there)" if client_mode else str(older))
        assert str(sim.identity(OLDER).peer_id) in str(caught.value)
        await works(sim, FIRST, OLDER)

    simulate(story)


def test_a_newcomer_is_refused_by_the_older_one_itself() -> None:
    """Its initial peer is the older one, at an address with the PeerID of both, or without."""

    async def story(sim: SimulatedDHT) -> None:
        await sim.start(OLDER)
        await sim.start(FIRST, [sim.address(OLDER)])
        with pytest.raises(IdentityInUse):
            await sim.start(COPY, [sim.address(OLDER, with_peer_id=False)])
        host = sim.make_host(COPY)
        with pytest.raises(IdentityInUse):
            await make_sure(host, None, [sim.address(OLDER)])
        await host.close()
        await works(sim, FIRST, OLDER)

    simulate(story)


def test_an_older_one_that_starts_later_is_found_at_ones_own_address() -> None:
    """The copy begins alone, because nobody answers yet at the address with its PeerID."""

    async def story(sim: SimulatedDHT) -> None:
        await sim.start(COPY, [sim.address(OLDER)])
        late = await sim.start(OLDER)
        await asyncio.sleep(60)
        assert (late.host.tenancy.rival is None) != (sim.nodes[COPY].host.tenancy.rival is None)

    simulate(story)


def test_a_newcomer_hears_where_its_identity_has_been() -> None:
    """The third peer has no connection to the older one, so that it cannot ask that one itself."""

    async def story(sim: SimulatedDHT) -> None:
        first = await sim.start(FIRST)
        older = await sim.start(OLDER, [sim.address(FIRST)])
        for node in (first, older):
            node._neighbours.stop()  # so that they do not connect again at once
        sim.network.drop_connections("node0", "node1")
        with pytest.raises(IdentityInUse):
            await sim.start(COPY, [sim.address(FIRST)])
        await asyncio.sleep(30)
        await works(sim, FIRST, OLDER)

    simulate(story)


@pytest.mark.parametrize("seed", range(4))
def test_of_two_that_start_at_once_exactly_one_wins(seed: int) -> None:
    async def story(sim: SimulatedDHT) -> None:
        await sim.start(FIRST)
        starts = (sim.start(number, [sim.address(FIRST)]) for number in (OLDER, COPY))
        outcomes = await asyncio.gather(*starts, return_exceptions=True)
        await asyncio.sleep(30)
        assert all(isinstance(outcome, DHTNode | IdentityInUse) for outcome in outcomes)
        running = [number for number in (OLDER, COPY) if number in sim.nodes]
        (winner,) = [number for number in running if sim.nodes[number].host.tenancy.rival is None]
        await works(sim, FIRST, winner)

    simulate(story, seed)


def test_a_newcomer_takes_over_from_one_that_does_not_answer() -> None:
    """When that one is back, it is told, and stops."""

    async def story(sim: SimulatedDHT) -> None:
        await sim.start(FIRST)
        older = await sim.start(OLDER, [sim.address(FIRST)])
        await asyncio.sleep(20)
        told: list[IdentityInUse] = []
        older.host.tenancy.on_lost.append(told.append)
        sim.network.partition(["node0", "node2"], ["node1"])
        began = now()
        await sim.start(COPY, [sim.address(FIRST)])
        assert now() - began < SILENCE + 3
        await works(sim, FIRST, COPY)
        await asyncio.sleep(60)
        older.host.tenancy._alive_at = (now() - 60, sim.now() - 60)  # it was suspended, not only cut off
        sim.network.heal()
        await asyncio.sleep(60)
        assert [error.address for error in told] == [str(sim.address(COPY, with_peer_id=False))]
        with pytest.raises(IdentityInUse):
            await older.store("key", 1, sim.now() + 60)
        assert sim.nodes[COPY].host.tenancy.rival is None
        await works(sim, FIRST, COPY)

    simulate(story)


def test_a_restart_after_a_crash_works_at_once() -> None:
    async def story(sim: SimulatedDHT) -> None:
        await sim.start(FIRST)
        await sim.start(OLDER, [sim.address(FIRST)])
        await asyncio.sleep(20)
        await sim.kill(OLDER)
        sim.network.revive("node1")
        began = now()
        await sim.start(OLDER, [sim.address(FIRST)])
        assert now() - began < 0.6
        await works(sim, FIRST, OLDER)
        await sim.stop(OLDER)
        await sim.start(COPY, [sim.address(FIRST)])  # on another machine, after an end in order
        assert now() - began < 1.2
        await works(sim, FIRST, COPY)

    simulate(story)


def test_a_lie_stops_nobody() -> None:
    """A refusal counts only with what the other holder has signed for just this peer."""

    async def story(sim: SimulatedDHT) -> None:
        node = await sim.start(OLDER)
        tenancy, claim = node.host.tenancy, Claim(5, 1e6)
        own = sign_claim(sim.identity(OLDER), tenancy.claim(), tenancy.incarnation)
        lies = [
            b"",
            b"\xc1",
            wire.encode(sign_claim(sim.identity(FIRST), claim, tenancy.incarnation)),
            wire.encode(sign_claim(sim.identity(OLDER), claim, 77)),
            wire.encode(sign_claim(sim.identity(OLDER), Claim(5, -1.0), tenancy.incarnation)),
            wire.encode(own),
        ]
        for lie in lies:
            tenancy.hear_refusal("nowhere", lie)
            assert tenancy.rival is None
        tenancy.hear_refusal(
            "there", wire.encode(sign_claim(sim.identity(OLDER), claim, tenancy.incarnation))
        )
        assert tenancy.rival is not None

    simulate(story)


def test_a_machine_that_slept_has_lost_its_tenure() -> None:
    async def story(sim: SimulatedDHT) -> None:
        node = await sim.start(OLDER)
        await asyncio.sleep(100)
        assert node.host.tenancy.claim().tenure == pytest.approx(100)
        sim.clock_offset += 3600  # the loop's clock stands still while a machine sleeps
        assert node.host.tenancy.claim().tenure == RECOVERING
        await asyncio.sleep(SILENCE + 2)
        assert node.host.tenancy.claim().tenure == pytest.approx(2)

    simulate(story)


def test_third_peers_never_speak_with_two_holders() -> None:
    """A copy that dials a third peer again and again: calls go to the older one, and all are answered."""

    async def story(sim: SimulatedDHT) -> None:
        first = await sim.start(FIRST)
        older = await sim.start(OLDER, [sim.address(FIRST)])
        copies: list[Host] = []
        for number in range(20):
            copy = sim.make_host(COPY, HostConfig(client_mode=True))
            copies.append(copy)
            await copy.start()
            with pytest.raises(Exception, match=str(sim.address(OLDER, with_peer_id=False))):
                await copy.connect(sim.address(FIRST), timeout=3)
            assert copy.tenancy.rival is not None
            assert await older.store(f"key {number}", number, sim.now() + 60)
            assert (await first.get(f"key {number}", latest=True) or (None,))[0] == number
        assert older.host.tenancy.rival is None
        for copy in copies:
            await copy.close()

    simulate(story, seed=random.Random(4).randrange(100))
