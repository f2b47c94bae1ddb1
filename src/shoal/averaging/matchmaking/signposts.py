"""Where newcomers learn of the grid of a large swarm: a few leaders say in the DHT how it is laid out.

A newcomer looks there at once, and again when it has been without a group for a second: the grid may just begin. A
peer that has lost the others looks there, too, and so does now and then each that has a seat: the swarm may have come
apart. When the grid is given up, the last signposts say so: those of earlier rounds stand for minutes.

Any peer may lie, and a grid may have ended without a word. So a peer that joins at once, or leaves a seat, first makes
sure that others are at its new one (:func:`are_there`).
"""

from __future__ import annotations

import logging
import math
from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping

import msgspec

from shoal.averaging.grid import NO_GRID, UNKNOWN_ROUND, Grid, Layout, grid_problem
from shoal.averaging.group import GroupInfo, seat_of_key
from shoal.averaging.matchmaking.messages import Declaration
from shoal.averaging.matchmaking.peer import LocalPeer
from shoal.averaging.matchmaking.seats import PLAUSIBLE
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
PROOF = 4
"""A part of 1 / this of the members that a seat is for have to be seen there."""
MOST_APART = 4.0
"""A grid for so many times as many peers, or as few, is not taken for the other part of a swarm that came apart."""


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


def are_there(declared: Iterable[Declaration], size: int) -> bool:
    """Whether so many peers are, or just were, at a seat for ``size`` that it is one of a grid."""
    known = sum(one.swarm_round != UNKNOWN_ROUND for one in declared)
    return known >= max(SIGNERS, size // PROOF)


def find_other_grid(
    own: Grid, signposts: Mapping[PeerID, Signpost], now: float, target: int | None
) -> Grid | None:
    """Which grid there is beside that where a peer has a seat, and to which it goes if it finds others there; None: it
    stays.

    A swarm comes apart where the network does, and each part may choose a layout of its own: it has its own keys then,
    and meets the other no more. Of two grids, that which is further stays, and of two in the same round that with more
    groups. Two peers have to say the same of it, and it must be of a kind that this swarm can have.
    """
    said: dict[Layout, list[Signpost]] = defaultdict(list)
    for one in signposts.values():
        if one.grid.layout not in (own.layout, own.next_layout):
            said[one.grid.layout].append(one)
    others = []
    for words in said.values():
        latest = max(min(one.left_at, now) for one in words)
        grids = [one.grid for one in words if min(one.left_at, now) >= latest - RECENT]
        other = max(grids, key=_rank)
        if len(grids) >= SIGNERS and _may_be_of_the_same_swarm(own, other, target):
            others.append(other)
    best = max(others, key=_rank, default=NO_GRID)
    return best if _rank(best) > _rank(own) else None


def _rank(grid: Grid) -> tuple[int, int, int]:
    return grid.round, grid.layout.groups, grid.layout.size


def _may_be_of_the_same_swarm(own: Grid, other: Grid, target: int | None) -> bool:
    layout = other.layout
    return (
        target is not None
        and layout.groups > 1
        and other.round != UNKNOWN_ROUND
        and layout.size <= PLAUSIBLE * target
        and 1 / MOST_APART <= layout.places / own.swarm <= MOST_APART
    )


class Signposts:
    """Those of one averager's prefix."""

    def __init__(self, peer: LocalPeer) -> None:
        self._clock = peer.clock
        self._key = f"{peer.prefix}.grid"
        self._declarations = Declarations(peer.node, _SIGNPOSTS, peer.tasks, peer.clock, lifetime=LIFETIME)

    def leave(self, grid: Grid) -> None:
        """Say how the grid is laid out."""
        self._declarations.declare(self._key, Signpost(grid, self._clock()), _note_failure)

    async def read(self) -> dict[PeerID, Signpost]:
        """Those that stand now, or none if they cannot be read."""
        try:
            return dict(await self._declarations.read(self._key))
        except ShoalError as e:
            logger.debug("could not read %r: %s", self._key, e)
            return {}


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
