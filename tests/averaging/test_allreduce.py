"""The pure core of one round: hand-made cases, and whole groups whose messages a seeded scheduler delivers in
any order.
"""

from __future__ import annotations

import random
from collections import deque

import pytest

from shoal.averaging.allreduce import (
    DECIDED,
    AllReduce,
    AnnounceOutcome,
    AskForOutcome,
    AveragePart,
    AverageReceived,
    Effect,
    Event,
    Finish,
    MemberLost,
    MemberReported,
    OutcomeAnswered,
    OutcomeReceived,
    PartAveraged,
    PartDelivered,
    Phase,
    ReportToLeader,
    ReturnAverage,
    Roles,
    SnapshotTaken,
    Withdrawn,
)
from shoal.errors import AllreduceException, ProtocolViolation


def pair(me: int) -> AllReduce:
    return AllReduce(Roles(me=me, parts_owned=(1, 1), contributes=(True, True)))


def make_ready(member: AllReduce) -> None:
    member.handle(SnapshotTaken())
    other = 1 - member.roles.me
    member.handle(PartDelivered(other, 0))
    member.handle(PartAveraged(0))
    member.handle(AverageReceived(other, 0))


def test_a_part_is_averaged_once_every_contributor_has_delivered_it():
    core = AllReduce(Roles(me=0, parts_owned=(2, 0, 0), contributes=(True, True, False)))
    assert core.handle(PartDelivered(1, 0)) == []
    assert core.handle(SnapshotTaken()) == [AveragePart(0)]
    assert core.handle(PartDelivered(1, 1)) == [AveragePart(1)]
    assert core.handle(PartAveraged(0)) == [ReturnAverage(0)]


def test_a_member_reports_ready_only_when_it_holds_every_average():
    core = pair(me=1)
    core.handle(SnapshotTaken())
    assert core.handle(PartDelivered(0, 0)) == [AveragePart(0)]
    assert core.handle(PartAveraged(0)) == [ReturnAverage(0)]
    assert core.parts_missing_from(0) == 1
    assert core.handle(AverageReceived(0, 0)) == [ReportToLeader()]
    assert core.phase is Phase.READY


def test_a_helper_without_tensors_waits_for_its_snapshot_before_it_is_ready():
    core = AllReduce(Roles(me=1, parts_owned=(0, 1), contributes=(True, False)))
    core.handle(PartDelivered(0, 0))
    assert core.handle(PartAveraged(0)) == [ReturnAverage(0)]
    assert core.handle(SnapshotTaken()) == [ReportToLeader()]


def test_the_leader_commits_when_the_last_member_is_ready():
    leader = pair(me=0)
    make_ready(leader)
    assert leader.phase is Phase.EXCHANGING
    assert leader.handle(MemberReported(1)) == [AnnounceOutcome(), Finish()]
    assert leader.phase is Phase.COMMITTED


@pytest.mark.parametrize(
    "event",
    [
        PartDelivered(1, 1),
        PartDelivered(0, 0),
        AverageReceived(1, 1),
        AverageReceived(0, 0),
        OutcomeReceived(),
    ],
    ids=str,
)
def test_what_no_honest_peer_sends_is_a_violation_and_changes_nothing(event: Event):
    core = pair(me=0)
    with pytest.raises(ProtocolViolation):
        core.handle(event)
    assert core.phase is Phase.EXCHANGING
    assert core.handle(PartDelivered(1, 0)) == []


def test_a_commit_before_this_member_was_ready_is_a_violation():
    with pytest.raises(ProtocolViolation, match="before this member was ready"):
        pair(me=1).handle(OutcomeReceived())


def test_giving_up_after_reporting_ready_is_a_violation():
    leader = pair(me=0)
    leader.handle(MemberReported(1))
    with pytest.raises(ProtocolViolation, match="gave up after"):
        leader.handle(MemberReported(1, "changed my mind"))


def test_the_leader_fails_the_round_when_a_member_is_lost_before_it_is_ready():
    leader = pair(me=0)
    effects = leader.handle(MemberLost(1, "connection reset"))
    assert effects == [
        AnnounceOutcome("lost member 1: connection reset"),
        Finish("lost member 1: connection reset"),
    ]


def test_a_member_lost_after_it_was_ready_does_not_fail_the_round():
    leader = pair(me=0)
    leader.handle(MemberReported(1))
    assert leader.handle(MemberLost(1, "connection reset")) == []
    make_ready(leader)
    assert leader.phase is Phase.COMMITTED


def test_a_ready_member_does_not_withdraw():
    member = pair(me=1)
    make_ready(member)
    assert member.handle(Withdrawn("cancelled")) == []
    assert member.phase is Phase.READY


def test_a_member_that_withdraws_earlier_tells_the_leader():
    assert pair(me=1).handle(Withdrawn("cancelled")) == [ReportToLeader("cancelled"), Finish("cancelled")]


@pytest.mark.parametrize(
    ("answer", "outcome"),
    [(Phase.COMMITTED, Phase.COMMITTED), (Phase.FAILED, Phase.FAILED), (None, Phase.FAILED)],
)
def test_an_orphan_takes_over_what_others_know(answer: Phase | None, outcome: Phase):
    member = pair(me=1)
    make_ready(member)
    assert member.handle(MemberLost(0, "killed")) == [AskForOutcome((0,))]
    member.handle(OutcomeAnswered(0, answer))
    assert member.phase is outcome


def test_an_orphan_asks_again_while_somebody_still_waits_for_the_leader():
    core = AllReduce(Roles(me=2, parts_owned=(0, 0, 0), contributes=(True, True, True)))
    core.handle(SnapshotTaken())
    core.handle(MemberLost(0, "killed"))
    assert core.handle(OutcomeAnswered(1, Phase.READY)) == [AskForOutcome((1,))]
    assert core.handle(OutcomeAnswered(0, None)) == []
    assert isinstance(core.handle(OutcomeAnswered(1, Phase.ORPHANED))[0], Finish)
    assert core.phase is Phase.FAILED


class SimulatedGroup:
    """Members whose messages travel in order between each pair, and otherwise in any order that the seed
    chooses.
    """

    def __init__(self, rng: random.Random, size: int) -> None:
        self.rng = rng
        owned = tuple(rng.choice((0, 1, 3)) for _ in range(size))
        contributor = rng.randrange(size)
        contributes = tuple(me == contributor or rng.random() < 0.8 for me in range(size))
        self.cores = [AllReduce(Roles(me, owned, contributes)) for me in range(size)]
        self.alive = [True] * size
        self.links: dict[tuple[int, int], deque[Event | str]] = {}
        self.tasks: list[tuple[int, Event]] = [(me, SnapshotTaken()) for me in range(size)]
        for sender, core in enumerate(self.cores):
            for owner in core.roles.others:
                if contributes[sender]:
                    for part in range(owned[owner]):
                        self.send(sender, owner, PartDelivered(sender, part))

    def send(self, source: int, target: int, event: Event | str) -> None:
        self.links.setdefault((source, target), deque()).append(event)

    def kill(self, member: int) -> None:
        """The process ends: of what it has sent, each peer receives a beginning, and then the end of the
        connection.
        """
        self.alive[member] = False
        for (source, target), queue in self.links.items():
            if source == member:
                lost = [queue.pop() for _ in range(self.rng.randint(0, len(queue)))]
                unanswered = [event for event in lost if isinstance(event, OutcomeAnswered)]
                self.tasks += [(target, OutcomeAnswered(member, None)) for _ in unanswered]
        for other in self.cores[member].roles.others:
            self.send(member, other, MemberLost(member, "killed"))

    def step(self) -> bool:
        """Deliver one message or do one task; False: nothing is left to do."""
        choices = [link for link, queue in self.links.items() if queue and self.alive[link[1]]]
        tasks = [task for task in self.tasks if self.alive[task[0]]]
        if not choices and not tasks:
            return False
        if tasks and (not choices or self.rng.random() < 0.3):
            task = self.rng.choice(tasks)
            self.tasks.remove(task)
            self.feed(*task)
        else:
            source, target = self.rng.choice(choices)
            event = self.links[source, target].popleft()
            if event == "outcome?":
                self.send(target, source, OutcomeAnswered(target, self.cores[target].phase, "told"))
            else:
                self.feed(target, event)
        return True

    def feed(self, member: int, event: Event) -> None:
        for effect in self.cores[member].handle(event):
            self.carry_out(member, effect)

    def carry_out(self, me: int, effect: Effect) -> None:
        roles = self.cores[me].roles
        match effect:
            case AveragePart(index):
                self.feed(me, PartAveraged(index))
            case ReturnAverage(index):
                for other in roles.others:
                    self.send(me, other, AverageReceived(me, index))
            case ReportToLeader(reason):
                self.send(me, roles.leader, MemberReported(me, reason))
            case AnnounceOutcome(reason):
                for other in roles.others:
                    self.send(me, other, OutcomeReceived(reason))
            case AskForOutcome(members):
                for member in members:
                    if self.alive[member]:
                        self.send(me, member, "outcome?")
                    else:
                        self.tasks.append((me, OutcomeAnswered(member, None)))
            case Finish():
                assert self.cores[me].phase in DECIDED

    def run(self, faults: int) -> None:
        total = sum(len(queue) for queue in self.links.values()) + 40
        when = sorted(self.rng.randrange(total) for _ in range(faults))
        for count in range(20_000):
            while when and when[0] <= count:
                when.pop(0)
                self.kill(self.rng.choice([me for me, alive in enumerate(self.alive) if alive]))
                self.answer_for_the_dead()
            if not self.step():
                return
        pytest.fail("the round never ends")

    def answer_for_the_dead(self) -> None:
        """A question on its way to a member that died is answered by the end of the connection."""
        for (source, target), queue in self.links.items():
            while not self.alive[target] and "outcome?" in queue:
                queue.remove("outcome?")
                self.tasks.append((source, OutcomeAnswered(target, None)))


@pytest.mark.parametrize("block", range(10))
def test_without_faults_every_order_of_messages_commits(block: int):
    for seed in range(block * 30, block * 30 + 30):
        group = SimulatedGroup(random.Random(seed), size=seed % 7 + 2)
        group.run(faults=0)
        assert [core.phase for core in group.cores] == [Phase.COMMITTED] * len(group.cores), seed


@pytest.mark.parametrize("block", range(10))
def test_with_deaths_the_survivors_always_agree(block: int):
    outcomes = set()
    for seed in range(block * 100, block * 100 + 100):
        rng = random.Random(seed)
        group = SimulatedGroup(rng, size=rng.randint(2, 8))
        group.run(faults=rng.randint(1, len(group.cores) - 1))
        phases = {core.phase for core, alive in zip(group.cores, group.alive, strict=True) if alive}
        assert len(phases) <= 1, (seed, phases)
        assert phases <= set(DECIDED), (seed, phases)
        outcomes |= phases
    assert outcomes == set(DECIDED), "the sweep must meet both outcomes, or it proves nothing"


def test_a_group_of_helpers_alone_has_nothing_to_average():
    with pytest.raises(AllreduceException, match="no member of the group contributes"):
        AllReduce(Roles(me=0, parts_owned=(1, 1), contributes=(False, False)))
