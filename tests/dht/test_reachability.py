"""How nodes find out whether others can dial them: behind NATs, forwarded ports, in one LAN, and with nobody to ask."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable

import pytest

from shoal.dht.config import DHTConfig
from shoal.dht.node import DHTNode
from shoal.p2p.multiaddr import Multiaddr
from shoal.p2p.reach.dialback import DIAL_BACK
from shoal.testing.clock import run
from shoal.testing.dht import PORT, SimulatedDHT

Story = Callable[[SimulatedDHT], Awaitable[None]]


def simulate(story: Story) -> None:
    async def main() -> None:
        sim = SimulatedDHT(0)
        try:
            await story(sim)
        finally:
            await sim.close()

    run(main)


def now() -> float:
    return asyncio.get_running_loop().time()


async def until(condition: Callable[[], bool], within: float) -> None:
    async with asyncio.timeout(within):
        while not condition():  # noqa: ASYNC110 - virtual time
            await asyncio.sleep(0.1)


def everybody_knows(sim: SimulatedDHT, numbers: list[int]) -> bool:
    """Whether exactly these nodes are in everybody's table."""
    ids = {number: sim.nodes[number].peer_id for number in numbers}
    return all(
        set(node.neighbours) == {peer for number, peer in ids.items() if number != own}
        for own, node in sim.nodes.items()
    )


@pytest.mark.parametrize("refuses", [False, True])
def test_one_public_helper_finds_out_a_nat_within_two_seconds(
    refuses: bool, caplog: pytest.LogCaptureFixture
) -> None:
    async def story(sim: SimulatedDHT) -> None:
        for number in (1, 2):
            sim.network.site(f"node{number}", refuses=refuses)
        await sim.start(0)
        for number in (1, 2):
            began = now()
            node = await sim.start(number, [sim.address(0)])
            assert now() - began < 2.5  # of which the check takes less than 2
            assert node.client_mode
            assert node.host.announced_addresses == []
        await asyncio.sleep(20)
        assert not sim.nodes[0].client_mode
        assert everybody_knows(sim, [0])
        warnings = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
        assert len(warnings) == 2
        assert all("behind a NAT" in text and f"forward TCP port {PORT}" in text for text in warnings)
        assert "203.0.113.1" in warnings[0]

    simulate(story)


def test_a_port_forwarded_as_it_is_makes_a_full_peer() -> None:
    """A cloud machine with a 1:1 NAT is the same."""

    async def story(sim: SimulatedDHT) -> None:
        outer = sim.network.site("node1", forwards={PORT: ("node1", PORT)})
        await sim.start(0)
        node = await sim.start(1, [sim.address(0)])
        assert not node.client_mode
        assert str(node.host.announced_addresses[0]) == f"/ip4/{outer}/tcp/{PORT}"
        await sim.start(2, [sim.address(0)])
        await until(lambda: everybody_knows(sim, [0, 1, 2]), 10)
        sim.network.drop_connections("node2", "node1")
        await sim.nodes[2].host.connect(node.peer_id, timeout=2)

    simulate(story)


def test_a_helper_that_has_to_be_dialed_first_sees_the_outer_address_too() -> None:
    async def story(sim: SimulatedDHT) -> None:
        sim.network.site("node1", forwards={PORT: ("node1", PORT)})
        await sim.start(0)
        helper = await sim.start(2, [sim.address(0)])
        node = await sim.start(1, [sim.address(0)], DHTConfig(check_reachability=False))
        sim.network.drop_connections("node1", "node2")
        sim.network.drop_connections("node2", "node1")
        await asyncio.sleep(0)
        node.host.add_hearsay(helper.peer_id, [sim.address(2)])
        assert (await node.host.check_reachability([helper.peer_id])).reachable

    simulate(story)


def test_a_first_node_learns_its_outer_address_from_whom_comes_in() -> None:
    async def story(sim: SimulatedDHT) -> None:
        outer = sim.network.site("node0", forwards={8080: ("node0", PORT)})
        first = await sim.start(0)
        assert not first.client_mode
        address = Multiaddr("ip4", outer, 8080)
        await sim.start(1, [address])
        await until(lambda: address in first.host.announced_addresses, 2)
        assert first.host.announced_addresses[0] == address
        assert not first.client_mode

    simulate(story)


def test_lan_mates_are_full_among_themselves_and_clients_beside_a_public_peer() -> None:
    async def story(sim: SimulatedDHT) -> None:
        sim.network.site("node1", "node2")
        await sim.start(1)
        await sim.start(2, [sim.address(1)])
        await until(lambda: everybody_knows(sim, [1, 2]), 5)
        assert not sim.nodes[1].client_mode
        assert not sim.nodes[2].client_mode
        await sim.start(0)
        began = now()
        await sim.nodes[1].host.connect(sim.address(0), timeout=5)
        assert sim.nodes[1].client_mode, "in doubt at once"
        await until(lambda: "behind a NAT" in sim.nodes[1].host.reachability.reason, 4)
        assert now() - began < 4
        assert not sim.nodes[2].client_mode, "it has not met the public peer"

    simulate(story)


def test_two_of_one_lan_that_join_through_a_public_peer_are_clients() -> None:
    async def story(sim: SimulatedDHT) -> None:
        sim.network.site("node1", "node2")
        await sim.start(0)
        await sim.start(1, [sim.address(0)])
        await sim.start(2, [sim.address(0), sim.address(1)])
        await asyncio.sleep(10)
        assert [sim.nodes[number].client_mode for number in range(3)] == [False, True, True]

    simulate(story)


def test_who_gets_no_answer_relies_on_nothing_and_asks_again() -> None:
    async def story(sim: SimulatedDHT) -> None:
        first = await sim.start(0)
        handler = first.host._served.pop(DIAL_BACK.name)
        node = await sim.start(1, [sim.address(0)])
        assert node.client_mode
        assert node.host.reachability.is_in_doubt
        assert "no peer has told yet" in node.host.reachability.reason
        await asyncio.sleep(10)
        assert node.client_mode
        first.host._served[DIAL_BACK.name] = handler
        await until(lambda: not node.client_mode, 31)
        await until(lambda: everybody_knows(sim, [0, 1]), 5)

    simulate(story)


def test_a_node_that_could_not_be_dialed_in_a_round_asks_again_at_once() -> None:
    async def story(sim: SimulatedDHT) -> None:
        for number in range(3):
            await sim.start(number, [sim.address(0)] if number else [])
        await asyncio.sleep(5)
        node, listeners = sim.nodes[2], sim.network.host("node2").listeners
        listeners.clear()  # a firewall has been switched on
        node.look_again(in_doubt=True)
        assert node.client_mode
        await until(lambda: "firewall" in node.host.reachability.reason, 2)
        await until(lambda: everybody_knows(sim, [0, 1]), 5)

    simulate(story)


def test_it_is_looked_into_every_few_minutes() -> None:
    async def story(sim: SimulatedDHT) -> None:
        for number in range(3):
            await sim.start(number, [sim.address(0)] if number else [])
        node, listeners = sim.nodes[2], sim.network.host("node2").listeners
        listener = listeners.pop(PORT)
        await until(lambda: node.client_mode, 240)
        listeners[PORT] = listener
        await until(lambda: not node.client_mode, 240)

    simulate(story)


def test_a_node_that_checks_nothing_believes_what_it_announces() -> None:
    async def story(sim: SimulatedDHT) -> None:
        await sim.start(0)
        node: DHTNode = await sim.start(1, [sim.address(0)], DHTConfig(check_reachability=False))
        assert not node.client_mode
        node.look_again(in_doubt=True)
        assert not node.client_mode

    simulate(story)
