"""The laboratory does what the tests of peers rely on."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from lab_internet import NATS, Internet, Machine

pytestmark = pytest.mark.xdist_group("lab")

PORT = 31337
PATIENCE = 20.0
"""Seconds; only what hangs takes as long."""
SILENCE = 0.3
"""Seconds without an answer after which a packet counts as dropped. One that is let in takes a millisecond."""


@contextmanager
def listener(machine: Machine, port: int = PORT) -> Iterator[socket.socket]:
    with machine.namespace.socket() as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.settimeout(PATIENCE)
        sock.bind(("0.0.0.0", port))
        sock.listen()
        yield sock


def dial(
    machine: Machine, ip: str, port: int = PORT, *, wait: float = PATIENCE, own_port: int = 0
) -> socket.socket:
    sock = machine.namespace.socket(socket.AF_INET6 if ":" in ip else socket.AF_INET)
    sock.settimeout(wait)
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if own_port:
            sock.bind(("", own_port))
        sock.connect((ip, port))
    except BaseException:
        sock.close()
        raise
    return sock


def seen_by(server: Machine, client: Machine, *, own_port: int) -> tuple[str, int]:
    """As which address a client that dials from one port appears."""
    with listener(server) as waiting, dial(client, server.ip, own_port=own_port):
        accepted, seen = waiting.accept()
        accepted.close()
    return seen[0], seen[1]


def is_dropped(machine: Machine, ip: str, port: int = PORT) -> bool:
    try:
        dial(machine, ip, port, wait=SILENCE).close()
    except TimeoutError:
        return True
    return False


def test_public_machines_reach_each_other_and_private_addresses_lead_nowhere(internet: Internet):
    a, b = internet.machine("a", ip6=True), internet.machine("b", ip6=True)
    with listener(b), dial(a, b.ip) as sock:
        assert sock.getsockname()[0] == a.ip
    with pytest.raises(ConnectionRefusedError):
        dial(a, b.ip6)
    assert is_dropped(a, "192.168.1.10")
    assert is_dropped(a, "192.88.99.200")


@pytest.mark.parametrize("nat", NATS)
def test_translators_are_of_their_kind(internet: Internet, nat: str):
    servers = [internet.machine("a"), internet.machine("b")]
    site = internet.site("home", nat)
    inside = site.machines[0]
    seen = [seen_by(server, inside, own_port=40_000) for server in servers]
    assert {ip for ip, _ in seen} == {site.ip}
    ports = {port for _, port in seen}
    assert ports == {40_000} if nat in ("cone", "fullcone") else 40_000 not in ports and len(ports) == 2
    with listener(inside, 40_000):
        assert is_dropped(servers[0], site.ip, 40_000) == (nat != "fullcone")
    assert is_dropped(servers[0], site.ip, 40_001)


def test_a_router_may_refuse_what_comes_unasked(internet: Internet):
    outside, site = internet.machine("a"), internet.site("home", "cone", refuse=True)
    with listener(site.machines[0]), pytest.raises(ConnectionRefusedError):
        dial(outside, site.ip)


def test_a_forwarded_port_leads_inside_and_others_do_not(internet: Internet):
    outside, site = internet.machine("a"), internet.site("home", "cone", forward={PORT: 4000})
    with listener(site.machines[0], 4000), dial(outside, site.ip):
        assert is_dropped(outside, site.ip, 4000)


def test_a_one_to_one_translator_leads_in_and_out_at_every_port(internet: Internet):
    outside, cloud = internet.machine("a"), internet.one_to_one("cloud")
    assert seen_by(outside, cloud.machines[0], own_port=40_000) == (cloud.ip, 40_000)
    with listener(cloud.machines[0]) as waiting, dial(outside, cloud.ip) as sock:
        accepted, seen = waiting.accept()
        accepted.close()
        assert seen == sock.getsockname()


def test_machines_of_one_lan_reach_each_other_and_no_other_lan(internet: Internet):
    site, other = internet.site("home", "cone", machines=2), internet.site("other", "cone")
    with listener(site.machines[1]):
        dial(site.machines[0], site.machines[1].ip).close()
    with listener(other.machines[0]), pytest.raises(ConnectionRefusedError):  # its own, at the same address
        dial(site.machines[0], other.machines[0].ip)


def test_a_firewall_closes_and_opens_an_address(internet: Internet):
    a, b = internet.machine("a"), internet.machine("b")
    b.close_ports()
    with listener(b):
        assert is_dropped(a, b.ip)
        with listener(a):
            dial(b, a.ip).close()  # what it begins itself passes
        b.open_ports()
        dial(a, b.ip).close()


def test_a_container_bridge_is_the_same_everywhere_and_leads_to_the_own_machine(internet: Internet):
    a, b = internet.machine("a"), internet.machine("b")
    a.add_container_bridge()
    a.add_interface("storage", "10.9.0.1")
    b.add_container_bridge()
    with listener(b), pytest.raises(ConnectionRefusedError):
        dial(a, "172.17.0.1")
    with listener(b):
        assert is_dropped(b, "10.9.0.1")


def test_families_of_addresses_are_apart(internet: Internet):
    four, six = internet.machine("four"), internet.machine("six", ip4=False, ip6=True)
    both = internet.machine("both", ip6=True)
    with pytest.raises(ConnectionRefusedError):
        dial(six, both.ip6)
    with pytest.raises(ConnectionRefusedError):
        dial(four, both.ip)
    with pytest.raises(OSError, match="unreachable"):
        dial(four, six.ip6)
    with pytest.raises(OSError, match="unreachable"):
        dial(six, four.ip)


HOLD = """
import sys, lab_internet
internet = lab_internet.Internet()
machine = internet.machine("a")
machine.namespace.ip(f"link add name witness type veth peer name witness netns {sys.argv[1]}")
print("ready", flush=True)
sys.stdin.read()
"""


def test_a_killed_run_leaves_no_namespace_and_the_root_one_as_it_was(internet: Internet):
    """The other end of a link goes with the namespace that has this one."""

    def root_addresses() -> bytes:
        return subprocess.run(["ip", "-oneline", "address"], capture_output=True, check=True).stdout

    def has_witness() -> bool:
        found = observer.do(lambda: subprocess.run(["ip", "link", "show", "witness"], capture_output=True))
        return found.returncode == 0

    observer, before = internet.machine("observer").namespace, root_addresses()
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLD, observer.path],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parent)},
    )
    with holder:
        assert holder.stdout.readline() == "ready\n"
        assert has_witness()
        assert root_addresses() == before
        holder.kill()
    deadline = time.monotonic() + PATIENCE
    while has_witness():
        assert time.monotonic() < deadline
    assert root_addresses() == before
