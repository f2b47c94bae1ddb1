"""The asyncio shell of matchmaking: turns the effects of :class:`~shoal.averaging.matchmaking.Matchmaking` into I/O."""

from __future__ import annotations

import random
from collections.abc import Callable

from shoal.averaging.group import GroupInfo, PeerMode
from shoal.averaging.matchmaking import MatchmakingConfig
from shoal.averaging.router import Router
from shoal.dht.node import DHTNode
from shoal.utils.timed import get_dht_time


class Matchmaker:
    """Finds groups for one averager, one search at a time."""

    def __init__(
        self,
        node: DHTNode,
        router: Router,
        *,
        prefix: str,
        schema_hash: bytes,
        config: MatchmakingConfig,
        mode: PeerMode = PeerMode.FULL,
        bandwidth: float | None = None,
        clock: Callable[[], float] = get_dht_time,
        rng: random.Random | None = None,
    ) -> None:
        raise NotImplementedError

    async def find_group(
        self, *, start_time: float, deadline: float | None, gather: bytes = b"", bits: str = ""
    ) -> GroupInfo:
        """Find a group; times are in DHT time.

        :raises MatchmakingException: none was found until ``deadline``; says what the search saw
        """
        raise NotImplementedError

    async def close(self) -> None:
        raise NotImplementedError
