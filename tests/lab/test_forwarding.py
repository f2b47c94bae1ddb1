"""Peers that others reach at an address that is not their own are full peers, under that address."""

from __future__ import annotations

import pytest
from lab_expectations import average_in_two_rounds, expect_client, expect_full
from lab_internet import Internet
from lab_peers import Swarm
from tests.swept import rest_swept

pytestmark = pytest.mark.xdist_group("lab")

PORT = 31337


@pytest.mark.parametrize("ip", rest_swept(["192.168.1.10", "0.0.0.0"]))
def test_a_peer_behind_a_forwarded_port_is_a_full_one(swarm: Swarm, internet: Internet, ip: str):
    swarm.start(internet.machine("public"), size=3).wait_until_joined()
    site = internet.site("home", "cone", forward={PORT: PORT})
    forwarded = swarm.start(site.machines[0], size=3, listen=[f"/ip4/{ip}/tcp/{PORT}"])
    hidden = swarm.start(internet.site("hidden", "cone").machines[0], size=3)
    average_in_two_rounds(swarm)
    expect_full(forwarded, f"/ip4/{site.ip}/tcp/{PORT}/")
    expect_client(hidden)


@pytest.mark.sweep
def test_a_port_that_is_forwarded_from_another_number_is_used_when_it_is_announced(
    swarm: Swarm, internet: Internet
):
    swarm.start(internet.machine("public"), size=3).wait_until_joined()
    sites = [internet.site(name, "cone", forward={9000: PORT}) for name in ("told", "untold")]
    listen = [f"/ip4/0.0.0.0/tcp/{PORT}"]
    told = swarm.start(
        sites[0].machines[0], size=3, listen=listen, announce_maddrs=[f"/ip4/{sites[0].ip}/tcp/9000"]
    )
    untold = swarm.start(sites[1].machines[0], size=3, listen=listen)
    average_in_two_rounds(swarm)
    expect_full(told, f"/ip4/{sites[0].ip}/tcp/9000/")
    expect_client(untold)


def test_a_first_peer_behind_a_forwarded_port_learns_its_address_from_others(
    swarm: Swarm, internet: Internet
):
    """They join by the address that its user knows."""
    site = internet.site("home", "cone", forward={PORT: PORT})
    first = swarm.start(site.machines[0], size=3, listen=[f"/ip4/0.0.0.0/tcp/{PORT}"])
    first.wait_until_joined()
    for n in range(2):
        swarm.start(internet.machine(f"public{n}"), size=3, join=[f"/ip4/{site.ip}/tcp/{PORT}"])
    average_in_two_rounds(swarm)
    expect_full(first, f"/ip4/{site.ip}/tcp/{PORT}/")


def test_machines_of_clouds_are_full_peers_at_their_public_addresses(swarm: Swarm, internet: Internet):
    """Each has a private address, the same one, and a public one that is translated one to one."""
    swarm.start(internet.machine("public"), size=3).wait_until_joined()
    clouds = [internet.one_to_one(f"cloud{n}") for n in range(2)]
    peers = [swarm.start(cloud.machines[0], size=3) for cloud in clouds]
    average_in_two_rounds(swarm)
    for peer, cloud in zip(peers, clouds, strict=True):
        expect_full(peer, f"/ip4/{cloud.ip}/")


def test_a_first_peer_in_a_cloud_learns_its_address_from_others(swarm: Swarm, internet: Internet):
    cloud = internet.one_to_one("cloud")
    first = swarm.start(cloud.machines[0], size=3, listen=[f"/ip4/0.0.0.0/tcp/{PORT}"])
    first.wait_until_joined()
    for n in range(2):
        swarm.start(
            internet.site(f"home{n}", "cone").machines[0], size=3, join=[f"/ip4/{cloud.ip}/tcp/{PORT}"]
        )
    average_in_two_rounds(swarm)
    expect_full(first, f"/ip4/{cloud.ip}/tcp/{PORT}/")
    for peer in swarm.peers[1:]:
        expect_client(peer)
