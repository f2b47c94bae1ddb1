"""What is set up for a network: addresses, lines of ``ip``, settings, links. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks.work import Network

DEVICE = "net0"
TCP_MEMORY = 64 << 20
"""Bytes that the kernel may buffer for a connection: 1 Gbit/s x 200 ms fit, so that it limits nobody."""
QUEUE_SECONDS = 0.05
LEAST_QUEUE = 96_000
"""Bytes."""


@dataclass(frozen=True)
class Link:
    """The access link of one machine."""

    ip: str
    up: float
    """Bytes a second."""
    down: float
    delay: float
    """Seconds that a packet takes to or from the others; between two machines, the sum of both."""
    loss: float
    """Fraction of the segments that get lost on the way up."""

    def as_json(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in ("ip", "up", "down", "delay", "loss")}


def address_of(host: int) -> str:
    """An address that belongs to nobody any more (RFC 7526); libraries take it for a public one."""
    return f"192.88.99.{host + 1}"


def links(network: Network, hosts: int) -> list[Link]:
    """The links of so many machines."""
    megabit = 1e6 / 8
    return [
        Link(
            ip=address_of(host),
            up=megabit * (network.first_up if host == 0 and network.first_up else network.rate),
            down=megabit * network.rate,
            delay=network.rtt_ms / 1e3 / 4,
            loss=network.loss,
        )
        for host in range(hosts)
    ]


def queue_bytes(rate: float) -> float:
    """How much may wait before a link of this rate (bytes a second): 50 ms of it, as in many routers."""
    return max(QUEUE_SECONDS * rate, LEAST_QUEUE)


def ip_lines(link: Link) -> list[str]:
    """Lines of ``ip -batch`` that set up a machine whose device exists."""
    return [
        "link set lo up",
        f"link set {DEVICE} txqueuelen 10000 mtu 1500 up",
        f"addr add {link.ip}/32 dev {DEVICE}",
        f"route add default dev {DEVICE}",
    ]


def settings(network: Network) -> dict[str, str]:
    """Values below ``/proc/sys/net``, with ``__`` for slashes."""
    return {
        "ipv4__tcp_rmem": f"4096 131072 {TCP_MEMORY}",
        "ipv4__tcp_wmem": f"4096 65536 {TCP_MEMORY}",
        "ipv4__tcp_congestion_control": network.control,
    }


def why_not_controlled(control: str, available: Sequence[str]) -> str | None:
    """Why the kernel cannot use this congestion control, or None if it can."""
    if control in available:
        return None
    return f"this kernel has no {control} (it has {', '.join(available)})"
