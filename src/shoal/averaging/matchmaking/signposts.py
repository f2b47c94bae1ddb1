"""Where newcomers learn of the grid of a large swarm: a few leaders say in the DHT how it is laid out.

A newcomer looks there once it has been without a group for a second, since the swarms that it finds at once have no
grid. Whoever has lost the others looks there, too.
"""

from __future__ import annotations

import logging

import msgspec

from shoal.averaging.grid import Grid, grid_problem
from shoal.averaging.group import GroupInfo, seat_of_key
from shoal.averaging.matchmaking.peer import LocalPeer
from shoal.dht.declaration_kind import DeclarationKind
from shoal.dht.declarations import Declarations
from shoal.errors import InvalidValueError, ShoalError
from shoal.p2p.identity import PeerID

logger = logging.getLogger(__name__)

LIFETIME = 600.0
"""Seconds for which a signpost stands: rounds may be minutes apart."""
SIGNERS = 2
"""The leaders of the first groups, so many, leave one after each round."""


def leaves_signpost(group: GroupInfo, peer_id: PeerID) -> bool:
    """Whether this peer is to leave a signpost after a round of ``group``."""
    number = seat_of_key(group.key)
    if group.leader != peer_id or min(group.ranks, default=0) > 0:
        return False
    return number is None or number < SIGNERS


def choose_signpost(grids: list[Grid]) -> Grid | None:
    """Which grid to join: that with most peers; of one grid the latest word."""
    grids = [grid for grid in grids if grid.layout.groups > 1]
    return max(
        grids,
        key=lambda grid: (round(grid.swarm, -1), grid.round, grid.layout.groups, grid.layout.size),
        default=None,
    )


class Signposts:
    """Those of one averager's prefix."""

    def __init__(self, peer: LocalPeer) -> None:
        self._key = f"{peer.prefix}.grid"
        self._declarations = Declarations(peer.node, _SIGNPOSTS, peer.tasks, peer.clock, lifetime=LIFETIME)

    def leave(self, grid: Grid) -> None:
        """Say how the grid is laid out."""
        self._declarations.declare(self._key, grid, _note_failure)

    async def read(self) -> Grid | None:
        """The grid that there is; None: none that is known."""
        try:
            declared = await self._declarations.read(self._key)
        except ShoalError as e:
            logger.debug("could not read %r: %s", self._key, e)
            return None
        return choose_signpost([grid for _, grid in declared])


def _note_failure(seconds: float, failure: str | None) -> None:
    if failure is not None:
        logger.debug("could not leave a signpost: %s", failure)


_encoder = msgspec.msgpack.Encoder()
_decoder = msgspec.msgpack.Decoder(Grid)


def _decode(raw: object) -> Grid:
    if not isinstance(raw, bytes):
        raise InvalidValueError(f"a signpost is bytes, not {type(raw).__name__}")
    try:
        grid = _decoder.decode(raw)
    except msgspec.DecodeError as e:
        raise InvalidValueError(f"not a signpost: {e}") from e
    problem = grid_problem(grid)
    if problem is not None:
        raise InvalidValueError(f"a signpost with a {problem}")
    return grid


_SIGNPOSTS = DeclarationKind[Grid]("a signpost", _encoder.encode, _decode)
