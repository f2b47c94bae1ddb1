"""A swarm of matchmaking cores over an imagined network and DHT: fast, so that many seeds can be told."""

from __future__ import annotations

import heapq
import itertools
import math
import random
from dataclasses import dataclass, field

import pytest

from shoal.averaging.group import GroupInfo, MemberInfo, PeerMode, order_members
from shoal.averaging.grouping import plan_groups
from shoal.averaging.join_messages import Accepted, Declaration, DeclaredState, Redirect, Rejected
from shoal.averaging.matchmaking import Matchmaking, MatchmakingConfig
from shoal.averaging.matchmaking_events import (
    AnswerRequest,
    AskToJoin,
    BeginGroup,
    Declare,
    Declared,
    DismissFollower,
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
    Poll,
    Polled,
    PostponeFollower,
    SearchStarted,
    SetTimer,
    TimerFired,
)
from shoal.p2p.identity import Identity, PeerID

SCHEMA = bytes(32)
KEY = "swarm.0b"
PEER_IDS = [Identity.generate(bytes([index]) * 32).peer_id for index in range(16)]


@dataclass
class Peer:
    """One core with the imagined I/O around it."""

    peer_id: PeerID
    mode: PeerMode
    core: Matchmaking
    one_way: float
    start_at: float
    store_time: float
    poll_time: float
    alive: bool = True
    group: tuple[bytes, ...] | None = None
    group_id: int | None = None
    failure: str | None = None
    finished_at: float = math.inf
    timer: int = 0
    token_owner: dict[int, tuple[PeerID, int]] = field(default_factory=dict)
    """Who asked under this token, and the number of its request."""
    asked: dict[int, PeerID] = field(default_factory=dict)


class Swarm:
    """Cores exchanging messages with random delays; a DHT that shows a record some time after it is stored."""

    def __init__(self, seed: int, config: MatchmakingConfig, peers: int, clients: int, jitter: float) -> None:
        self.rng = random.Random(seed)
        self.config = config
        self.now = 1000.0
        self.queue: list[tuple[float, int, object]] = []
        self.count = itertools.count()
        self.records: dict[PeerID, Declaration] = {}
        self.log: list[str] = []
        self.peers: dict[PeerID, Peer] = {}
        ids = self.rng.sample(PEER_IDS, peers)
        for index, peer_id in enumerate(ids):
            mode = PeerMode.CLIENT if index < clients else PeerMode.FULL
            self._add(peer_id, mode, self.now + self.rng.uniform(0, jitter))

    def _add(self, peer_id: PeerID, mode: PeerMode, start_at: float) -> None:
        core = Matchmaking(
            self.config,
            peer_id=peer_id,
            mode=mode,
            schema_hash=SCHEMA,
            key=KEY,
            start_time=start_at + self.config.min_matchmaking_time,
            deadline=start_at + 6 * self.config.min_matchmaking_time,
        )
        one_way = self.rng.uniform(0.001, 0.1) / 2
        lookup = 2 * (one_way + 0.05) * self.rng.uniform(1.0, 2.0)
        self.peers[peer_id] = Peer(peer_id, mode, core, one_way, start_at, 2 * lookup, lookup)
        self.at(start_at, lambda: self.send(peer_id, SearchStarted()))

    def at(self, when: float, action) -> None:
        heapq.heappush(self.queue, (when, next(self.count), action))

    def run(self) -> None:
        while self.queue:
            self.now, _, action = heapq.heappop(self.queue)
            action()

    def send(self, to: PeerID, event: Event) -> None:
        peer = self.peers[to]
        if not peer.alive:
            return
        name = f"p{list(self.peers).index(to)}"
        self.log.append(f"{self.now - 1000:.3f} {name} [{peer.core.state.value}] {event}")
        for effect in peer.core.handle(event, self.now):
            self.log.append(f"         {name} -> {effect}")
            self.apply(peer, effect)

    def deliver(self, sender: Peer, to: PeerID, event: Event) -> None:
        """In order between two peers, as on one stream: the delay of a pair does not vary."""
        self.at(self.now + sender.one_way + self.peers[to].one_way, lambda: self.send(to, event))

    def apply(self, peer: Peer, effect: Effect) -> None:
        match effect:
            case SetTimer(at):
                peer.timer += 1
                timer = peer.timer
                if at < math.inf:
                    self.at(max(at, self.now), lambda: self.fire(peer, timer))
            case Declare(state, group):
                record = Declaration(peer.core.me.start_time, state, SCHEMA, peer.mode, (), group)
                seconds = peer.store_time
                self.at(self.now + seconds * self.rng.uniform(0.6, 1.0), lambda: self.store(peer, record))
                self.at(self.now + seconds, lambda: self.send(peer.peer_id, Declared(seconds)))
            case Poll():
                began = self.now
                self.at(began + peer.poll_time * self.rng.uniform(0.4, 0.9), lambda: self.read(peer, began))
            case FinishWithGroup(group):
                peer.group = tuple(member.peer_id for member in group.members)
                peer.group_id = int.from_bytes(group.group_id, "big")
                peer.finished_at = self.now
            case FinishWithout(explanation):
                peer.failure = explanation
                peer.finished_at = self.now
            case _:
                self.tell_others(peer, effect)

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
                leader = self.peers[peer.asked[ask]]
                for token, owner in leader.token_owner.items():
                    if owner == (peer.peer_id, ask):
                        self.deliver(peer, leader.peer_id, FollowerLost(token, "left"))
            case AnswerRequest(token, answer):
                asker, ask = peer.token_owner[token]
                self.deliver(peer, asker, as_event(ask, answer))
            case PostponeFollower(token, begins_in):
                asker, ask = peer.token_owner[token]
                self.deliver(peer, asker, LeaderPostponed(ask, begins_in))
            case DismissFollower(token, message):
                asker, ask = peer.token_owner[token]
                self.deliver(peer, asker, LeaderDismissed(ask, message))
            case BeginGroup(tokens):
                self.begin(peer, tokens)
            case Log():
                pass

    def fire(self, peer: Peer, timer: int) -> None:
        if peer.timer == timer:
            self.send(peer.peer_id, TimerFired())

    def store(self, peer: Peer, record: Declaration) -> None:
        # Stores of one peer are in order, as its expiration times grow.
        before = self.records.get(peer.peer_id)
        if before is None or before.state is DeclaredState.LOOKING:
            self.records[peer.peer_id] = record

    def read(self, peer: Peer, began: float) -> None:
        seen = tuple(self.records.items())
        self.at(began + peer.poll_time, lambda: self.send(peer.peer_id, Polled(began, seen)))

    def info(self, peer: Peer, leader: PeerID) -> MemberInfo:
        return MemberInfo(
            peer_id=peer.peer_id.to_bytes(),
            leader=leader.to_bytes(),
            key=KEY,
            schema_hash=SCHEMA,
            mode=peer.mode,
            bandwidth=None,
            addresses=(),
            gather=b"",
            start_time=peer.core.me.start_time,
            signed_at=self.now,
            nonce=bytes(16),
        )

    def begin(self, leader: Peer, tokens: tuple[int, ...]) -> None:
        owners = [leader.token_owner[token] for token in tokens]
        infos = [self.info(self.peers[peer_id], leader.peer_id) for peer_id, _ in owners]
        infos.append(self.info(leader, leader.peer_id))
        number = next(self.count)
        group = GroupInfo(number.to_bytes(16, "big"), KEY, order_members(leader.peer_id, infos))
        for peer_id, ask in owners:
            self.deliver(leader, peer_id, LeaderBegan(ask, group))
        self.apply(leader, FinishWithGroup(group))

    # ---- what must hold

    def check_groups(self) -> None:
        minimum, target = self.config.min_group_size, self.config.target_group_size
        groups: dict[int, tuple[bytes, ...]] = {}
        for peer in self.peers.values():
            if peer.group is None:
                assert peer.failure is not None or not peer.alive
                continue
            assert peer.peer_id.to_bytes() in peer.group
            assert groups.setdefault(peer.group_id, peer.group) == peer.group
            assert minimum <= len(peer.group) <= (target or math.inf)
        members = [member for group in groups.values() for member in group]
        assert len(members) == len(set(members)), "somebody is in two groups"

    def left_over(self) -> list[Peer]:
        return [peer for peer in self.peers.values() if peer.group is None and peer.alive]


def as_event(ask: int, answer: Accepted | Redirect | Rejected) -> Event:
    match answer:
        case Accepted(begins_in):
            return LeaderAccepted(ask, begins_in)
        case Redirect(leader, addresses):
            return LeaderRedirected(ask, PeerID.from_bytes(leader), addresses)
        case Rejected():
            return LeaderRejected(ask, answer)


def make_swarm(seed: int, *, jitter: bool) -> Swarm:
    rng = random.Random(seed)
    target = rng.choice([None, 2, 3, 4, 5, 6, 7, 8])
    minimum = rng.randint(2, target or 4)
    config = MatchmakingConfig(
        target_group_size=target,
        min_group_size=minimum,
        min_matchmaking_time=rng.uniform(3.0, 6.0),
        request_timeout=rng.uniform(1.0, 6.0),
    )
    peers = rng.randint(2, 12)
    clients = rng.randint(0, peers) if rng.random() < 0.3 else 0
    window = config.min_matchmaking_time * rng.uniform(0.05, 0.8) if jitter else 0.0
    return Swarm(seed, config, peers, clients, window)


def fewest_left_over(swarm: Swarm) -> int:
    leaders = sum(peer.mode.can_lead for peer in swarm.peers.values())
    n = len(swarm.peers)
    return n - sum(plan_groups(n, swarm.config.target_group_size, swarm.config.min_group_size, leaders))


def check_same_instant(seed: int) -> None:
    swarm = make_swarm(seed, jitter=False)
    swarm.run()
    swarm.check_groups()
    left = [peer.peer_id for peer in swarm.left_over()]
    assert len(left) == fewest_left_over(swarm), f"seed {seed}: {swarm.config}: {len(left)} left over"


@pytest.mark.parametrize("first", range(0, 300, 100))
def test_peers_that_start_in_one_instant_leave_over_as_few_as_possible(first):
    for seed in range(first, first + 100):
        check_same_instant(seed)


def check_jittered(seed: int) -> None:
    swarm = make_swarm(seed, jitter=True)
    swarm.run()
    swarm.check_groups()
    left = swarm.left_over()
    leaders = sum(peer.mode.can_lead for peer in left)
    more = plan_groups(len(left), swarm.config.target_group_size, swarm.config.min_group_size, leaders)
    assert more == (), f"seed {seed}: {swarm.config}: {len(left)} left over could have made groups of {more}"


@pytest.mark.parametrize("first", range(0, 300, 100))
def test_peers_that_start_one_after_another_leave_over_no_whole_group(first):
    for seed in range(first, first + 100):
        check_jittered(seed)


@pytest.mark.soak
@pytest.mark.parametrize("first", range(300, 20_300, 1000))
def test_many_more_swarms(first):
    for seed in range(first, first + 1000):
        check_same_instant(seed)
        check_jittered(seed)
