"""What ``shoal peer`` prints is true on machines with real addresses."""

from __future__ import annotations

import pytest
from lab_internet import DOCKER_IP, Internet
from lab_peers import Command, Swarm
from tests.swept import rest_swept

pytestmark = pytest.mark.xdist_group("lab")

PORT = 31337
STARTED = "stops this peer"


def printed_addresses(command: Command) -> list[str]:
    """The addresses that it printed when it had joined, in their order."""
    return [line.strip() for line in command.wait_for_text(STARTED) if line.startswith("  /")]


@pytest.mark.parametrize("host", rest_swept(["0.0.0.0", "::"]))
def test_a_peer_on_every_interface_prints_the_likely_addresses_first(
    swarm: Swarm, internet: Internet, host: str
):
    machine = internet.machine("server", ip6=True)
    machine.add_container_bridge()
    machine.add_interface("storage", "10.9.0.1")
    command = swarm.command(machine, "peer", "--host", host, "--port", str(PORT), "--interval", "0.1")
    addresses = printed_addresses(command)
    ips = [address.split("/")[2] for address in addresses]
    if host == "::":
        assert ips[0] == machine.ip6
        assert ips.index("::1") > ips.index(machine.ip6)
    else:
        assert ips == [machine.ip, "10.9.0.1", DOCKER_IP, "127.0.0.1"]
    assert not any("this machine only" in line for line in command.wait_for_text(STARTED))
    other = internet.machine("other", ip6=True)
    swarm.start(other, join=addresses, listen=[f"/ip4/{other.ip}/tcp/0", f"/ip6/{other.ip6}/tcp/0"])
    command.wait_for_text("peers: 1,")


def test_a_peer_on_loopback_says_that_others_cannot_reach_it(swarm: Swarm, internet: Internet):
    command = swarm.command(internet.machine("server"), "peer")
    assert [address.split("/")[2] for address in printed_addresses(command)] == ["127.0.0.1"]
    assert any("this machine only" in line for line in command.wait_for_text(STARTED))


def test_a_peer_behind_a_translator_says_that_nobody_can_dial_it_and_what_to_do(
    swarm: Swarm, internet: Internet
):
    first = swarm.start(internet.machine("public"))
    first.wait_until_joined()
    machine = internet.site("home", "cone").machines[0]
    command = swarm.command(machine, "peer", "--host", "0.0.0.0", "--initial-peers", first.addresses[0])
    assert printed_addresses(command) == []
    text = "\n".join(command.wait_for_text(STARTED))
    assert "No other peer can dial this one" in text
    assert "--announce" in text
    assert f"  tried /ip4/{machine.ip}/tcp/" in text
    assert "announce_maddrs" not in text  # the log says the same in the library's words: once is enough


def test_a_peer_behind_a_forwarded_port_prints_the_outer_address(swarm: Swarm, internet: Internet):
    first = swarm.start(internet.machine("public"))
    first.wait_until_joined()
    site = internet.site("home", "cone", forward={PORT: PORT})
    arguments = ["--host", "0.0.0.0", "--port", str(PORT), "--initial-peers", first.addresses[0]]
    addresses = printed_addresses(swarm.command(site.machines[0], "peer", *arguments))
    assert addresses[0].startswith(f"/ip4/{site.ip}/tcp/{PORT}/p2p/")
    swarm.start(internet.machine("newcomer"), join=addresses[:1]).wait_until_joined()


@pytest.mark.sweep
def test_a_first_peer_behind_a_forwarded_port_says_where_it_is_when_others_have_found_out(
    swarm: Swarm, internet: Internet
):
    site = internet.site("home", "cone", forward={PORT: PORT})
    command = swarm.command(site.machines[0], "peer", "--host", "0.0.0.0", "--port", str(PORT))
    printed_addresses(command)
    for name in ("a", "b"):
        swarm.start(internet.machine(name), join=[f"/ip4/{site.ip}/tcp/{PORT}"]).wait_until_joined()
    command.wait_for_text(f"/ip4/{site.ip}/tcp/{PORT}/p2p/")


@pytest.mark.sweep
def test_a_first_peer_learns_an_outer_port_of_another_number_from_those_that_joined_by_it(
    swarm: Swarm, internet: Internet
):
    site = internet.site("home", "cone", forward={9000: PORT})
    command = swarm.command(site.machines[0], "peer", "--host", "0.0.0.0", "--port", str(PORT))
    printed_addresses(command)
    for name in ("a", "b"):
        swarm.start(internet.machine(name), join=[f"/ip4/{site.ip}/tcp/9000"]).wait_until_joined()
    command.wait_for_text(f"/ip4/{site.ip}/tcp/9000/p2p/")
