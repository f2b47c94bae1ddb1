"""How many peers look for groups under which keys, where the bits are chosen automatically: asks the DHT."""

from __future__ import annotations

import asyncio
import logging

from shoal.averaging.matchmaking.group_bits import MAX_DEPTH, GroupBits
from shoal.averaging.matchmaking.peer import LocalPeer
from shoal.averaging.matchmaking.view import GONE_WITHIN
from shoal.errors import ShoalError
from shoal.utils import figures

logger = logging.getLogger(__name__)


class Census:
    """Tells a peer's :class:`.GroupBits` what there is at other depths."""

    def __init__(self, peer: LocalPeer, bits: GroupBits) -> None:
        self._peer = peer
        self._bits = bits

    async def explore(self) -> bool:
        """For a peer that is new or alone: look at all depths; whether its next place is another one."""
        since = self._peer.clock() - GONE_WITHIN
        return self._bits.explored(await self._populations(range(MAX_DEPTH + 1), since))

    async def count_neighbours(self, own: int, order_time: float) -> None:
        """After a search at ``order_time`` that saw ``own`` peers at home: look a bit up and a bit down."""
        since = order_time - GONE_WITHIN
        depth = self._bits.depth
        self._bits.counted(own, await self._populations(self._bits.depths_to_count(own), since))
        if self._bits.depth != depth:
            prefix, found = self._peer.prefix, self._bits.depth
            logger.info(
                "%s: the swarm spreads over %s of the DHT, not %s, since %s look for groups under one",
                prefix,
                figures.count(2**found, "key"),
                f"{2**depth:,}",
                figures.count(own, "peer"),
            )

    async def _populations(self, depths: range, since: float) -> dict[int, int]:
        # Now: the position may change before an answer comes.
        keys = [self._bits.key_at(self._peer.prefix, depth) for depth in depths]
        counts = await asyncio.gather(*(self._population(key, since) for key in keys))
        return dict(zip(depths, counts, strict=True))

    async def _population(self, key: str, since: float) -> int:
        """How many others of the same schema wanted to start a group under ``key`` after ``since``."""
        try:
            peers = await self._peer.declarations.read(key)
        except ShoalError as e:
            # It counts as empty. The next count puts that right.
            logger.debug("could not read who is under %r: %s", key, e)
            return 0
        return sum(
            peer_id != self._peer.peer_id
            and declaration.schema_hash == self._peer.schema_hash
            and declaration.start_time > since
            for peer_id, declaration in peers
        )
