"""Peers that listen on every interface announce what leads to them, and nothing else first."""

from __future__ import annotations

import pytest
from lab_expectations import average_in_two_rounds, expect_full
from lab_internet import DOCKER_IP, Internet, Machine
from lab_peers import Swarm

pytestmark = pytest.mark.xdist_group("lab")

PORT = 31337
EVERYWHERE = {
    "ip4": [f"/ip4/0.0.0.0/tcp/{PORT}"],
    "ip6": [f"/ip6/::/tcp/{PORT}"],
    "both": [f"/ip4/0.0.0.0/tcp/{PORT}", f"/ip6/::/tcp/{PORT}"],
}


def make_server(internet: Internet, name: str) -> Machine:
    """A machine as clouds have them: two families, a network for storage, and Docker."""
    machine = internet.machine(name, ip6=True)
    machine.add_container_bridge()
    machine.add_interface("storage", "10.9.0.1")
    return machine


@pytest.mark.parametrize("families", EVERYWHERE)
def test_peers_on_every_interface_average(swarm: Swarm, internet: Internet, families: str):
    """All have a container bridge of the same address, and the same port: that address leads each to itself."""
    machines = [make_server(internet, f"server{n}") for n in range(3)]
    first = swarm.start(machines[0], size=3, listen=EVERYWHERE[families])
    first.wait_until_joined()
    for machine in machines[1:]:
        swarm.start(machine, size=3, listen=EVERYWHERE[families])
    average_in_two_rounds(swarm)
    for peer in swarm.peers:
        machine = peer.machine
        outer = {"ip4": [machine.ip], "ip6": [machine.ip6], "both": [machine.ip, machine.ip6]}[families]
        prefixes = [f"/ip6/{ip}/" if ":" in ip else f"/ip4/{ip}/" for ip in outer]
        said = expect_full(peer, *prefixes)
        known = [address for addresses in said["known"].values() for address in addresses]
        assert not [one for one in known if "/127." in one or "/ip6/::1/" in one]
        for addresses in said["known"].values():
            assert DOCKER_IP not in addresses[0]


def test_a_peer_with_both_families_brings_those_with_one_together(swarm: Swarm, internet: Internet):
    both = swarm.start(internet.machine("both", ip6=True), size=3, listen=EVERYWHERE["both"])
    both.wait_until_joined()
    four = swarm.start(internet.machine("four"), size=3)
    six = swarm.start(internet.machine("six", ip4=False, ip6=True), size=3)
    average_in_two_rounds(swarm)
    expect_full(both, f"/ip4/{both.machine.ip}/", f"/ip6/{both.machine.ip6}/")
    expect_full(four, f"/ip4/{four.machine.ip}/")
    expect_full(six, f"/ip6/{six.machine.ip6}/")
