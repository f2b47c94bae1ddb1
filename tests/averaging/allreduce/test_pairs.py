"""Pairs that cannot talk: who is at fault, and who is kept apart."""

from __future__ import annotations

from shoal.averaging.allreduce.events import Roles
from shoal.averaging.allreduce.pairs import GRACE, Pairs
from shoal.sansio.core import NEVER

ROLES = Roles(0, (1,) * 5, (True,) * 5)


def judged(*complaints: tuple[int, int], slow: bool = False, out: tuple[int, ...] = ()) -> Pairs:
    pairs = Pairs()
    for member, other in complaints:
        pairs.complain(member, other, f"{member} lost {other}", 0.0, is_slow=slow)
    pairs.judge(GRACE, out, ROLES)
    return pairs


def test_a_pair_is_judged_after_a_moment():
    pairs = Pairs()
    pairs.complain(1, 2, "reset", 5.0)
    assert pairs.deadline == 5.0 + GRACE
    assert pairs.judge(5.5, (), ROLES) == []
    assert not pairs.has(1, ())
    assert pairs.judge(5.0 + GRACE, (), ROLES) == []
    assert pairs.has(1, ())
    assert pairs.has(2, ())
    assert pairs.deadline == NEVER


def test_neither_of_a_pair_is_at_fault_and_the_two_are_kept_apart():
    pairs = judged((1, 2), (2, 1))
    assert pairs.separates(1, [2], ())
    assert pairs.separates(2, [1], ())
    assert not pairs.separates(3, [1, 2], ())


def test_a_pair_of_which_one_is_lost_is_no_pair():
    assert not judged((1, 2), out=(2,)).has(1, (2,))
    assert not judged((1, 2)).has(1, (2,))


def test_a_member_that_cannot_talk_with_several_is_at_fault():
    pairs = Pairs()
    for other in (1, 2, 4):
        pairs.complain(3, other, "reset", 0.0)
    (fault,) = pairs.judge(GRACE, (), ROLES)
    assert (fault.member, fault.is_slow) == (3, False)
    assert "it cannot talk with several members: member 1, member 2, member 4" in fault.reason


def test_an_owner_that_is_too_slow_for_several_is_at_fault_but_can_contribute():
    pairs = Pairs()
    for member in (1, 2):
        pairs.complain(member, 3, "too slow", 0.0, is_slow=True)
    (fault,) = pairs.judge(GRACE, (), ROLES)
    assert (fault.member, fault.reason, fault.is_slow) == (3, "too slow", True)
    assert not pairs.has(3, ())


def test_time_in_which_the_leader_did_not_run_does_not_count():
    pairs = Pairs()
    pairs.complain(1, 2, "reset", 0.0)
    pairs.shift(10.0)
    assert pairs.deadline == 10.0 + GRACE
