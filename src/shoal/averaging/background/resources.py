"""What the steps of one averager work with, in the background process."""

from __future__ import annotations

from dataclasses import dataclass

from shoal.averaging.allreduce.deadlines import Deadlines
from shoal.averaging.allreduce.round import RoundTimeouts
from shoal.averaging.allreduce.rounds import Rounds
from shoal.averaging.background.arena import SharedArena
from shoal.averaging.background.division import Division
from shoal.averaging.background.doubts import Doubts
from shoal.averaging.background.slow_peers import SlowPeers
from shoal.averaging.config import AveragerConfig
from shoal.averaging.matchmaking.matchmaker import Matchmaker
from shoal.dht.node import DHTNode
from shoal.p2p.host import Host
from shoal.runtime.service import ServiceContext


@dataclass(frozen=True)
class Resources:
    """Made once for an averager, and shared by all of its steps."""

    context: ServiceContext
    """The way to the user process."""
    config: AveragerConfig
    node: DHTNode
    matchmaker: Matchmaker
    rounds: Rounds
    timeouts: RoundTimeouts
    division: Division
    arena: SharedArena
    slow_peers: SlowPeers
    doubts: Doubts
    deadlines: Deadlines | None = None
    """What ``adaptive_timeouts`` makes of the timeouts; None: nothing."""

    @property
    def host(self) -> Host:
        return self.node.host

    @property
    def prefix(self) -> str:
        return self.config.prefix
