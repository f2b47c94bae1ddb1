"""Which worker programs do a piece of work, and what each is told. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from benchmarks.network.plan import address_of
from benchmarks.work import Averaging, Download, Lookups, Network, Side, Swarm, Training, Work

LOOPBACK = "127.0.0.1"


@dataclass(frozen=True)
class Launch:
    """One worker: its program below ``benchmarks.workers``, and its specification."""

    program: str
    spec: Mapping[str, Any]

    @property
    def host(self) -> int:
        """The machine that it runs on, where the work needs several."""
        return int(self.spec["host"])


def launches(work: Work, side: Side) -> list[Launch]:
    """The workers of one side; the first one's address is told to the others.

    :raises ValueError: the side cannot do this work
    """
    common: dict[str, Any] = {"library": side.library}
    match work, side.library:
        case Averaging(), "shoal" | "hivemind":
            return _averaging(work, side)
        case Averaging(network=None), "gloo":
            common |= {"floats": work.floats, "peers": work.peers}
            return [Launch("gloo", common | {"host": rank}) for rank in range(work.peers)]
        case Averaging() | Download(), "raw":
            return _raw(work, side)
        case Download(), "shoal" | "hivemind":
            common |= {"floats": work.floats}
            return [Launch("state", common | _place(work.network, host)) for host in range(2)]
        case Swarm(), "shoal" | "hivemind":
            spec = {"host": 0, "peers": work.peers, "group": work.group, "steps": work.steps}
            return [Launch("swarm", common | spec)]
        case Training(), "shoal" | "hivemind":
            common |= {"epochs": work.epochs, "step_s": work.step_s}
            first_client = work.peers - work.clients
            return [
                Launch("training", common | {"host": host, "client": host >= first_client})
                for host in range(work.peers)
            ]
        case Lookups(), "shoal" | "hivemind":
            return [
                Launch("lookups", common | {"host": 0, "nodes": work.nodes, "operations": work.operations})
            ]
    raise ValueError(f"side must be one that can do {type(work).__name__.lower()}, got {side.name}")


def observers(work: Work) -> list[Launch]:
    """The workers that see what others on the same links notice, if the work wants to know."""
    if isinstance(work, Averaging) and work.foreign and work.network is not None:
        return [Launch("foreign", _place(work.network, host)) for host in range(2)]
    return []


def _averaging(work: Averaging, side: Side) -> list[Launch]:
    """On loopback all peers share a user process, and each has a background process. Far ones share nothing."""
    common = {
        "library": side.library,
        "group": work.peers,
        "floats": work.floats,
        "handed_over": work.handed_over,
        # A long link's round trips take a part of these times.
        "matchmaking_s": 2.0 if work.network is None else 5.0,
        "request_s": 1.0 if work.network is None else 2.0,
    }
    if work.network is None:
        alone: dict[str, Any] = {"peers": work.peers, "bandwidth": None, "training": False, "cores": []}
        return [Launch("averaging", common | alone | _place(None, 0))]
    return [
        Launch("averaging", common | _place(work.network, host) | _apart(work, work.network, host))
        for host in range(work.peers)
    ]


def _apart(work: Averaging, network: Network, host: int) -> dict[str, Any]:
    """What a peer on a machine of its own is told."""
    uplink = network.first_up if host == 0 and network.first_up is not None else network.rate
    trains = work.training and host == 0
    return {
        "peers": 1,
        "bandwidth": uplink if work.bandwidth_given else None,
        "training": trains,
        # The trainer has the first core, and everybody else the second.
        "cores": ([0] if trains else [1]) if work.training else [],
    }


def _raw(work: Averaging | Download, side: Side) -> list[Launch]:
    """Two machines, also where the others are more: this is what one link gives."""
    total, both_ways = round(work.megabytes * 1e6), isinstance(work, Averaging)
    common = {"connections": side.connections}
    ways = [(total, total if both_ways else 0), (total if both_ways else 0, total)]
    return [
        Launch("raw_tcp", common | _place(work.network, host) | {"to_send": up, "to_receive": down})
        for host, (up, down) in enumerate(ways)
    ]


def _place(network: Network | None, host: int) -> dict[str, Any]:
    return {"host": host, "ip": LOOPBACK if network is None else address_of(host)}
