"""Where newcomers learn of the grid of a large swarm: a few leaders say in the DHT how it is laid out.

A newcomer looks there at once, and again when it has been without a group for a second: the grid may just begin. A
peer that has lost the others looks there, too. When the grid is given up, the last signposts say so: those of earlier
rounds stand for minutes.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Collection

import msgspec

from shoal.averaging.grid import NO_GRID, Grid, grid_problem
from shoal.averaging.group import GroupInfo, seat_of_key
from shoal.averaging.matchmaking.peer import LocalPeer
from shoal.dht.declaration_kind import DeclarationKind
from shoal.dht.declarations import Declarations
from shoal.errors import InvalidValueError, ShoalError
from shoal.p2p.identity import PeerID
from shoal.utils.structs import CompactStruct

logger = logging.getLogger(__name__)

LIFETIME = 600.0
"""Seconds for which a signpost stands: rounds may be minutes apart."""
SIGNERS = 2
"""The leaders of the first groups, so many, leave one after each round."""
RECENT = 10.0
"""Signposts that are older than the latest one by more seconds are of earlier rounds."""


class Signpost(CompactStruct, frozen=True):
    """What one peer said of the grid, and when."""

    grid: Grid
    left_at: float
    """Seconds, by the time of the DHT."""


def leaves_signpost(group: GroupInfo, peer_id: PeerID) -> bool:
    """Whether this peer is to leave a signpost after a round of ``group``."""
    number = seat_of_key(group.key)
    return group.leader == peer_id and (number is None or number < SIGNERS)


def choose_signpost(signposts: Collection[Signpost], now: float, after: float = -math.inf) -> Grid | None:
    """Which grid to join: of the latest words that of the latest round, and of equal ones that with most peers.

    ``after``: when this peer gave a grid up; what was said before that was said of that one. None: there is no grid.
    """
    signposts = [one for one in signposts if one.left_at > after]
    times = [min(one.left_at, now) for one in signposts]  # a wrong clock, or a liar, is not later than all
    latest = max(times, default=0.0)
    recent = [one.grid for one, at in zip(signposts, times, strict=True) if at >= latest - RECENT]
    grid = max(
        recent,
        key=lambda grid: (grid.round, round(grid.swarm, -1), grid.layout.groups, grid.layout.size),
        default=NO_GRID,
    )
    return grid if grid.layout.groups > 1 else None


class Signposts:
    """Those of one averager's prefix."""

    def __init__(self, peer: LocalPeer) -> None:
        self._clock = peer.clock
        self._key = f"{peer.prefix}.grid"
        self._declarations = Declarations(peer.node, _SIGNPOSTS, peer.tasks, peer.clock, lifetime=LIFETIME)

    def leave(self, grid: Grid) -> None:
        """Say how the grid is laid out."""
        self._declarations.declare(self._key, Signpost(grid, self._clock()), _note_failure)

    async def read(self, after: float = -math.inf) -> Grid | None:
        """The grid that there is, by what was said ``after`` that time; None: none that is known."""
        try:
            declared = await self._declarations.read(self._key)
        except ShoalError as e:
            logger.debug("could not read %r: %s", self._key, e)
            return None
        return choose_signpost([signpost for _, signpost in declared], self._clock(), after)


def _note_failure(seconds: float, failure: str | None) -> None:
    if failure is not None:
        logger.debug("could not leave a signpost: %s", failure)


_encoder = msgspec.msgpack.Encoder()
_decoder = msgspec.msgpack.Decoder(Signpost)


def _decode(raw: object) -> Signpost:
    if not isinstance(raw, bytes):
        raise InvalidValueError(f"a signpost must be bytes, got {type(raw).__name__}")
    try:
        signpost = _decoder.decode(raw)
    except msgspec.DecodeError as e:
        raise InvalidValueError(f"not a signpost: {e}") from e
    problem = grid_problem(signpost.grid)
    if problem is None and not math.isfinite(signpost.left_at):
        problem = f"time of {signpost.left_at}"
    if problem is not None:
        raise InvalidValueError(f"a signpost with a {problem}")
    return signpost


_SIGNPOSTS = DeclarationKind[Signpost]("a signpost", _encoder.encode, _decode)
