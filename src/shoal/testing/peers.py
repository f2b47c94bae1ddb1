"""Peers on a simulated network, made from a seed and a name: the same ones in every run."""

from __future__ import annotations

import asyncio
import hashlib
import random
from collections.abc import Callable

from shoal.p2p.config import HostConfig
from shoal.p2p.host import Host
from shoal.p2p.identity import Identity
from shoal.testing.network import SimulatedNetwork

__all__ = ["make_host", "make_identity", "virtual_wall_clock"]

START_OF_TIME = 1_700_000_000.0
"""What wall clocks of simulations show when the loop's time is 0."""


def make_identity(name: str, seed: int = 0) -> Identity:
    """The identity of the peer ``name`` in the simulation ``seed``."""
    return Identity.generate(hashlib.sha256(f"{seed}/{name}".encode()).digest())


def virtual_wall_clock(time: Callable[[], float], skew: float = 0.0) -> Callable[[], float]:
    """A wall clock that follows a loop's ``time``."""
    return lambda: START_OF_TIME + time() + skew


async def make_host(
    network: SimulatedNetwork,
    name: str,
    config: HostConfig = HostConfig(),
    *,
    seed: int = 0,
    port: int = 4000,
    skew: float = 0.0,
) -> Host:
    """A started host called ``name``; it listens at ``port``, unless it is in client mode. Close it."""

    loop = asyncio.get_running_loop()
    place = network.host(name)
    host = Host(
        make_identity(name, seed),
        place,
        config,
        clock=virtual_wall_clock(loop.time, skew),
        rng=random.Random(f"{seed}/{name}"),
    )
    await host.start([] if config.client_mode else [place.address(port)])
    return host
