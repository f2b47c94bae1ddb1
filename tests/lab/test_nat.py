"""Peers that no other can dial average as clients with those that can be dialed, and say so."""

from __future__ import annotations

import pytest
from lab_expectations import average_in_two_rounds, expect_client, expect_full
from lab_internet import NATS, Internet
from lab_peers import Swarm
from tests.swept import rest_swept

pytestmark = pytest.mark.xdist_group("lab")


@pytest.mark.parametrize("public", rest_swept((3, 1, 2)))
@pytest.mark.parametrize("nat", rest_swept(sorted(NATS, reverse=True)))
def test_peers_behind_translators_average(swarm: Swarm, internet: Internet, nat: str, public: int):
    """Two, each at a site of its own, and both at the same private address, as at home."""
    size = public + 2
    swarm.start(internet.machine("public0"), size=size).wait_until_joined()
    for n in range(1, public):
        swarm.start(internet.machine(f"public{n}"), size=size)
    homes = [internet.site(f"home{n}", nat).machines[0] for n in range(2)]
    homes[1].add_container_bridge()
    swarm.start(homes[0], size=size)
    swarm.start(homes[1], size=size, listen=["/ip4/0.0.0.0/tcp/0"])
    average_in_two_rounds(swarm)
    for peer in swarm.peers[:public]:
        expect_full(peer, f"/ip4/{peer.machine.ip}/")
    for peer in swarm.peers[public:]:
        expect_client(peer)


def test_peers_behind_routers_that_refuse_average(swarm: Swarm, internet: Internet):
    swarm.start(internet.machine("public"), size=3).wait_until_joined()
    for n in range(2):
        swarm.start(internet.site(f"home{n}", "cone", refuse=True).machines[0], size=3)
    average_in_two_rounds(swarm)
    for peer in swarm.peers[1:]:
        expect_client(peer)


def test_two_peers_of_one_lan_average_with_a_public_one(swarm: Swarm, internet: Internet):
    swarm.start(internet.machine("public"), size=3).wait_until_joined()
    site = internet.site("home", "cone", machines=2)
    inside = [swarm.start(machine, size=3) for machine in site.machines]
    average_in_two_rounds(swarm)
    expect_full(swarm.peers[0], f"/ip4/{swarm.peers[0].machine.ip}/")
    for peer in inside:
        expect_client(peer)


def test_two_peers_of_one_lan_alone_reach_each_other(swarm: Swarm, internet: Internet):
    machines = internet.site("home", "cone", machines=2).machines
    swarm.start(machines[0], size=2).wait_until_joined()
    swarm.start(machines[1], size=2)
    average_in_two_rounds(swarm)
    for peer in swarm.peers:
        expect_full(peer, f"/ip4/{peer.machine.ip}/")


def test_a_peer_whose_address_a_firewall_closes_averages(swarm: Swarm, internet: Internet):
    swarm.start(internet.machine("public0"), size=3).wait_until_joined()
    swarm.start(internet.machine("public1"), size=3)
    closed = internet.machine("closed")
    closed.close_ports()
    swarm.start(closed, size=3)
    average_in_two_rounds(swarm)
    for peer in swarm.peers[:2]:
        expect_full(peer, f"/ip4/{peer.machine.ip}/")
    expect_client(swarm.peers[2])


@pytest.mark.sweep
def test_a_peer_whose_address_a_firewall_closes_later_averages_with_a_newcomer(
    swarm: Swarm, internet: Internet
):
    """It was found open when it joined. The newcomer is the first that needs its address since."""
    swarm.start(internet.machine("public"), size=3).wait_until_joined()
    closed = swarm.start(internet.machine("closed"), size=3)
    assert not closed.wait_until_joined()["client"]
    closed.machine.close_ports()
    swarm.start(internet.machine("newcomer"), size=3)
    average_in_two_rounds(swarm)


def test_a_port_that_a_firewall_leaves_open_is_enough(swarm: Swarm, internet: Internet):
    swarm.start(internet.machine("public"), size=2).wait_until_joined()
    machine = internet.machine("closed")
    machine.close_ports(except_for=[4000])
    peer = swarm.start(machine, size=2, listen=["/ip4/0.0.0.0/tcp/4000"])
    average_in_two_rounds(swarm)
    expect_full(peer, f"/ip4/{machine.ip}/tcp/4000/")
