"""Rounds of averaging on simulated matchmakers: groups are found for real, and the all-reduce is one sum."""

from __future__ import annotations

import asyncio
from collections import defaultdict

import numpy as np
import numpy.typing as npt

from shoal.averaging.group import GroupInfo
from shoal.p2p.identity import PeerID
from shoal.testing.matchmaking import SimulatedMatchmaking

__all__ = ["SimulatedAveraging"]


class SimulatedAveraging:
    """Gives each peer a vector in float64, and averages it with those of the peer's groups."""

    def __init__(self, sim: SimulatedMatchmaking) -> None:
        self.sim = sim
        self.vectors: dict[int, npt.NDArray[np.float64]] = {}
        self._arrived: dict[bytes, dict[PeerID, int]] = defaultdict(dict)
        self._complete: dict[bytes, asyncio.Event] = defaultdict(asyncio.Event)

    async def step(self, number: int, *, timeout: float = 60.0, seconds: float = 0.1) -> GroupInfo:
        """One round of peer ``number``, whose all-reduce takes ``seconds``.

        :raises MatchmakingException: it found no group; its vector is as it was
        """
        result = await self.sim.search(number, timeout=timeout)
        if not isinstance(result, GroupInfo):
            raise result
        members = self._arrived[result.group_id]
        members[self.sim.dht.identity(number).peer_id] = number
        if len(members) == len(result):
            await asyncio.sleep(seconds)
            average = np.mean([self.vectors[members[peer]] for peer in result.peer_ids], axis=0)
            for member in members.values():
                self.vectors[member] = average
            self._complete[result.group_id].set()
        await self._complete[result.group_id].wait()
        self.sim.matchmakers[number].round_committed(result)
        return result
