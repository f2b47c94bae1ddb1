"""What the searches of one averager share: who this peer is, and what it says of itself."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, field

from shoal.averaging.group import NONCE_BYTES, MemberInfo, PeerMode, SignedMemberInfo, sign_member
from shoal.averaging.matchmaking.core import MatchmakingConfig
from shoal.averaging.matchmaking.declarations import Declarations
from shoal.averaging.matchmaking.events import Place
from shoal.averaging.matchmaking.messages import Declaration, DeclaredState, Search
from shoal.dht.node import DHTNode
from shoal.dht.tasks import TaskSet
from shoal.p2p.identity import PeerID


@dataclass(frozen=True)
class LocalPeer:
    """This peer as a matchmaker sees it; times are those of ``clock``, DHT seconds."""

    node: DHTNode
    prefix: str
    schema_hash: bytes
    config: MatchmakingConfig
    wanted_mode: PeerMode
    bandwidth: float | None
    clock: Callable[[], float]
    rng: random.Random
    tasks: TaskSet = field(default_factory=TaskSet)
    declarations: Declarations = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "declarations", Declarations(self.node, self.tasks, self.clock))

    @property
    def peer_id(self) -> PeerID:
        return self.node.peer_id

    @property
    def mode(self) -> PeerMode:
        """A peer whom nobody can dial cannot be full: the host may find that out only after joining the DHT."""
        if self.wanted_mode is PeerMode.FULL and not self.node.host.can_be_dialed:
            return PeerMode.CLIENT
        return self.wanted_mode

    def addresses(self) -> tuple[str, ...]:
        return tuple(str(address) for address in self.node.host.announced_addresses)

    def after_search(self, order_time: float) -> float:
        """What a search at ``order_time`` that ends now leaves behind: the peer's later ones have places after that.

        Not as far ahead as it may have been scheduled, or this peer would come last in every search until then.
        """
        return min(order_time, self.clock() + self.config.min_matchmaking_time)

    def declaration(
        self, place: Place, mode: PeerMode, state: DeclaredState, group: tuple[Search, ...]
    ) -> Declaration:
        taken = state is DeclaredState.TAKEN
        return Declaration(
            start_time=self.after_search(place.order_time) if taken else place.order_time,
            state=state,
            schema_hash=self.schema_hash,
            mode=mode,
            addresses=self.addresses(),
            group=group,
            grid_round=place.grid_round,
            lineage=place.lineage,
            lost=place.lost,
        )

    def sign_info(self, leader: PeerID, place: Place, gather: bytes, weight: float) -> SignedMemberInfo:
        """What this peer says of itself to ``leader`` now."""
        info = MemberInfo(
            peer_id=self.peer_id.to_bytes(),
            leader=leader.to_bytes(),
            key=place.key,
            schema_hash=self.schema_hash,
            mode=self.mode,
            bandwidth=self.bandwidth,
            addresses=self.addresses(),
            gather=gather,
            start_time=place.order_time,
            signed_at=self.clock(),
            nonce=self.rng.randbytes(NONCE_BYTES),
            weight=weight,
            grid_round=place.grid_round,
            lineage=place.lineage,
            lost=place.lost,
        )
        return sign_member(self.node.host.identity, info)
