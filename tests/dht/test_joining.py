"""How nodes find each other, lose each other, and find each other again."""

from __future__ import annotations

import asyncio
import itertools
import logging
import random
from collections.abc import Awaitable, Callable
from dataclasses import replace
from typing import Any

import pytest

from shoal.dht.config import DHTConfig
from shoal.dht.node import DHTNode
from shoal.errors import BootstrapError
from shoal.p2p.config import HostConfig
from shoal.p2p.host import Host
from shoal.p2p.identity import PeerID
from shoal.p2p.multiaddr import Multiaddr
from shoal.p2p.reach.reachability import Findings
from shoal.testing.clock import run
from shoal.testing.dht import PORT, SimulatedDHT

Story = Callable[[SimulatedDHT], Awaitable[None]]


def simulate(story: Story, seed: int = 0) -> None:
    async def main() -> None:
        sim = SimulatedDHT(seed)
        try:
            await story(sim)
        finally:
            await sim.close()

    run(main)


def now() -> float:
    return asyncio.get_running_loop().time()


def all_know_each_other(sim: SimulatedDHT) -> bool:
    return all(len(node.neighbours) == len(sim.nodes) - 1 for node in sim.nodes.values())


async def until(condition: Callable[[], bool], within: float) -> None:
    async with asyncio.timeout(within):
        while not condition():  # noqa: ASYNC110 - virtual time
            await asyncio.sleep(0.1)


# ---- initial peers


def test_bootstrap_error_lists_each_address_and_why() -> None:
    async def story(sim: SimulatedDHT) -> None:
        host = await sim.start_host(1)  # a peer that is no node of a DHT
        await sim.start(2)
        sim.network.silence("node5", "node3")
        addresses = {
            str(sim.address(4)): "refused",
            str(sim.address(3)): "timed out",
            str(sim.address(1)): "does not answer as a node",
            str(sim.address(2, with_peer_id=False).with_peer_id(sim.identity(9).peer_id)): "was expected",
        }
        began = now()
        with pytest.raises(BootstrapError, match="no initial peer answered within 15 s") as caught:
            await sim.start(5, [Multiaddr.parse(address) for address in addresses])
        assert now() - began == pytest.approx(15, abs=0.5)
        assert list(caught.value.failures) == list(addresses)
        for address, reason in addresses.items():
            assert address in str(caught.value)
            assert any(part in caught.value.failures[address] for part in reason.split("|")), (
                caught.value.failures
            )
        await host.close()

    simulate(story)


def test_initial_peers_are_retried_until_they_are_up() -> None:
    async def story(sim: SimulatedDHT) -> None:
        joining = asyncio.ensure_future(sim.start(1, [sim.address(0)]))
        await asyncio.sleep(9)
        await sim.start(0)
        await joining
        assert now() < 12.5
        await until(lambda: all_know_each_other(sim), 5)

    simulate(story)


def test_without_ensure_bootstrap_success_the_search_goes_on_in_the_background(
    caplog: pytest.LogCaptureFixture,
) -> None:
    async def story(sim: SimulatedDHT) -> None:
        config = DHTConfig(bootstrap_timeout=3, ensure_bootstrap_success=False)
        alone = await sim.start(1, [sim.address(0)], config)
        assert now() == pytest.approx(3, abs=0.1)
        assert "no initial peer answered within 3 s" in caplog.text
        assert await alone.store("key", "kept alone", sim.now() + 1000)
        await asyncio.sleep(200)
        first = await sim.start(0)
        await until(lambda: all_know_each_other(sim), 30)
        await asyncio.sleep(3)
        assert first.num_records == 1  # handed over
        assert (await first.get("key") or ("",))[0] == "kept alone"

    simulate(story)


@pytest.mark.parametrize("with_peer_id", [True, False])
def test_ones_own_address_among_the_initial_peers(with_peer_id: bool) -> None:
    async def story(sim: SimulatedDHT) -> None:
        own = sim.address(0, with_peer_id=with_peer_id)
        await sim.start(0, [own])
        assert now() == 0.0
        await sim.start(1, [own, sim.address(1, with_peer_id=with_peer_id)])
        await until(lambda: all_know_each_other(sim), 5)

    simulate(story)


def test_one_of_the_initial_peers_starts_though_the_others_are_down() -> None:
    async def story(sim: SimulatedDHT) -> None:
        initial = [sim.address(0), sim.address(1)]
        await sim.start(0, initial)
        assert now() < 1
        await asyncio.sleep(100)
        await sim.start(1, initial)
        await until(lambda: all_know_each_other(sim), 5)

    simulate(story)


def test_an_own_address_that_only_dialing_reveals() -> None:
    """Announced behind a port forwarding: neither a listening nor an announced address of the node."""

    async def story(sim: SimulatedDHT) -> None:
        loopback = Multiaddr.parse("/ip4/127.0.0.1/tcp/4000")
        await sim.start(0, [loopback])
        assert now() < 1

    simulate(story)


def test_two_dhts_with_the_same_initial_peers_become_one() -> None:
    """Both initial peers start alone; whoever is given both joins them."""

    async def story(sim: SimulatedDHT) -> None:
        for number in (0, 1):
            await sim.start(number)
            for member in (2, 3):
                await sim.start(10 * number + member, [sim.address(number)])
        await asyncio.sleep(30)
        assert len(sim.nodes[0].neighbours) == 2
        sim.network.kill("node1")  # the second is not up when the link starts
        link = asyncio.ensure_future(sim.start(5, [sim.address(0), sim.address(1)]))
        await link
        sim.network.revive("node1")
        await sim.stop(1)
        await sim.start(1)
        await until(lambda: all_know_each_other(sim), 75)
        assert await sim.nodes[2].store("key", 1, sim.now() + 100)
        assert await sim.nodes[13].get("key") == (1, pytest.approx(sim.now() + 100, abs=5))

    simulate(story)


# ---- being reached


async def start_behind_nat(sim: SimulatedDHT, number: int, initial: list[Multiaddr]) -> DHTNode:
    """A node that announces an address at which nobody gets through."""
    wrong = sim.address(number, with_peer_id=False).with_port(9)
    host = Host(
        sim.identity(number),
        sim.network.host(f"node{number}"),
        HostConfig(announce=[wrong]),
        clock=sim.clock(1),
        rng=random.Random(1),
    )
    await host.start([sim.address(number, with_peer_id=False)])
    node = await DHTNode.create(host, initial_peers=initial, clock=sim.clock(1), rng=random.Random(2))
    sim.nodes[number] = node
    return node


def test_who_cannot_be_reached_becomes_a_client(caplog: pytest.LogCaptureFixture) -> None:
    async def story(sim: SimulatedDHT) -> None:
        await sim.start_many(3)
        hidden = await start_behind_nat(sim, 3, [sim.address(0)])
        assert hidden.client_mode
        assert caplog.text.count("other peers cannot connect back") == 1
        assert await hidden.store("key", 1, sim.now() + 100)
        assert await sim.nodes[1].get("key", latest=True)
        await asyncio.sleep(30)
        assert len(hidden.neighbours) == 3
        for number in range(3):
            assert hidden.peer_id not in sim.nodes[number].neighbours

    with caplog.at_level(logging.WARNING, "shoal"):
        simulate(story)


def test_a_reachable_node_asks_two_peers(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []
    original = Host.check_reachability

    async def check(self: Host, helpers: list[object], **options: object) -> object:
        asked.append(len(helpers))
        result = await original(self, helpers, **options)
        assert result.reachable
        return result

    async def story(sim: SimulatedDHT) -> None:
        await sim.start_many(3)
        asked.clear()
        node = await sim.start(3, [sim.address(0)])
        assert asked == [2]
        assert not node.client_mode

    monkeypatch.setattr(Host, "check_reachability", check)
    simulate(story)


def watch_checks(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, float]]:
    """Who checked when, from now on."""
    checks: list[tuple[str, float]] = []
    original = Host.check_reachability

    async def check(self: Host, helpers: list[PeerID], **options: Any) -> Findings:
        checks.append((str(self.peer_id), now()))
        return await original(self, helpers, **options)

    monkeypatch.setattr(Host, "check_reachability", check)
    return checks


def warnings_of(caplog: pytest.LogCaptureFixture) -> list[str]:
    messages = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    return [text for text in messages if "connect back" in text]


def test_a_node_that_can_be_dialed_later_becomes_one_like_the_others(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "shoal")

    async def story(sim: SimulatedDHT) -> None:
        await sim.start_many(3)
        host, ports = await sim.start_host(3), sim.network.host("node3").listeners
        listener = ports.pop(PORT)  # it listens, but a firewall lets nobody through
        node = sim.nodes[3] = await DHTNode.create(
            host, initial_peers=[sim.address(0)], clock=sim.clock(1), rng=random.Random(3)
        )
        checks = watch_checks(monkeypatch)
        began = now()
        await asyncio.sleep(1500)
        assert node.client_mode
        assert len(warnings_of(caplog)) == 1
        times = [when for who, when in checks if who == str(node.peer_id)]
        assert all(130 < later - earlier < 235 for earlier, later in itertools.pairwise([began, *times]))
        assert len(times) >= 6
        ports[PORT] = listener
        await until(lambda: not node.client_mode, 240)
        await until(lambda: all_know_each_other(sim), 5)
        assert host.announced_addresses == host.listen_addresses
        assert len(warnings_of(caplog)) == 1
        assert "client no longer" in caplog.text
        # Whoever has lost the connection can dial it, and it keeps records.
        for number in range(3):
            sim.network.drop_connections(f"node{number}", "node3")
        assert await sim.nodes[1].store("key", 1, sim.now() + 60)
        assert node.num_records == 1

    simulate(story)


def test_the_first_node_is_checked_when_the_first_peer_comes(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    async def story(sim: SimulatedDHT) -> None:
        checks = watch_checks(monkeypatch)
        first = await sim.start(0)
        await sim.start(1, [sim.address(0)])
        await until(lambda: str(first.peer_id) in dict(checks), 1)
        for number in range(2, 6):
            await sim.start(number, [sim.address(0)])
        await asyncio.sleep(100)
        assert [who for who, _ in checks].count(str(first.peer_id)) == 1
        assert not first.client_mode
        assert not warnings_of(caplog)

    simulate(story)


def test_a_first_node_that_nobody_can_dial_says_so_once_and_still_answers(
    caplog: pytest.LogCaptureFixture,
) -> None:
    async def story(sim: SimulatedDHT) -> None:
        first = await sim.start(0)
        for number in (1, 2):
            await sim.start(number, [sim.address(0)])
        ports = sim.network.host("node0").listeners
        listener = ports.pop(PORT)
        await until(lambda: first.client_mode, 240)
        await asyncio.sleep(1500)
        assert len(warnings_of(caplog)) == 1
        assert first.host.announced_addresses == []
        assert await sim.nodes[1].store("key", 1, sim.now() + 60)
        assert first.num_records == 0
        assert await first.get("key") == (1, pytest.approx(sim.now() + 60, abs=5))
        ports[PORT] = listener  # who knows the way in may join through it
        joined = await sim.start(3, [sim.address(0)])
        await until(lambda: len(joined.neighbours) >= 2, 10)
        await until(lambda: not first.client_mode, 240)
        await until(lambda: all_know_each_other(sim), 60)

    simulate(story)


def test_a_node_whose_addresses_change_is_checked_and_announced_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async def story(sim: SimulatedDHT) -> None:
        nodes = await sim.start_many(3)
        await asyncio.sleep(60)
        checks = watch_checks(monkeypatch)
        host, place = nodes[2].host, sim.network.host("node2")
        moved = place.address(PORT + 1)
        await place.listen(host._connections.accept, moved)
        host.config = replace(host.config, announce=(moved,))
        await asyncio.sleep(10)
        assert [who for who, _ in checks] == [str(host.peer_id)]
        assert nodes[0].host.addresses_of(host.peer_id)[0] == moved
        assert nodes[1].host.addresses_of(host.peer_id)[0] == moved

    simulate(story)


# ---- losing and finding again


def test_a_node_that_left_is_forgotten_soon() -> None:
    async def story(sim: SimulatedDHT) -> None:
        await sim.start_many(5)
        await sim.stop(4)
        await until(lambda: all_know_each_other(sim), 3)
        await sim.kill(3)
        await until(lambda: all_know_each_other(sim), 3)
        await sim.kill(2, silently=True)
        await until(lambda: all_know_each_other(sim), 60)

    simulate(story)


def test_a_node_that_lost_everybody_is_back_within_30_s() -> None:
    async def story(sim: SimulatedDHT) -> None:
        await sim.start_many(6)
        sim.network.partition({"node5"})
        await until(lambda: not sim.nodes[5].neighbours, 120)
        await asyncio.sleep(600)
        sim.network.heal()
        await until(lambda: all_know_each_other(sim), 30)

    simulate(story)


def test_lost_neighbours_are_found_again_without_any_initial_peer() -> None:
    async def story(sim: SimulatedDHT) -> None:
        await sim.start_many(5)
        await sim.stop(0)  # the only initial peer
        await until(lambda: all_know_each_other(sim), 5)
        sim.network.partition({"node1", "node2"})
        await until(lambda: all(len(node.neighbours) == 1 for node in sim.nodes.values()), 180)
        sim.network.heal()
        await until(lambda: all_know_each_other(sim), 45)

    simulate(story)


def test_halves_of_a_partition_become_one_again() -> None:
    async def story(sim: SimulatedDHT) -> None:
        await sim.start_many(8)
        sim.network.partition({"node0", "node1", "node2", "node3"})
        await until(lambda: all(len(node.neighbours) == 3 for node in sim.nodes.values()), 180)
        await asyncio.sleep(600)
        sim.network.heal()
        await until(lambda: all_know_each_other(sim), 75)

    simulate(story)


@pytest.mark.sweep
def test_a_machine_that_was_away_while_all_others_restarted_is_back_within_30_s() -> None:
    async def story(sim: SimulatedDHT) -> None:
        await sim.start_many(5)
        sim.network.partition({"node4"})
        for number in range(4):
            await sim.stop(number)
            await sim.start(number, [sim.address(0)] if number else [])
        await asyncio.sleep(1800)
        sim.network.heal()
        await until(lambda: all_know_each_other(sim), 30)
        assert await sim.nodes[4].store("key", 1, sim.now() + 100)
        assert await sim.nodes[0].get("key", latest=True)

    simulate(story)


def test_after_a_sleep_all_neighbours_are_called(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The monotonic clock stands still while a machine sleeps; the wall clock tells."""

    async def story(sim: SimulatedDHT) -> None:
        node, *others = await sim.start_many(8)
        await asyncio.sleep(120)
        called: list[object] = []
        original = node.host.call

        async def call(peer: Any, *arguments: Any, **options: Any) -> Any:
            called.append(peer)
            return await original(peer, *arguments, **options)

        monkeypatch.setattr(node.host, "call", call)
        await asyncio.sleep(6)
        assert len(set(called)) < len(others)
        assert "asleep" not in caplog.text
        sim.clock_offset += 3600
        await asyncio.sleep(6)
        assert "asleep for about 1 h" in caplog.text
        assert set(called) == {other.peer_id for other in others}

    with caplog.at_level(logging.INFO, "shoal"):
        simulate(story)


def test_a_restarted_node_with_a_new_address_is_found() -> None:
    async def story(sim: SimulatedDHT) -> None:
        await sim.start_many(4)
        await sim.stop(3)
        await asyncio.sleep(10)
        # the same identity on another machine
        host = Host(sim.identity(3), sim.network.host("elsewhere"), clock=sim.clock(1), rng=random.Random(1))
        await host.start([sim.network.host("elsewhere").address(4000)])
        sim.nodes[3] = await DHTNode.create(
            host, initial_peers=[sim.address(0)], clock=sim.clock(1), rng=random.Random(2)
        )
        await until(lambda: all_know_each_other(sim), 30)

    simulate(story)
