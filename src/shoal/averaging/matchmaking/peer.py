"""What the searches of one averager share: who this peer is, and what it says of itself."""

from __future__ import annotations

import logging
import random
from collections.abc import Sequence
from dataclasses import dataclass, field

from shoal.averaging.group import NONCE_BYTES, MemberInfo, PeerMode, SignedMemberInfo, sign_member
from shoal.averaging.matchmaking.declarations import DECLARATION_LIFETIME, SEARCHES
from shoal.averaging.matchmaking.events import Place
from shoal.averaging.matchmaking.families import Station, why_stand_back
from shoal.averaging.matchmaking.messages import Declaration, DeclaredState, SearchId, search_marks
from shoal.averaging.matchmaking.schemas import OtherSchemas
from shoal.averaging.matchmaking_config import MatchmakingConfig
from shoal.dht.declarations import Declarations
from shoal.dht.node import DHTNode
from shoal.p2p.identity import PeerID
from shoal.utils.tasks import TaskSet
from shoal.utils.timed import DHTClock

MAX_SHOWN = 3
"""Addresses in a line for people."""

logger = logging.getLogger(__name__)


def declared_bandwidth(given: float | None, upload_rate: float | None) -> float | None:
    """What a peer says of its bandwidth, in Mbit/s: what its user gave, else what it measured, to two digits, so that
    shares do not change in every round.

    :param upload_rate: bytes a second; None: not known
    """
    if given is not None or upload_rate is None:
        return given
    return float(f"{8e-6 * upload_rate:.2g}")


@dataclass
class LocalPeer:
    """This peer as a matchmaker sees it; times are those of ``clock``, DHT seconds."""

    node: DHTNode
    prefix: str
    schema_hash: bytes
    config: MatchmakingConfig
    wanted_mode: PeerMode
    bandwidth: float | None
    clock: DHTClock
    rng: random.Random
    others: OtherSchemas
    tasks: TaskSet = field(default_factory=TaskSet)
    declarations: Declarations[Declaration] = field(init=False)
    stands_back: str | None = field(default=None, init=False)
    """Why it takes part as a client although it can be dialed; see :mod:`.families`."""

    def __post_init__(self) -> None:
        self.declarations = Declarations(
            self.node, SEARCHES, self.tasks, self.clock, lifetime=DECLARATION_LIFETIME
        )

    @property
    def peer_id(self) -> PeerID:
        return self.node.peer_id

    @property
    def mode(self) -> PeerMode:
        """What it does in groups now. A peer that others cannot dial is a client, which may show while it searches."""
        if self.wanted_mode is not PeerMode.FULL:
            return self.wanted_mode
        is_full = self.node.host.reachability.is_full and self.stands_back is None
        return PeerMode.FULL if is_full else PeerMode.CLIENT

    def look_at(self, declared: Sequence[tuple[PeerID, Declaration]]) -> None:
        """Take in who is declared beside it: whether some of them cannot dial it may change its mode."""
        others = [
            Station(declaration.mode.can_lead, declaration.addresses)
            for peer_id, declaration in declared
            if peer_id != self.peer_id and declaration.schema_hash == self.schema_hash
        ]
        before = self.stands_back
        self.stands_back = why_stand_back(self.addresses(), others, self.config.target_group_size)
        if self.stands_back is not None and before is None:
            logger.info("%s: %s", self.prefix, self.stands_back)

    def addresses(self) -> tuple[str, ...]:
        return tuple(str(address) for address in self.node.host.announced_addresses)

    def how_to_join(self) -> str:
        """For people: by which addresses others join the DHT of this peer."""
        addresses = self.node.host.announced_addresses
        if addresses:
            shown = [str(address.with_peer_id(self.peer_id)) for address in addresses[:MAX_SHOWN]]
            where = " on this machine" if all(address.is_loopback for address in addresses) else ""
            return f"Others{where} join by initial_peers={shown}"
        given = self.node.initial_peers[:MAX_SHOWN]
        return "No other peer can dial this one" + (
            f": others join by initial_peers={given}" if given else ""
        )

    def after_search(self, order_time: float) -> float:
        """What a search at ``order_time`` that ends now leaves behind: the peer's later ones have places after that.

        Not as far ahead as it may have been scheduled, or this peer would come last in every search until then.
        """
        return min(order_time, self.clock() + self.config.min_matchmaking_time)

    def declaration(
        self, place: Place, mode: PeerMode, state: DeclaredState, group: tuple[SearchId, ...]
    ) -> Declaration:
        taken = state is DeclaredState.TAKEN
        return Declaration(
            start_time=self.after_search(place.order_time) if taken else place.order_time,
            state=state,
            schema_hash=self.schema_hash,
            mode=mode,
            addresses=self.addresses(),
            group=search_marks(group),
            grid_round=place.grid_round,
            lineage=place.lineage,
            lost=place.lost,
            swarm_round=place.grid.round,
        )

    def sign_info(self, leader: PeerID, place: Place, gather: bytes, weight: float) -> SignedMemberInfo:
        """What this peer says of itself to ``leader`` now."""
        info = MemberInfo(
            peer_id=self.peer_id.to_bytes(),
            leader=leader.to_bytes(),
            key=place.key,
            schema_hash=self.schema_hash,
            mode=self.mode,
            bandwidth=declared_bandwidth(self.bandwidth, self.node.host.upload_rate),
            addresses=self.addresses(),
            gather=gather,
            start_time=place.order_time,
            signed_at=self.clock(),
            nonce=self.rng.randbytes(NONCE_BYTES),
            weight=weight,
            grid_round=place.grid_round,
            lineage=place.lineage,
            grid=place.grid,
            lost=place.lost,
        )
        return sign_member(self.node.host.identity, info)
