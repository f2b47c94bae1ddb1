"""From where a peer sees this host, and what its interfaces are good for."""

from __future__ import annotations

import ipaddress
import socket

import pytest

from shoal.p2p.reach.interfaces import default_route_ips, list_interfaces
from shoal.p2p.reach.vantage import Interface, Vantage, likely_first, vantage_of

HERE = [
    Interface("lo", "127.0.0.1", 8),
    Interface("eth0", "10.1.2.3", 24),
    Interface("eth0", "2a00:1::5", 64),
    Interface("docker0", "172.17.0.1", 16),
]


@pytest.mark.parametrize(
    ("local", "remote", "seen", "vantage"),
    [
        ("127.0.0.1", "127.0.0.1", "127.0.0.1", Vantage.MACHINE),
        ("10.1.2.3", "10.1.2.3", "10.1.2.3", Vantage.MACHINE),
        (None, None, None, Vantage.MACHINE),
        ("10.1.2.3", "10.1.2.9", "10.1.2.3", Vantage.SUBNET),
        ("172.17.0.1", "172.17.0.2", "172.17.0.1", Vantage.SUBNET),
        ("10.1.2.3", "10.9.9.9", "10.1.2.3", Vantage.ROUTED),
        ("10.1.2.3", "10.9.9.9", None, Vantage.ROUTED),
        ("10.1.2.3", "8.8.8.8", "84.1.2.3", Vantage.TRANSLATED),
        ("10.1.2.3", "10.1.2.9", "84.1.2.3", Vantage.TRANSLATED),
        ("2a00:1::5", "2a00:1::9", "2a00:1::5", Vantage.SUBNET),
        ("2a00:1::5", "2a00:2::9", "2a00:1::5", Vantage.ROUTED),
    ],
)
def test_where_a_peer_stands(local: str, remote: str, seen: str, vantage: Vantage) -> None:
    assert vantage_of(HERE, local_ip=local, remote_ip=remote, seen_ip=seen) is vantage


def test_likely_interfaces_come_first_and_bridges_and_loopback_last() -> None:
    names = ["lo", "virbr0", "br-1a2b", "veth12", "cni0", "podman1", "docker0"]
    others = [Interface(name, f"172.{17 + n}.0.1", 16) for n, name in enumerate(names[1:])]
    found = [
        Interface("lo", "127.0.0.1", 8),
        *others,
        Interface("eth0", "fe80::1", 64),
        Interface("wg0", "10.5.0.1", 24),
        Interface("eth0", "93.184.216.34", 24),
        Interface("wlan0", "192.168.1.2", 24),
    ]
    ordered = [one.ip for one in likely_first(found, ["192.168.1.2"])]
    assert ordered[:3] == ["192.168.1.2", "93.184.216.34", "10.5.0.1"]
    assert ordered[3:-1] == [one.ip for one in others]
    assert ordered[-1] == "127.0.0.1"


def test_a_bridge_with_the_default_route_is_no_bridge_of_containers() -> None:
    found = [Interface("eth1", "10.0.0.1", 24), Interface("br-lan", "192.168.1.1", 24)]
    assert likely_first(found, ["192.168.1.1"])[0].name == "br-lan"


def test_the_system_lists_its_interfaces() -> None:
    found = list_interfaces()
    loopback = next(one for one in found if one.ip == "127.0.0.1")
    assert loopback.network == ipaddress.ip_network("127.0.0.0/8")
    assert {name for _, name in socket.if_nameindex()} >= {one.name for one in found}
    assert {one.ip for one in found} >= set(default_route_ips())
