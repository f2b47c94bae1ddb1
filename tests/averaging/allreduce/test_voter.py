"""One member's vote: promises, acceptances, floors, and what a new leader has to adopt."""

from __future__ import annotations

from itertools import combinations

import pytest

from shoal.averaging.allreduce.messages import Outcome
from shoal.averaging.allreduce.voter import Voter, is_quorum, leader_of, next_term, to_adopt

COMMIT, FAIL = Outcome(None), Outcome("no")


@pytest.mark.parametrize("size", range(1, 8))
def test_two_quorums_of_a_group_have_a_member_in_common(size: int):
    members = range(size)
    quorums = [
        set(some)
        for count in range(size + 1)
        for some in combinations(members, count)
        if is_quorum(some, size)
    ]
    assert quorums
    assert all(one & other for one in quorums for other in quorums)


def test_the_founding_half_wins_a_tie():
    assert is_quorum({0, 2}, 4)
    assert not is_quorum({1, 2}, 4)
    assert is_quorum({0}, 2)
    assert not is_quorum({1}, 2)


@pytest.mark.parametrize("size", [1, 2, 5])
def test_a_term_belongs_to_one_member_and_grows(size: int):
    for after in range(12):
        for member in range(size):
            term = next_term(after, member, size)
            assert after < term <= after + size
            assert leader_of(term, size) == member


def test_a_promise_is_kept():
    voter = Voter()
    assert voter.promise(3)
    assert voter.promise(3)  # asked again: the answer was lost
    assert not voter.promise(2)
    assert not voter.accept(2, COMMIT)
    assert voter.accepted is None
    assert voter.accept(3, COMMIT)
    assert voter.accepted == (3, COMMIT)


def test_to_accept_is_to_promise():
    voter = Voter()
    assert voter.accept(4, COMMIT)
    assert not voter.promise(3)


def test_a_new_leader_adopts_what_was_accepted_in_the_highest_term():
    assert to_adopt([(0, None), (0, (0, FAIL)), (0, (2, COMMIT)), (0, (1, FAIL))]) == COMMIT


def test_a_new_leader_is_free_if_nobody_accepted_anything():
    assert to_adopt([(0, None), (3, None)]) is None


def test_a_floor_voids_what_was_accepted_below_it():
    assert to_adopt([(2, None), (0, (1, COMMIT))]) is None
    assert to_adopt([(2, None), (0, (2, COMMIT))]) == COMMIT


def test_a_floor_never_falls():
    voter = Voter()
    voter.raise_floor(5)
    voter.raise_floor(2)
    assert voter.floor == 5
