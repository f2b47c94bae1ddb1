"""Tools to test programs that use Shoal, and Shoal itself: a virtual clock, a network in memory, swarms from a seed.

A swarm of your own, of whole peers from sockets to groups, in virtual time::

    import asyncio
    from shoal.averaging.group import PeerMode
    from shoal.averaging.matchmaking_config import MatchmakingConfig
    from shoal.testing import SimulatedMatchmaking, run

    async def main():
        swarm = SimulatedMatchmaking(seed=1, config=MatchmakingConfig(target_group_size=4))
        await swarm.start([PeerMode.FULL] * 8)
        found = await asyncio.gather(*(swarm.search(number, timeout=60.0) for number in range(8)))
        print(sorted(len(group) for group in found), "after", swarm.now(), "seconds")
        await swarm.close()

    run(main)  # the same seed tells the same story, in milliseconds

Names are loaded when first used. :mod:`.conformance` holds the tests that every network has to pass, and
:mod:`.matchmaking_cores` swarms of cores alone, which are much faster.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from shoal.utils.lazy import lazy_names

if TYPE_CHECKING:
    from shoal.testing.averaging import SimulatedAveraging
    from shoal.testing.clock import Deadlock, VirtualClockLoop, VirtualTimeLimitExceeded, run
    from shoal.testing.dht import SimulatedDHT
    from shoal.testing.faults import PHASES, plant
    from shoal.testing.matchmaking import SimulatedMatchmaking
    from shoal.testing.network import SimulatedNetwork
    from shoal.testing.rounds import SimulatedGroup
    from shoal.testing.swarm import SimulatedSwarm

__all__ = [
    "run",
    "VirtualClockLoop",
    "VirtualTimeLimitExceeded",
    "Deadlock",
    "SimulatedNetwork",
    "SimulatedDHT",
    "SimulatedMatchmaking",
    "SimulatedGroup",
    "SimulatedAveraging",
    "SimulatedSwarm",
    "plant",
    "PHASES",
]

__getattr__, __dir__ = lazy_names(
    __name__,
    {
        "run": "shoal.testing.clock",
        "VirtualClockLoop": "shoal.testing.clock",
        "VirtualTimeLimitExceeded": "shoal.testing.clock",
        "Deadlock": "shoal.testing.clock",
        "SimulatedNetwork": "shoal.testing.network",
        "SimulatedDHT": "shoal.testing.dht",
        "SimulatedMatchmaking": "shoal.testing.matchmaking",
        "SimulatedGroup": "shoal.testing.rounds",
        "SimulatedAveraging": "shoal.testing.averaging",
        "SimulatedSwarm": "shoal.testing.swarm",
        "plant": "shoal.testing.faults",
        "PHASES": "shoal.testing.faults",
    },
)
