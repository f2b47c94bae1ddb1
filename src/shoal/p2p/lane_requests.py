"""Asking a peer for more bulk lanes, where only that peer can dial."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Annotated

import msgspec

from shoal.p2p.config import MAX_STRIPES
from shoal.p2p.identity import PeerID
from shoal.p2p.rpc import Ask, Method
from shoal.utils.structs import CompactStruct


class OpenLane(CompactStruct, frozen=True):
    """Please dial me once more, for bulk data."""

    stripes: Annotated[int, msgspec.Meta(ge=0, le=MAX_STRIPES)] = 0
    """So many lanes for pieces instead of one for streams."""


class LaneOpened(CompactStruct, frozen=True):
    """Whether the lane was opened, or lanes for pieces are being dialed."""

    opened: bool


OPEN_LANE = Method("shoal.host.open_lane", OpenLane, LaneOpened)


class LaneRequests:
    """Both sides of the question. ``open_lane_to(peer)`` dials, and says whether that led to a lane."""

    def __init__(
        self,
        *,
        ask: Ask,
        can_be_dialed: Callable[[], bool],
        open_lane_to: Callable[[PeerID], Awaitable[bool]],
        open_stripes_to: Callable[[PeerID, int], bool],
    ) -> None:
        self._ask = ask
        self._can_be_dialed = can_be_dialed
        self._open_lane_to = open_lane_to
        self._open_stripes_to = open_stripes_to

    async def ask(self, peer: PeerID, deadline: float, stripes: int = 0) -> bool:
        """Ask ``peer`` to dial this host; False at once if nobody can. ``stripes``: how many lanes for pieces, instead
        of one for streams.
        """
        if not self._can_be_dialed():
            return False
        remaining = deadline - asyncio.get_running_loop().time()
        return (await self._ask(peer, OPEN_LANE, OpenLane(stripes), timeout=remaining)).opened

    async def answer(self, peer: PeerID, request: OpenLane) -> LaneOpened:
        """Answers :data:`OPEN_LANE`."""
        if request.stripes:
            return LaneOpened(self._open_stripes_to(peer, request.stripes))
        return LaneOpened(await self._open_lane_to(peer))
