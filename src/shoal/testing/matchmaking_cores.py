"""A swarm of matchmaking cores over an imagined network and DHT: fast, so that many seeds can be told."""

from __future__ import annotations

import functools
import heapq
import itertools
import math
import random
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field

from shoal.averaging.grid import NO_GRID, Grid
from shoal.averaging.group import (
    SCHEMA_HASH_BYTES,
    GroupInfo,
    MemberInfo,
    PeerMode,
    group_key,
    order_members,
    seat_key,
)
from shoal.averaging.lineage import NO_LINEAGE, Lineage
from shoal.averaging.matchmaking.candidate import Candidate
from shoal.averaging.matchmaking.core import SearchCore
from shoal.averaging.matchmaking.declarations import DECLARATION_LIFETIME
from shoal.averaging.matchmaking.events import (
    AnswerRequest,
    AskToJoin,
    BeginGroup,
    Declare,
    Declared,
    DismissFollower,
    DistrustLeader,
    Effect,
    Event,
    FinishWithGroup,
    FinishWithout,
    FollowerLost,
    JoinRequested,
    LeaderAccepted,
    LeaderBegan,
    LeaderDismissed,
    LeaderLost,
    LeaderPostponed,
    LeaderRedirected,
    LeaderRejected,
    LeaveLeader,
    Log,
    MissedRounds,
    MoveTo,
    Place,
    Poll,
    Polled,
    PostponeFollower,
    Restarted,
    SearchStarted,
    TooFew,
    TooMany,
)
from shoal.averaging.matchmaking.group_bits import GroupBits
from shoal.averaging.matchmaking.group_keys import GroupKeys
from shoal.averaging.matchmaking.matchmaker import REGROUP
from shoal.averaging.matchmaking.memory import HELD_ITS_FOLLOWER, FailureMemory
from shoal.averaging.matchmaking.messages import (
    Accepted,
    Declaration,
    DeclaredState,
    Redirect,
    Rejected,
    search_marks,
)
from shoal.averaging.matchmaking.signposts import Signpost, are_there, choose_signpost, find_other_grid
from shoal.averaging.matchmaking.view import NOTHING_KNOWN, Known
from shoal.averaging.matchmaking_config import MatchmakingConfig
from shoal.p2p.identity import Identity, PeerID
from shoal.sansio.core import NEVER, TimePassed

__all__ = ["StallingCore", "SwarmOfCores", "core_peer_id"]

SCHEMA = bytes(SCHEMA_HASH_BYTES)
PREFIX = "swarm"
KEY = group_key(PREFIX)


@functools.cache
def core_peer_id(number: int) -> PeerID:
    """The id of the peer with this number, below 2^32."""
    return Identity.generate(number.to_bytes(4, "big") * 8).peer_id


class StallingCore:
    """A liar: it declares itself like a search, accepts all that ask it, and puts its group off for ever."""

    EVERY = 2.0
    """Seconds between two words to each follower."""

    def __init__(self, peer_id: PeerID, key: str, start_time: float) -> None:
        self.me = Candidate(start_time, peer_id, can_lead=True)
        self.key = key
        self.deadline = NEVER
        self.held: set[int] = set()
        """The followers that it has now, by token."""
        self.asked = 0

    def handle(self, event: Event, now: float) -> list[Effect]:
        effects: list[Effect] = []
        match event:
            case SearchStarted():
                effects = [Declare(DeclaredState.LOOKING)]
            case JoinRequested(token):
                self.held.add(token)
                self.asked += 1
                effects = [AnswerRequest(token, Accepted(5.0))]
            case FollowerLost(token):
                self.held.discard(token)
            case TimePassed():
                effects = [PostponeFollower(token, 5.0) for token in self.held]
        self.deadline = now + self.EVERY if self.held else NEVER
        return effects


@dataclass
class Peer:
    """One core with the imagined I/O around it."""

    peer_id: PeerID
    mode: PeerMode
    core: SearchCore | StallingCore
    one_way: float
    start_at: float
    store_time: float
    poll_time: float
    key: str = KEY
    bits: GroupBits | None = None
    keys: GroupKeys | None = None
    order_time: float = 0.0
    """As it was declared last."""
    swarm_round: int = 0
    alive: bool = True
    group: tuple[bytes, ...] | None = None
    group_id: int | None = None
    formed: GroupInfo | None = None
    failure: str | None = None
    finished_at: float = math.inf
    when_over: Callable[[Peer], None] | None = None
    """Called when its search has ended."""
    timer: int = 0
    token_owner: dict[int, tuple[PeerID, int]] = field(default_factory=dict)
    """Who asked under this token, and the number of its request."""
    asked: dict[int, PeerID] = field(default_factory=dict)


class SwarmOfCores:
    """Cores exchange messages with random delays; the DHT shows a record some time after it is stored."""

    def __init__(self, seed: int, config: MatchmakingConfig) -> None:
        self.rng = random.Random(seed)
        self.config = config
        self.now = 1000.0
        self.queue: list[tuple[float, int, Callable[[], None]]] = []
        self.count = itertools.count()
        self.records: dict[str, dict[PeerID, tuple[Declaration, float]]] = defaultdict(dict)
        """Under each key: what each peer stored last, and when it expires."""
        self.peers: dict[PeerID, Peer] = {}
        self.polls = 0
        """How often the DHT was read."""
        self.signposts: dict[PeerID, Signpost] = {}
        """What leaders have said of the grid of a large swarm."""
        self.left_grid_at: dict[PeerID, float] = defaultdict(lambda: -math.inf)
        """When each peer gave a grid up: it follows later signposts alone."""
        self.memories: dict[PeerID, FailureMemory] = defaultdict(
            lambda: FailureMemory(lambda peer: True, lambda peer: 1)
        )

    def search(
        self,
        peer_id: PeerID,
        starts_in: float = 0.0,
        mode: PeerMode = PeerMode.FULL,
        *,
        lineage: Lineage = NO_LINEAGE,
        known: Known = NOTHING_KNOWN,
        bits: GroupBits | None = None,
        keys: GroupKeys | None = None,
        config: MatchmakingConfig | None = None,
        waits: int = 6,
    ) -> Peer:
        """Let a peer begin a search in ``starts_in`` seconds; its searches before must be over.

        ``bits``, or ``keys``: what chooses its keys, and is told when it found too few. ``config``: another one than
        the others'. ``waits``: how often the search can wait for ``min_matchmaking_time`` until its deadline.
        """
        start_at = self.now + starts_in
        key = KEY
        if bits is not None:
            key += bits.bits
        if keys is not None:
            key = keys.key(PREFIX)
        config = self.config if config is None else config
        core = SearchCore(
            config,
            peer_id=peer_id,
            mode=mode,
            schema_hash=SCHEMA,
            key=key,
            start_time=start_at + config.min_matchmaking_time,
            deadline=start_at + waits * config.min_matchmaking_time,
            swarm_round=0 if keys is None else keys.grid.round,
            expects=0 if keys is None else keys.expects,
            may_spread=keys is not None and keys.may_spread,
            lineage=lineage,
            known=known,
            lost=self.lost_of(peer_id),
        )
        return self._add(peer_id, mode, core, start_at, key, bits, keys)

    def stall(self, peer_id: PeerID, starts_in: float = 0.0) -> StallingCore:
        """Let a peer hold all that ask it, from its place in the order on."""
        start_at = self.now + starts_in
        core = StallingCore(peer_id, KEY, start_at + self.config.min_matchmaking_time)
        self._add(peer_id, PeerMode.FULL, core, start_at, KEY, None)
        return core

    def lost_of(self, peer_id: PeerID) -> tuple[bytes, ...]:
        """Whom a peer says that it saw fail."""
        return tuple(peer.to_bytes() for peer in self.memories[peer_id].avoided(self.now))

    def _add(
        self,
        peer_id: PeerID,
        mode: PeerMode,
        core: SearchCore | StallingCore,
        start_at: float,
        key: str,
        bits: GroupBits | None,
        keys: GroupKeys | None = None,
    ) -> Peer:
        one_way = self.rng.uniform(0.001, 0.1) / 2
        lookup = 2 * (one_way + 0.05) * self.rng.uniform(1.0, 2.0)
        peer = self.peers[peer_id] = Peer(
            peer_id, mode, core, one_way, start_at, 2 * lookup, lookup, key, bits, keys
        )
        if isinstance(core, SearchCore):
            peer.order_time, peer.swarm_round = core.me.start_time, core.me.swarm_round
        self.at(start_at, lambda: self.send(peer_id, SearchStarted()))
        return peer

    def at(self, when: float, action: Callable[[], None]) -> None:
        heapq.heappush(self.queue, (when, next(self.count), action))

    def run(self) -> None:
        """Until nothing is to come any more: all searches are over."""
        self.run_until(math.inf)

    def run_until(self, end: float) -> None:
        """Until that time at the latest: liars never come to an end."""
        while self.queue and self.queue[0][0] <= end:
            self.now, _, action = heapq.heappop(self.queue)
            action()

    def send(self, to: PeerID, event: Event) -> None:
        peer = self.peers[to]
        if not peer.alive:
            return
        for effect in peer.core.handle(event, self.now):
            self.apply(peer, effect)
        self.set_timer(peer)

    def set_timer(self, peer: Peer) -> None:
        peer.timer += 1
        timer, deadline = peer.timer, peer.core.deadline
        if deadline < NEVER:
            self.at(max(deadline, self.now), lambda: self.fire(peer, timer))

    def deliver(self, sender: Peer, to: PeerID, event: Event) -> None:
        """In order between two peers, as on one stream: the delay of a pair does not vary."""
        self.at(self.now + sender.one_way + self.peers[to].one_way, lambda: self.send(to, event))

    def apply(self, peer: Peer, effect: Effect) -> None:
        match effect:
            case Declare(state, group):
                me, key = peer.core.me, peer.key
                # As the shell does: what is said of the place before is said before the search moves.
                start_time = me.start_time if peer.keys is None else peer.order_time
                record = Declaration(
                    start_time,
                    state,
                    SCHEMA,
                    peer.mode,
                    (),
                    search_marks(group),
                    lineage=me.lineage,
                    lost=me.lost,
                    swarm_round=peer.swarm_round,
                )
                seconds = peer.store_time
                self.at(
                    self.now + seconds * self.rng.uniform(0.6, 1.0), lambda: self.store(peer, key, record)
                )
                self.at(self.now + seconds, lambda: self.send(peer.peer_id, Declared(seconds)))
            case Poll():
                began = self.now
                self.polls += 1
                self.at(began + peer.poll_time * self.rng.uniform(0.4, 0.9), lambda: self.read(peer, began))
            case MoveTo(place):
                peer.key = place.key
                peer.order_time, peer.swarm_round = place.order_time, place.grid.round
            case DistrustLeader(leader, fault):
                self.memories[peer.peer_id].note(leader, fault, self.now)
                if fault in HELD_ITS_FOLLOWER:
                    self.at(self.now, lambda: self.regroup(peer))
            case TooFew(seen):
                if peer.bits is not None and peer.bits.found_too_few(seen):
                    self.at(self.now, lambda: self.move(peer))
                if peer.keys is not None:
                    self.at(self.now, lambda: self.look_elsewhere(peer, seen))
            case TooMany() | MissedRounds():
                self.at(self.now, lambda: self.move_in_grid(peer, effect))
            case FinishWithGroup(group):
                peer.group = tuple(member.peer_id for member in group.members)
                peer.formed = group
                peer.group_id = int.from_bytes(group.group_id, "big")
                self.finish(peer)
            case FinishWithout(explanation):
                peer.failure = explanation
                self.finish(peer)
            case _:
                self.tell_others(peer, effect)

    def finish(self, peer: Peer) -> None:
        peer.finished_at = self.now
        if peer.when_over is not None:
            peer.when_over(peer)

    def tell_others(self, peer: Peer, effect: Effect) -> None:
        match effect:
            case AskToJoin(ask, leader, _):
                peer.asked[ask] = leader
                token = next(self.count)
                other = self.peers[leader]
                if other.alive:
                    other.token_owner[token] = (peer.peer_id, ask)
                    self.deliver(peer, leader, JoinRequested(token, self.info(peer, leader)))
                else:
                    self.at(self.now + 0.1, lambda: self.send(peer.peer_id, LeaderLost(ask, "refused")))
            case LeaveLeader(ask):
                asked = self.peers[peer.asked[ask]]
                for token, owner in asked.token_owner.items():
                    if owner == (peer.peer_id, ask):
                        self.deliver(peer, asked.peer_id, FollowerLost(token, "left"))
            case AnswerRequest(token, answer):
                asker, ask = peer.token_owner[token]
                self.deliver(peer, asker, _as_event(ask, answer))
            case PostponeFollower(token, begins_in):
                asker, ask = peer.token_owner[token]
                self.deliver(peer, asker, LeaderPostponed(ask, begins_in))
            case DismissFollower(token, message):
                asker, ask = peer.token_owner[token]
                self.deliver(peer, asker, LeaderDismissed(ask, message))
            case BeginGroup():
                self.begin(peer, effect)
            case Log():
                pass

    def fire(self, peer: Peer, timer: int) -> None:
        if peer.timer == timer:
            self.send(peer.peer_id, TimePassed())

    def move(self, peer: Peer) -> None:
        """Begin the search anew under the key that the peer's bits, or its seat, name now."""
        if peer.finished_at == math.inf:
            start_time = self.now + self.config.min_matchmaking_time
            self.send(peer.peer_id, Restarted(self.place(peer, start_time), peer.mode))

    def place(self, peer: Peer, start_time: float, lost: tuple[bytes, ...] = ()) -> Place:
        """Where a peer's search goes on."""
        keys, lineage = peer.keys, peer.core.me.lineage
        if keys is None:
            key = peer.key if peer.bits is None else KEY + peer.bits.bits
            return Place(key, start_time, start_time, 0, lineage, lost)
        return Place(
            keys.key(PREFIX),
            start_time,
            start_time,
            0,
            NO_LINEAGE if keys.has_seat else lineage,
            lost,
            keys.grid,
            keys.expects,
            keys.may_spread,
        )

    def look_elsewhere(self, peer: Peer, seen: int) -> None:
        """Too few were under a peer's key at its start time."""
        if peer.keys is None or peer.finished_at < math.inf:
            return
        if peer.keys.found_too_few(seen):
            self.move(peer)
        if peer.keys.has_seat:
            self.look_for_grid(peer)

    def move_in_grid(self, peer: Peer, effect: TooMany | MissedRounds) -> None:
        """Peers that know of no grid are too many for one key, or the others have gone on without one that does."""
        if peer.keys is None or peer.finished_at < math.inf:
            return
        match effect:
            case TooMany(seen, rank):
                finds_another = self.look_for_grid(peer)
                moves = not finds_another and peer.keys.spread(seen, rank, self.config.target_group_size)
            case MissedRounds(missed):
                moves = peer.keys.catch_up(missed, self.rng.getrandbits(32))
        if moves:
            self.move(peer)

    def look_for_grid(self, peer: Peer) -> bool:
        """A peer that is not at a seat looks whether others make a grid, and moves to a seat there."""
        keys = peer.keys
        if keys is None or keys.is_seated or peer.finished_at < math.inf:
            return False
        grid = choose_signpost(self.signposts.values(), self.now, self.left_grid_at[peer.peer_id])
        if grid is None or not keys.join_grid(grid, self.rng.getrandbits(32)):
            return False
        self.move(peer)
        return True

    def arrive(self, peer: Peer) -> None:
        """A new peer joins the grid that there is at once, if others are there."""
        keys = peer.keys
        if keys is not None and not keys.has_seat:
            self._go_where_others_are(peer, choose_signpost(self.signposts.values(), self.now))

    def look_for_other_grid(self, peer: Peer) -> None:
        """A peer with a seat looks whether the swarm has come apart."""
        keys = peer.keys
        if keys is not None and keys.has_seat:
            target = peer.core.config.target_group_size if isinstance(peer.core, SearchCore) else None
            self._go_where_others_are(peer, find_other_grid(keys.grid, self.signposts, self.now, target))

    def _go_where_others_are(self, peer: Peer, grid: Grid | None) -> None:
        keys = peer.keys
        if grid is None or keys is None or peer.finished_at < math.inf:
            return
        draw = self.rng.getrandbits(32)
        records = self.records[seat_key(PREFIX, grid.layout.groups, draw % grid.layout.groups)]
        declared = (record for record, until in records.values() if until > self.now)
        if are_there(declared, grid.layout.size) and keys.join_grid(grid, draw):
            self.move(peer)

    def regroup(self, peer: Peer) -> None:
        """Begin the search anew, apart from a leader that stalled it; as the matchmaker does."""
        if peer.finished_at == math.inf:
            start_time = self.now + min(REGROUP, self.config.min_matchmaking_time)
            place = self.place(peer, start_time, self.lost_of(peer.peer_id))
            self.send(peer.peer_id, Restarted(place, peer.mode))

    def population(self, bits: str, since: float, but: PeerID) -> int:
        """How many peers, ``but`` one, wanted to start a group under these bits after ``since``."""
        return sum(
            peer_id != but and record.start_time > since and until > self.now
            for peer_id, (record, until) in self.records[KEY + bits].items()
        )

    def store(self, peer: Peer, key: str, record: Declaration) -> None:
        # Stores of one peer are in order, as its expiration times grow.
        records = self.records[key]
        before = records.get(peer.peer_id)
        if (
            before is None
            or before[0].state is DeclaredState.LOOKING
            or before[0].start_time < record.start_time
        ):
            records[peer.peer_id] = (record, self.now + DECLARATION_LIFETIME)

    def read(self, peer: Peer, began: float) -> None:
        key = peer.key
        records = self.records[key]
        for peer_id in [peer_id for peer_id, (_, until) in records.items() if until <= self.now]:
            del records[peer_id]
        seen = tuple((peer_id, record) for peer_id, (record, _) in records.items())
        self.at(began + peer.poll_time, lambda: self.show(peer, key, Polled(began, seen)))

    def show(self, peer: Peer, key: str, polled: Polled) -> None:
        if peer.key == key:
            self.send(peer.peer_id, polled)

    def info(self, peer: Peer, leader: PeerID) -> MemberInfo:
        return MemberInfo(
            peer_id=peer.peer_id.to_bytes(),
            leader=leader.to_bytes(),
            key=peer.core.key,
            schema_hash=SCHEMA,
            mode=peer.mode,
            bandwidth=None,
            addresses=(),
            gather=b"",
            start_time=peer.core.me.start_time,
            signed_at=self.now,
            nonce=bytes(16),
            lineage=peer.core.me.lineage,
            grid=NO_GRID if peer.keys is None else peer.keys.grid,
            lost=peer.core.me.lost,
        )

    def begin(self, leader: Peer, effect: BeginGroup) -> None:
        owners = [leader.token_owner[token] for token in effect.tokens]
        infos = [self.info(self.peers[peer_id], leader.peer_id) for peer_id, _ in owners]
        infos.append(self.info(leader, leader.peer_id))
        number = next(self.count)
        members = order_members(leader.peer_id, infos)
        group = GroupInfo(number.to_bytes(16, "big"), leader.core.key, members, effect.seen, effect.before)
        for peer_id, ask in owners:
            self.deliver(leader, peer_id, LeaderBegan(ask, group))
        self.apply(leader, FinishWithGroup(group))

    def left_over(self) -> list[Peer]:
        """Who lives and has found no group, liars left out."""
        return [
            peer
            for peer in self.peers.values()
            if peer.group is None and peer.alive and isinstance(peer.core, SearchCore)
        ]


def _as_event(ask: int, answer: Accepted | Redirect | Rejected) -> Event:
    match answer:
        case Accepted(begins_in):
            return LeaderAccepted(ask, begins_in)
        case Redirect(leader, addresses):
            return LeaderRedirected(ask, PeerID.from_bytes(leader), addresses)
        case Rejected():
            return LeaderRejected(ask, answer)
