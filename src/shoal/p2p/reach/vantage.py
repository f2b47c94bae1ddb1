"""From where a peer sees this host, and at which addresses of its interfaces others may find it. Pure.

What a helper finds out about an address holds for those that stand where the helper stands. So each answer counts as
much as its helper's :class:`Vantage` is wide.
"""

from __future__ import annotations

import enum
import ipaddress
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

IPNetwork = ipaddress.IPv4Network | ipaddress.IPv6Network

_BRIDGES = re.compile(r"docker|br-|virbr|veth|cni|podman|lxc|lxdbr|flannel|cali|kube|vmnet|bridge\d")
"""Names of interfaces that lead to containers and virtual machines of this machine."""


@dataclass(frozen=True)
class Interface:
    """One address of one network interface."""

    name: str
    ip: str
    """In canonical form, without a zone."""
    prefix_length: int
    """How many leading bits of the address all machines of its subnet share."""

    @property
    def network(self) -> IPNetwork:
        """The subnet whose machines it reaches without a router."""
        return ipaddress.ip_network(f"{self.ip}/{self.prefix_length}", strict=False)

    @property
    def is_bridge(self) -> bool:
        """Whether it leads to containers or virtual machines on this machine."""
        return _BRIDGES.match(self.name) is not None


class Vantage(enum.IntEnum):
    """Where a peer stands, as seen from this host; the later ones see more of what strangers see."""

    MACHINE = enum.auto()
    """On this machine."""
    SUBNET = enum.auto()
    """In a subnet of this machine: no router lies between."""
    ROUTED = enum.auto()
    """Elsewhere; it sees this host under the host's own address."""
    TRANSLATED = enum.auto()
    """It sees this host under an address that the host does not have: a NAT lies between."""


def vantage_of(
    interfaces: Iterable[Interface], *, local_ip: str | None, remote_ip: str | None, seen_ip: str | None
) -> Vantage:
    """Where the peer of a connection stands. ``seen_ip``: what it calls this host's address; None: it does not say."""
    if remote_ip is None or remote_ip == local_ip or ipaddress.ip_address(remote_ip).is_loopback:
        return Vantage.MACHINE
    interfaces = list(interfaces)
    if seen_ip is not None and seen_ip != local_ip and seen_ip not in {one.ip for one in interfaces}:
        return Vantage.TRANSLATED
    remote = ipaddress.ip_address(remote_ip)
    is_near = any(remote in one.network for one in interfaces if one.network.version == remote.version)
    return Vantage.SUBNET if is_near else Vantage.ROUTED


def is_global(host: str) -> bool:
    """Whether ``host`` is an IP address of the public Internet."""
    try:
        return ipaddress.ip_address(host).is_global
    except ValueError:
        return False


def likely_first(interfaces: Sequence[Interface], preferred: Sequence[str]) -> list[Interface]:
    """The interfaces by how likely others reach this machine there.

    First those whose addresses the machine itself prefers (its default routes' ones), then public addresses, then
    private ones, then bridges of containers, loopback at the end. Link-local addresses mean nothing without the name
    of an interface, and are left out.
    """
    usable = [one for one in interfaces if not _is_link_local(one.ip)]
    return sorted(usable, key=lambda one: _rank(one, preferred))


def _rank(one: Interface, preferred: Sequence[str]) -> int:
    if ipaddress.ip_address(one.ip).is_loopback:
        return 4
    if one.ip in preferred:
        return 0
    if one.is_bridge:
        return 3
    return 1 if is_global(one.ip) else 2


def _is_link_local(ip: str) -> bool:
    return ipaddress.ip_address(ip).is_link_local
