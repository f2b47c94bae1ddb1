"""Pairs that could not reach each other are planned apart, and everybody else still has a group."""

from __future__ import annotations

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from shoal.averaging.matchmaking.apart import is_apart, shunned
from shoal.averaging.matchmaking.candidate import Candidate
from shoal.averaging.matchmaking.grouping import EarlyBegin, cut_groups, may_begin_early
from shoal.p2p.identity import Identity

PEERS = sorted(Identity.generate(bytes([number]) * 32).peer_id for number in range(16))


def candidates(count: int, *pairs: tuple[int, int]) -> list[Candidate]:
    """The first of each pair says that it could not reach the second."""
    return [
        Candidate(
            1.0,
            PEERS[number],
            True,
            lost=tuple(PEERS[other].to_bytes() for one, other in pairs if one == number),
        )
        for number in range(count)
    ]


@pytest.mark.parametrize("pair", [(0, 1), (1, 2), (3, 0), (2, 3)])
@pytest.mark.parametrize("count", [4, 8, 16])
@pytest.mark.parametrize("gone", [None, ()], ids=["slices", "mixed"])
def test_one_bad_route_keeps_nobody_from_a_group(count: int, pair: tuple[int, int], gone: tuple[()] | None):
    everybody = candidates(count, pair)
    cut = cut_groups(everybody, 4, 2, gone)
    assert cut.left_over == ()
    assert sum(len(group.members) for group in cut.groups) == count
    for group in cut.groups:
        assert group.is_complete
        assert len(group.members) <= 4
        assert not any(is_apart(member, group.members) for member in group.members)


def test_two_that_are_alone_try_again():
    assert len(cut_groups(candidates(2, (0, 1)), 2, 2).groups[0].members) == 2


def test_a_pair_of_three_is_apart_and_the_others_average():
    cut = cut_groups(candidates(3, (1, 2)), 3, 2)
    assert [len(group.members) for group in cut.groups if group.is_complete] == [2]
    assert len(cut.left_over) == 1


def test_a_client_that_is_kept_apart_takes_one_leader_along_and_no_other_clients():
    everybody = candidates(12, (10, 2), (10, 3), (10, 4), (10, 11), (2, 7))
    clients = {0, 3, 5, 6, 8, 9, 10}
    everybody = [
        one._replace(can_lead=number not in clients, contributes=number not in {1, 4})
        for number, one in enumerate(everybody)
    ]
    cut = cut_groups(everybody, 6, 1)
    assert cut.left_over == ()
    assert all(len(group.members) <= 6 for group in cut.groups)


def test_a_liar_isolates_nobody_but_itself():
    everybody = candidates(8, *((0, other) for other in range(1, 8)))
    cut = cut_groups(everybody, 4, 2)
    placed = {member.peer_id for group in cut.groups if group.is_complete for member in group.members}
    assert placed >= set(PEERS[1:8])


@given(
    count=st.integers(2, 14),
    bounds=st.tuples(st.integers(2, 6), st.integers(2, 6)).map(sorted),
    pairs=st.lists(st.tuples(st.integers(0, 13), st.integers(0, 13)), max_size=20),
    clients=st.sets(st.integers(0, 13)),
)
@example(  # a client that was to make a group with another one went back to a group that was full
    13,
    [2, 3],
    [
        *((0, 8), (0, 12), (1, 6), (1, 8), (2, 8), (2, 11), (4, 12), (5, 2), (5, 12), (6, 0), (7, 12)),
        *((8, 1), (8, 4), (8, 6), (10, 3), (10, 4), (10, 6), (11, 12), (12, 0), (12, 5)),
    ],
    {1, 2, 6, 8, 9, 10, 12},
)
def test_plans_with_bad_routes_are_sound(
    count: int, bounds: list[int], pairs: list[tuple[int, int]], clients: set[int]
):
    def peers(*pairs: tuple[int, int]) -> list[Candidate]:
        full = candidates(count, *pairs)
        return [one._replace(can_lead=number not in clients) for number, one in enumerate(full)]

    minimum, target = bounds
    everybody = peers(*(pair for pair in pairs if pair[0] != pair[1]))
    for gone in (None, ()):
        cut = cut_groups(everybody, target, minimum, gone)
        complete = [group.members for group in cut.groups if group.is_complete]
        members = [member for group in complete for member in group]
        assert len(members) == len(set(members))
        assert set(members) | set(cut.left_over) == set(everybody)
        for group in complete:
            assert minimum <= len(group) <= target
            assert group[0].can_lead
            assert all(group[0] < member for member in group[1:] if member.can_lead)
        if any(is_apart(one, group) for group in complete for one in group):
            # No group at all would be left: the plan is as if nobody had said anything.
            plain = cut_groups(peers(), target, minimum, gone)
            assert [[one.peer_id for one in group] for group in complete] == [
                [one.peer_id for one in group.members] for group in plain.groups if group.is_complete
            ]


def test_clients_need_no_route_to_each_other():
    one, other, leader = candidates(3, (0, 1))
    one, other = one._replace(can_lead=False), other._replace(can_lead=False)
    assert not is_apart(one, [other, leader])
    assert is_apart(one, [other._replace(can_lead=True)])


@pytest.mark.parametrize("gone", [None, ()], ids=["slices", "mixed"])
def test_a_peer_that_most_name_is_planned_with_nobody(gone: tuple[()] | None):
    """Newcomers, which name nobody, are not sent to it either."""
    everybody = candidates(6, (1, 0), (2, 0), (3, 0))
    cut = cut_groups(everybody, 5, 2, gone)
    assert [len(group.members) for group in cut.groups] == [5]
    assert [one.peer_id for one in cut.left_over] == [PEERS[0]]
    assert cut.shunned == {PEERS[0]}
    assert str(PEERS[0]) in cut.reason


def test_a_full_group_does_not_wait_for_a_peer_that_most_name():
    everybody = candidates(5, (1, 0), (2, 0), (3, 0))
    members = [one.peer_id for one in everybody[1:]]
    assert may_begin_early(everybody, members, PEERS[1], 4, 2).verdict is not EarlyBegin.NO


def test_few_words_shun_nobody():
    assert shunned(candidates(6, (1, 0), (2, 0))) == []
    assert shunned(candidates(2, (1, 0))) == []
    assert [one.peer_id for one in shunned(candidates(3, (1, 0), (2, 0)))] == [PEERS[0]]


def test_where_no_group_would_be_left_nobody_is_shunned():
    cut = cut_groups(candidates(3, (1, 0), (2, 0)), 3, 3)
    assert [len(group.members) for group in cut.groups] == [3]
    assert cut.shunned == frozenset()
