"""Whole groups of the pure core of a round: a seeded scheduler delivers messages in any order between streams, members
stall, leave, die or are cut off at any moment, and all that live end alike.
"""

from __future__ import annotations

import random
from collections import Counter, deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial

import pytest

from shoal.averaging.allreduce.core import AllReduce
from shoal.averaging.allreduce.events import (
    DECIDED,
    AnnounceExclusion,
    AnnounceOutcome,
    AskForOutcome,
    AveragePart,
    AverageReceived,
    DropSender,
    Effect,
    Event,
    ExchangeOpened,
    ExcludedByOwner,
    ExclusionReceived,
    Finish,
    JoinTimedOut,
    MemberLost,
    MemberReported,
    OutcomeAnswered,
    OutcomeReceived,
    OwnerLost,
    PartAveraged,
    PartDelivered,
    PartSent,
    Phase,
    ReturnAverage,
    Roles,
    RoundTimeouts,
    SenderLost,
    SnapshotFailed,
    SnapshotTaken,
    StopContributing,
    TellLeader,
    WeightDeclared,
    Withdrawn,
)
from shoal.sansio.core import NEVER, TimePassed

TIMEOUT = 400.0
"""Of senders and owners, in steps of the scheduler: now and then somebody who only has bad luck is excluded too."""
FAULTS = ("kill", "drop", "withdraw", "stall", "no snapshot", "nan", "late", "takes nothing", "says nothing")

Link = tuple[str, int, int]
"""Kind of stream ("parts", "averages", "reports", "word", "questions"), source, target: each in order by itself."""
Value = frozenset[tuple[int, float]]
"""What stands for an average: who contributed, with which weight."""


@dataclass(frozen=True)
class Average:
    """An average on its way."""

    owner: int
    index: int
    value: Value


@dataclass(frozen=True)
class Question:
    asker: int


class SimulatedGroup:
    """Members, the streams between them, and everything that a round needs of its shells."""

    def __init__(self, rng: random.Random, size: int, *, auxiliaries: bool = True) -> None:
        self.rng = rng
        self.now = 0.0
        owned = tuple(rng.choice((0, 1, 3)) for _ in range(size))
        contributes = tuple(not auxiliaries or rng.random() < 0.85 for _ in range(size))
        if not any(contributes):
            contributes = (True,) * size
        timeouts = RoundTimeouts(None, TIMEOUT, 2 * TIMEOUT)
        self.cores = [AllReduce(Roles(me, owned, contributes), timeouts) for me in range(size)]
        self.weights = [rng.choice((0.0, 1.0, 2.0)) if rng.random() < 0.3 else 1.0 for _ in range(size)]
        self.alive = [True] * size
        self.links: dict[Link, deque[Event | Average | Question]] = {}
        self.stalled: set[Link] = set()
        self.cut: set[frozenset[int]] = set()
        self.closed: set[Link] = set()
        self.tasks: list[tuple[int, Callable[[], None]]] = []
        self.arrived: list[dict[int, set[int]]] = [{} for _ in range(size)]
        self.averages: list[dict[tuple[int, int], Value]] = [{} for _ in range(size)]
        self.bad: set[int] = set()
        """Members whose next part is not finite."""
        self.without_snapshot: set[int] = set()
        for me in range(size):
            self.tasks.append((me, partial(self.take_snapshot, me)))

    @property
    def roles(self) -> Roles:
        return self.cores[0].roles

    # what the shells do

    def take_snapshot(self, me: int) -> None:
        if me in self.without_snapshot:
            self.feed(me, SnapshotFailed("NaN of its own"))
            return
        roles = self.roles
        if roles.contributes[me] and self.cores[me].phase is Phase.EXCHANGING:
            for owner in range(roles.size):
                if owner != me and roles.parts_owned[owner]:
                    self.tasks.append((me, partial(self.contribute, me, owner)))
        self.feed(me, SnapshotTaken(self.weights[me]))

    def contribute(self, me: int, owner: int) -> None:
        if ("parts", me, owner) in self.closed or self.cores[me].phase is not Phase.EXCHANGING:
            return
        self.send(("parts", me, owner), WeightDeclared(me, self.weights[me]))
        self.feed(me, ExchangeOpened(owner))
        if self.weights[me]:
            for index in range(self.roles.parts_owned[owner]):
                self.send(("parts", me, owner), PartDelivered(me, index))
                self.feed(me, PartSent(owner, index))

    def send(self, link: Link, item: Event | Average | Question) -> None:
        _, source, target = link
        if link not in self.closed and frozenset((source, target)) not in self.cut:
            self.links.setdefault(link, deque()).append(item)

    def end(self, link: Link, last: Event | None, *, lose: bool = False) -> None:
        """A stream ends: what is on its way arrives, or with ``lose`` only a beginning of it, and then ``last``."""
        if link in self.closed:
            return
        queue = self.links.setdefault(link, deque())
        self.stalled.discard(link)
        if lose:
            for _ in range(self.rng.randint(0, len(queue))):
                queue.pop()
        if last is not None:
            queue.append(last)
        self.closed.add(link)

    def feed(self, me: int, event: Event) -> None:
        pending = deque([event])
        while pending and self.alive[me]:
            for effect in self.cores[me].handle(pending.popleft(), self.now):
                pending.extend(self.carry_out(me, effect))

    def carry_out(self, me: int, effect: Effect) -> list[Event]:
        match effect:
            case AveragePart(index):
                return self.average(me, index)
            case ReturnAverage(index):
                self.return_average(me, index)
            case DropSender(sender, reason):
                self.end(("averages", me, sender), ExcludedByOwner(me, reason))
                self.end(("parts", sender, me), None, lose=True)
            case StopContributing():
                self.stop_contributing(me)
            case TellLeader(report):
                self.send(("reports", me, self.roles.leader), MemberReported(me, report))
            case AnnounceExclusion(excluded):
                self.announce(me, ExclusionReceived(excluded))
            case AnnounceOutcome(outcome):
                self.announce(me, OutcomeReceived(outcome))
            case AskForOutcome(members):
                for member in members:
                    self.ask(me, member)
            case Finish():
                assert self.cores[me].phase in DECIDED
                self.leave(me)
        return []

    def announce(self, me: int, event: Event) -> None:
        for other in self.cores[me].roles.others:
            self.send(("word", me, other), event)

    def return_average(self, me: int, index: int) -> None:
        for other in self.cores[me].roles.others:
            if self.roles.contributes[other]:
                self.send(("averages", me, other), Average(me, index, self.averages[me][me, index]))

    def average(self, me: int, index: int) -> list[Event]:
        core = self.cores[me]
        senders = self.arrived[me].get(index, set()) - {me}
        bad = sorted(sender for sender in senders if sender in self.bad)
        self.bad.difference_update(bad)
        weights = core.collection.weights
        if me not in core.collection.dropped and self.roles.contributes[me]:
            senders = senders | {me}
        present = senders.difference(bad)
        value = frozenset((sender, weights[sender] or 0.0) for sender in present if weights[sender])
        if not value:
            return [Withdrawn("nobody contributes")]
        self.averages[me][me, index] = value
        return [*(SenderLost(sender, "NaN") for sender in bad), PartAveraged(index, 1.0, 1.0)]

    def stop_contributing(self, me: int) -> None:
        for owner in self.cores[me].roles.others:
            self.end(("parts", me, owner), SenderLost(me, "it ended the exchange"))
            self.end(("averages", owner, me), None, lose=True)

    def leave(self, me: int) -> None:
        """The round is over for a member: its streams end, it still answers questions."""
        self.stop_contributing(me)
        for other in self.cores[me].roles.others:
            self.end(("averages", me, other), OwnerLost(me, "the round is over there"))
        if me != self.roles.leader:
            self.end(("reports", me, self.roles.leader), MemberLost(me, "it ended the round"))

    def ask(self, me: int, member: int) -> None:
        if not self.alive[member] or frozenset((me, member)) in self.cut:
            self.tasks.append((me, partial(self.feed, me, OutcomeAnswered(member, None))))
        else:
            self.links.setdefault(("questions", me, member), deque()).append(Question(me))

    def answer(self, me: int, asker: int) -> None:
        core = self.cores[me]
        answer = OutcomeAnswered(me, core.phase, core.outcome)
        self.links.setdefault(("questions", me, asker), deque()).append(answer)

    # what goes wrong

    def kill(self, member: int) -> None:
        self.alive[member] = False
        for other in self.cores[member].roles.others:
            self.disconnect(member, other, "killed")
        for (kind, source, target), queue in self.links.items():
            if kind == "questions" and member in (source, target):
                self.fail_questions(source, target, queue)

    def fail_questions(self, source: int, target: int, queue: deque[Event | Average | Question]) -> None:
        """Questions on their way to a member, and answers on their way back, are lost; the asker notices."""
        for item in queue:
            asker, asked = (source, target) if isinstance(item, Question) else (target, source)
            self.tasks.append((asker, partial(self.feed, asker, OutcomeAnswered(asked, None))))
        queue.clear()

    def disconnect(self, a: int, b: int, reason: str) -> None:
        """All streams between two members end, for both."""
        for source, target in ((a, b), (b, a)):
            self.end(("parts", source, target), SenderLost(source, reason), lose=True)
            self.end(("averages", source, target), OwnerLost(source, reason), lose=True)
            kind = "reports" if target == self.roles.leader else "word"
            if self.roles.leader in (a, b):
                self.end((kind, source, target), MemberLost(source, reason), lose=True)

    def cut_off(self, a: int, b: int) -> None:
        """Two members cannot reach each other any more, not even with a question."""
        self.disconnect(a, b, "cut off")
        self.cut.add(frozenset((a, b)))
        for pair in ((a, b), (b, a)):
            self.fail_questions(*pair, self.links.get(("questions", *pair), deque()))

    def stall(self, sender: int) -> None:
        for owner in self.cores[sender].roles.others:
            self.stalled.add(("parts", sender, owner))

    def takes_nothing(self, member: int) -> None:
        """It delivers its parts, but no average arrives there."""
        for owner in self.cores[member].roles.others:
            self.stalled.add(("averages", owner, member))

    def inject(self, fault: str) -> None:
        living = [member for member, alive in enumerate(self.alive) if alive]
        if len(living) == 1:
            return
        member = self.rng.choice(living)
        match fault:
            case "kill":
                self.kill(member)
            case "drop":
                self.disconnect(member, self.rng.choice(self.cores[member].roles.others), "dropped")
            case "withdraw":
                self.feed(member, Withdrawn("cancelled"))
            case "stall":
                self.stall(member)
            case "takes nothing":
                self.takes_nothing(member)
            case "says nothing":
                self.stalled.add(("reports", member, self.roles.leader))
            case "no snapshot":
                self.without_snapshot.add(member)
            case "nan":
                self.bad.add(member)
            case "late" if member != self.roles.leader and self.alive[self.roles.leader]:
                self.feed(self.roles.leader, JoinTimedOut(member, "it did not join"))

    # the scheduler

    def step(self) -> bool:
        """Deliver one message or do one task; False: nothing will ever happen again."""
        self.now += 1
        links = [link for link, queue in self.links.items() if queue and link not in self.stalled]
        links = [link for link in links if self.alive[link[2]]]
        tasks = [task for task in self.tasks if self.alive[task[0]]]
        deadlines = [(me, core.deadline) for me, core in enumerate(self.cores) if self.alive[me]]
        for me, deadline in deadlines:
            if deadline <= self.now:
                self.feed(me, TimePassed())
        if tasks and (not links or self.rng.random() < 0.3):
            task = self.rng.choice(tasks)
            self.tasks.remove(task)
            task[1]()
        elif links:
            self.deliver(self.rng.choice(links))
        else:
            ends = [deadline for _, deadline in deadlines if deadline < NEVER]
            if not ends:
                return False
            self.now = max(self.now, *ends)
        return True

    def deliver(self, link: Link) -> None:
        queue = self.links[link]
        if not queue:
            return  # a deadline has just ended the stream
        target, item = link[2], queue.popleft()
        if isinstance(item, Question):
            self.answer(target, item.asker)
            return
        core = self.cores[target]
        if isinstance(item, Average):
            if core.phase is Phase.EXCHANGING:
                self.averages[target][item.owner, item.index] = item.value
                self.feed(target, AverageReceived(item.owner, item.index))
            return
        if isinstance(item, WeightDeclared | PartDelivered) and item.sender in core.collection.dropped:
            return  # its stream was reset in the meantime
        if isinstance(item, PartDelivered):
            self.arrived[target].setdefault(item.index, set()).add(item.sender)
        self.feed(target, item)

    def run(self, faults: Iterable[Callable[[], None]] = ()) -> None:
        expected = 12 * self.roles.size + 4 * self.roles.size * sum(self.roles.parts_owned)
        due = sorted(((self.rng.randrange(expected), fault) for fault in faults), key=lambda pair: pair[0])
        for count in range(50_000):
            while due and due[0][0] <= count:
                due.pop(0)[1]()
            if not self.step():
                if not due:
                    return
                due.pop(0)[1]()
        pytest.fail("the round never ends")

    # what must hold

    def check(self, seed: int) -> str:
        """Everybody who lives has ended; excluded members aside, all alike and with the same averages."""
        living = [me for me, alive in enumerate(self.alive) if alive]
        phases = {me: self.cores[me].phase for me in living}
        assert set(phases.values()) <= set(DECIDED), (seed, phases)
        outcomes = {core.outcome for core in self.cores if core.outcome is not None}
        assert len(outcomes) <= 1, (seed, outcomes)
        members = [me for me in living if self.roles.contributes[me]]
        committed = [me for me in members if phases[me] is Phase.COMMITTED]
        if not committed:
            return "failed"
        (outcome,) = outcomes
        excluded = {one.member for one in outcome.excluded}
        assert outcome.reason is None, seed
        assert committed == [me for me in members if me not in excluded], (seed, phases, outcome)
        everything = {
            (owner, index) for owner, parts in enumerate(self.roles.parts_owned) for index in range(parts)
        }
        for me in committed:
            assert self.averages[me].keys() == everything, (seed, me)
            assert self.averages[me] == self.averages[committed[0]], (seed, me)
        assert [bool(weight) for weight in outcome.weights] == [
            me not in excluded and self.roles.contributes[me] and self.weights[me] > 0
            for me in range(self.roles.size)
        ], seed
        return "committed without some" if excluded else "committed"


@pytest.mark.parametrize("block", range(5))
def test_without_faults_every_order_of_messages_commits(block: int):
    for seed in range(block * 30, block * 30 + 30):
        group = SimulatedGroup(random.Random(seed), size=seed % 7 + 2)
        group.weights[0] = 1.0
        for core in group.cores:  # nobody is excluded for bad luck
            core.collection.clocks.timeout = core.returns.clocks.timeout = None
        group.run()
        assert [core.phase for core in group.cores] == [Phase.COMMITTED] * len(group.cores), seed
        assert group.check(seed) == "committed"


def sweep(seeds: range) -> None:
    endings: Counter[str] = Counter()
    for seed in seeds:
        rng = random.Random(seed)
        group = SimulatedGroup(rng, size=rng.randint(2, 8))
        faults = [rng.choice(FAULTS) for _ in range(rng.randint(1, 3))]
        group.run(partial(group.inject, fault) for fault in faults)
        endings[group.check(seed)] += 1
    assert min(endings[kind] for kind in ("failed", "committed", "committed without some")) > len(seeds) // 50


def sweep_leader_crash(seeds: range) -> None:
    """The leader dies at every point of a round in turn, in which a sender may stall."""
    endings: Counter[str] = Counter()
    for seed in seeds:
        rng = random.Random(seed)
        group = SimulatedGroup(rng, size=rng.randint(3, 6))
        if rng.random() < 0.5:
            group.stall(rng.randrange(1, group.roles.size))
        when = rng.randrange(400)
        for _ in range(when):
            group.step()
        group.kill(group.roles.leader)
        group.run()
        endings[group.check(seed)] += 1
    assert set(endings) >= {"failed", "committed"}, endings


def sweep_cuts(seeds: range) -> None:
    """One pair of members is cut off for good; stalls, but no deaths, come on top: somebody can always pass on what
    the leader decided.
    """
    endings: Counter[str] = Counter()
    for seed in seeds:
        rng = random.Random(seed)
        group = SimulatedGroup(rng, size=rng.randint(3, 7), auxiliaries=False)
        pair = rng.sample(range(group.roles.size), 2)
        faults = [partial(group.cut_off, *pair)]
        if rng.random() < 0.5:
            faults.append(partial(group.stall, rng.randrange(group.roles.size)))
        group.run(faults)
        endings[group.check(seed)] += 1
    assert set(endings) >= {"failed", "committed", "committed without some"}, endings


def sweep_orphans(seeds: range) -> None:
    """The leader dies while it tells its decision, and others while orphans ask each other; members that own nothing
    cannot reach each other. One owner lives.
    """
    endings: Counter[str] = Counter()
    orphaned = 0
    for seed in seeds:
        rng = random.Random(seed)
        group = SimulatedGroup(rng, size=rng.randint(3, 8), auxiliaries=rng.random() < 0.5)
        members = range(1, group.roles.size)
        owners = [member for member in members if group.roles.parts_owned[member]]
        if not owners:
            continue
        clients = [member for member in members if member not in owners]
        group.cut.update(frozenset((a, b)) for a in clients for b in clients if a != b)
        leader = group.cores[group.roles.leader]
        while leader.outcome is None and group.step():
            pass
        for _ in range(rng.randrange(2 * group.roles.size)):
            group.step()
        group.kill(group.roles.leader)
        survivor = rng.choice(owners)
        for victim in rng.sample(members, rng.randint(0, len(members))):
            for _ in range(rng.randrange(12)):
                group.step()
            orphaned += sum(core.phase is Phase.ORPHANED for core in group.cores)
            if victim != survivor:
                group.kill(victim)
        group.run()
        endings[group.check(seed)] += 1
    assert endings["committed"] > len(seeds) // 10, endings
    assert endings["failed"] > len(seeds) // 20, endings
    assert orphaned > len(seeds) // 2, orphaned


@pytest.mark.parametrize("size", [2, 3, 4])
@pytest.mark.parametrize("is_excluded", [False, True], ids=["leader takes part", "leader is excluded"])
def test_a_member_whose_reports_never_come_holds_up_no_leader_excluded_or_not(size: int, is_excluded: bool):
    """An excluded leader takes no averages, by which it would know how far the others can be."""
    for seed in range(20):
        group = SimulatedGroup(random.Random(seed), size, auxiliaries=False)
        timeouts = RoundTimeouts(None, TIMEOUT, 2 * TIMEOUT)
        roles = [Roles(me, (1,) * size, (True,) * size) for me in range(size)]
        group.cores = [AllReduce(role, timeouts) for role in roles]
        group.weights = [1.0] * size
        if is_excluded:
            group.without_snapshot.add(0)
        group.stalled.add(("reports", size - 1, 0))
        group.run()
        assert all(core.phase in DECIDED for core in group.cores[: size - 1]), seed
        committed = {me for me, core in enumerate(group.cores) if core.phase is Phase.COMMITTED}
        assert committed == set(range(int(is_excluded), size - 1)), seed


SWEEPS = [sweep, sweep_leader_crash, sweep_cuts, sweep_orphans]


@pytest.mark.parametrize("what", SWEEPS)
@pytest.mark.parametrize("block", range(4))
def test_whatever_happens_all_end_alike(what: Callable[[range], None], block: int):
    what(range(block * 100, block * 100 + 100))


@pytest.mark.soak
@pytest.mark.parametrize("what", SWEEPS)
@pytest.mark.parametrize("block", range(20))
def test_whatever_happens_all_end_alike_soak(what: Callable[[range], None], block: int):
    what(range(1000 + block * 100, 1100 + block * 100))
