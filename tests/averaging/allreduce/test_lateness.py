"""Which senders are late where deadlines adapt: at one owner, and by the word of a leader that hears several."""

from __future__ import annotations

import math
import random

import pytest

from shoal.averaging.allreduce.assignment import Assignment, SpanId
from shoal.averaging.allreduce.coordination import Coordinator
from shoal.averaging.allreduce.deadlines import Deadlines
from shoal.averaging.allreduce.effects import AnnounceExclusion, AnnounceRepair
from shoal.averaging.allreduce.events import AdaptedDeadlines, MemberReported, Roles, RoundTimeouts
from shoal.averaging.allreduce.lateness import FLOOR, GIVEN_UP, TIMES_THE_OTHERS, Lateness, Waits
from shoal.averaging.allreduce.messages import Loss, SenderExcluded
from shoal.testing.paced_cores import PacedCores, PacedRound

OFFSET, PART = 30.0, 5.0
OWNER = 0


def book(size: int = 5, min_size: int = 2, **options: bool) -> Lateness:
    """Of an owner that took its snapshot at 100 s, as all senders did."""
    lateness = Lateness(AdaptedDeadlines(OFFSET, PART), size, min_size, **options)
    lateness.settle(OWNER, 100.0)
    for sender in range(1, size):
        lateness.start(sender, 100.0)
    return lateness


def deliver(lateness: Lateness, now: float, *senders: int) -> None:
    """One part each, and the next one is awaited."""
    for sender in senders:
        lateness.arrive(sender, now)
        lateness.start(sender, now)


def finish(lateness: Lateness, now: float, *senders: int) -> None:
    """The last part of each."""
    for sender in senders:
        lateness.arrive(sender, now)


def test_nobody_is_late_before_half_of_the_group_is_there():
    lateness = book()
    deliver(lateness, 101.0, 1)
    assert lateness.due == 101.0 + PART or lateness.due == math.inf
    assert lateness.late(5, 10_000.0) == []


def test_a_first_part_is_late_by_the_middle_of_the_group():
    lateness = book()
    finish(lateness, 104.0, 1)
    finish(lateness, 106.0, 2)  # with the owner, three of five
    assert lateness.due == 106.0 + OFFSET
    assert lateness.late(5, 106.0 + OFFSET - 0.1) == []
    assert lateness.late(5, 106.0 + OFFSET) == [3, 4]
    assert lateness.due == math.inf


def test_a_round_in_which_all_are_far_apart_has_more_time():
    """Half of the group came within 40 s: the deadline is too short for this round."""
    lateness = book()
    finish(lateness, 110.0, 1)
    finish(lateness, 140.0, 2)
    assert lateness.due == 140.0 + TIMES_THE_OTHERS * 40.0


def test_an_owner_that_was_late_itself_gives_some_time():
    lateness = Lateness(AdaptedDeadlines(OFFSET, PART), 5, 2)
    finish(lateness, 50.0, 1, 2, 3)
    lateness.settle(OWNER, 200.0)
    lateness.start(4, 200.0)
    assert lateness.due == 200.0 + FLOOR


def under_way(**options: bool) -> Lateness:
    """All have delivered two parts, of which the second took a second."""
    lateness = book(**options)
    deliver(lateness, 101.0, 1, 2, 3, 4)
    deliver(lateness, 102.0, 1, 2, 3, 4)
    return lateness


def test_a_later_part_is_late_after_its_deadline():
    lateness = under_way()
    finish(lateness, 103.0, 1, 2, 3)
    assert lateness.due == 102.0 + PART
    assert lateness.late(5, 102.0 + PART) == [4]


def test_a_sender_is_not_late_where_half_of_the_others_take_as_long():
    """It is the owner's own link that is slow, or all links have become so."""
    lateness = book()
    deliver(lateness, 101.0, 1, 2, 3, 4)
    deliver(lateness, 121.0, 1, 2, 3)
    assert lateness.due == 101.0 + TIMES_THE_OTHERS * 20.0
    assert lateness.late(5, 101.0 + TIMES_THE_OTHERS * 20.0 - 1) == []


def test_an_owner_that_begins_late_knows_how_long_parts_take():
    """All links have become slow. What came before its own snapshot shows that."""
    lateness = Lateness(AdaptedDeadlines(OFFSET, PART), 5, 2)
    for now in (20.0, 40.0, 60.0):
        for sender in (1, 2, 3, 4):
            lateness.arrive(sender, now)
    lateness.settle(OWNER, 61.0)
    for sender in (1, 2, 3, 4):
        lateness.start(sender, 61.0)
    assert lateness.due == 61.0 + TIMES_THE_OTHERS * 20.0
    assert lateness.waits.parts == [20.0] * 4


def test_time_in_which_a_sender_was_held_is_not_its_own():
    lateness = under_way()
    lateness.hold(1)
    lateness.resume(1, 200.0)
    lateness.start(1, 200.0)
    finish(lateness, 200.5, 1)
    assert lateness.waits.parts == [1.0] * 4


def test_a_sender_is_called_late_once_until_it_delivers():
    lateness = under_way()
    finish(lateness, 103.0, 1, 2, 3)
    assert lateness.late(5, 110.0) == [4]
    assert lateness.late(5, 111.0) == []
    deliver(lateness, 112.0, 4)
    assert lateness.due == 112.0 + TIMES_THE_OTHERS * 1.0 or lateness.due == 112.0 + PART
    assert lateness.late(5, 130.0) == [4]


def test_enough_have_to_be_in_time():
    """The owner waits for the best of those that are late, and gives up the others then."""
    lateness = book(min_size=4)
    finish(lateness, 101.0, 1, 2)
    assert lateness.late(5, 200.0) == []
    finish(lateness, 210.0, 4)
    assert lateness.late(5, 210.0) == [3]


def test_a_sender_that_is_held_is_not_late():
    lateness = under_way()
    lateness.hold(4)
    finish(lateness, 103.0, 1, 2, 3)
    assert lateness.late(5, 500.0) == []


def test_time_in_which_the_process_was_stopped_does_not_count():
    lateness = under_way()
    finish(lateness, 103.0, 1, 2, 3)
    lateness.shift(60.0)
    assert lateness.late(5, 140.0) == []
    assert lateness.due == 162.0 + PART


def test_offsets_count_from_the_middle_and_waits_by_their_longest():
    lateness = book(size=3)
    deliver(lateness, 104.0, 1)
    deliver(lateness, 110.0, 2)
    deliver(lateness, 111.0, 1, 2)
    finish(lateness, 114.0, 1, 2)
    assert lateness.waits == Waits([-4.0, 0.0, 6.0], [7.0, 3.0])


def test_a_member_that_was_given_up_counts_with_more_than_its_time():
    lateness = book()
    finish(lateness, 100.0, 1, 2)
    deliver(lateness, 100.0, 3)
    lateness.give_up(3, 107.0)
    lateness.give_up(4, 130.0)
    assert lateness.waits == Waits([0.0] * 4 + [GIVEN_UP * 30.0], [GIVEN_UP * 7.0])


def test_late_members_do_not_make_the_deadline_shrink():
    """All become ten times slower. Each round gives up what is late, and the deadline grows all the same."""
    deadlines, limit, rounds = Deadlines(RoundTimeouts()), 5.0, 0
    for _ in range(20):
        deadlines.learn(Waits(parts=[1.0] * 7), 1)
    while limit < 10.0:
        waits = Waits(parts=[GIVEN_UP * limit] * 7)
        deadlines.learn(waits, 1)
        adapted = deadlines.timeouts(1).adapted
        limit, rounds = max(limit, adapted.part), rounds + 1
        assert rounds < 10


def test_nothing_is_learnt_of_a_span_that_was_assigned_anew():
    lateness = book(is_first=False)
    deliver(lateness, 110.0, 1, 2, 3, 4)
    assert lateness.waits == Waits()


def test_the_first_part_of_a_span_assigned_anew_is_like_any_other():
    lateness = book(is_first=False)
    deliver(lateness, 101.0, 1, 2, 3)
    assert lateness.late(5, 100.0 + PART) == [4]


# whole rounds of cores


def run_round(
    offsets: tuple[float, ...], part_times: tuple[float, ...], *, owners: int = 3, min_size: int = 2
) -> PacedCores:
    limits = RoundTimeouts(None, 600.0, 1200.0, adapted=AdaptedDeadlines(OFFSET, PART))
    paced = PacedRound(offsets, part_times, owners, 10)
    cores = PacedCores(random.Random(1), paced, [limits] * len(offsets), min_size=min_size)
    cores.run(1e5)
    cores.check()
    return cores


@pytest.mark.parametrize("victim", [0, 1, 4], ids=["leader", "owner", "owns nothing"])
def test_a_round_goes_on_without_a_member_that_starts_late(victim: int):
    offsets = tuple(1000.0 if member == victim else 1.0 for member in range(5))
    cores = run_round(offsets, (0.1,) * 5)
    assert cores.committed == [member for member in range(5) if member != victim]
    assert cores.seconds < 2 * OFFSET


@pytest.mark.parametrize("victim", [0, 1, 4], ids=["leader", "owner", "owns nothing"])
def test_a_round_goes_on_without_a_member_with_a_slow_link(victim: int):
    """What it owns goes to others, or its averages would be as late."""
    part_times = tuple(20.0 if member == victim else 0.5 for member in range(5))
    cores = run_round((1.0,) * 5, part_times)
    assert cores.committed == [member for member in range(5) if member != victim]
    assert cores.seconds < 10 * 20.0 / 2


@pytest.mark.parametrize("victim", [0, 1], ids=["leader", "owner"])
def test_a_member_that_was_excluded_learns_nothing(victim: int):
    """Over its own slow link, all others took long."""
    part_times = tuple(20.0 if member == victim else 0.5 for member in range(5))
    cores = run_round((1.0,) * 5, part_times)
    assert victim not in cores.committed
    for member in range(3):
        waits = cores.members[member].core.ledger.waits
        assert bool(waits.parts) == (member != victim)


@pytest.mark.parametrize("another_serves", [True, False])
def test_a_late_owner_keeps_its_span_where_nobody_else_can_average(another_serves: bool):
    roles = Roles(0, (2, 2, 0), (True,) * 3, can_serve=(True, another_serves, False))
    leader = Coordinator(roles, Assignment.first(roles.parts_owned))
    words = leader.handle(MemberReported(1, SenderExcluded(SpanId(1), 0, "slow", Loss.LATE)), 1.0)
    repaired = [AnnounceRepair] if another_serves else []
    assert [type(word) for word in words] == [AnnounceExclusion, *repaired]
    assert leader.proposed is None


@pytest.mark.parametrize("min_size", [2, 4, 6, 8])
def test_deadlines_leave_the_smallest_group(min_size: int):
    """All but two start late, each at another time. Owners hear of others' words late, the leader of all."""
    offsets = (1.0, 2.0, *(100.0 * member for member in range(1, 7)))
    cores = run_round(offsets, (0.1,) * 8, owners=4, min_size=min_size)
    assert len(cores.committed) >= min_size
    assert cores.committed[:2] == [0, 1]


def test_a_word_of_several_owners_does_not_take_away_more_than_may_go():
    """Each owner has another slow sender, on one link alone."""

    class Links(PacedCores):
        def transfer_time(self, source: int, target: int, message: object) -> float:
            slow = {(3, 0), (4, 1), (5, 2)}
            is_part = isinstance(message, tuple) and message[0] == "part"
            return (
                30.0
                if is_part and (source, target) in slow
                else super().transfer_time(source, target, message)
            )

    limits = RoundTimeouts(None, 600.0, 1200.0, adapted=AdaptedDeadlines(OFFSET, PART))
    paced = PacedRound((1.0,) * 6, (0.5,) * 6, 3, 10)
    for min_size in (3, 4, 5, 6):
        cores = Links(random.Random(1), paced, [limits] * 6, min_size=min_size)
        cores.run(1e5)
        cores.check()
        assert len(cores.committed) == max(3, min_size)
