"""Pairs that could not reach each other are planned apart, and everybody else still has a group."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from shoal.averaging.matchmaking.apart import are_apart, is_apart, owns_nothing, shunned, spared_routes
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
def test_one_bad_route_keeps_nobody_from_a_group(count: int, pair: tuple[int, int]):
    everybody = candidates(count, pair)
    cut = cut_groups(everybody, 4, 2)
    assert cut.left_over == ()
    assert sum(len(group.members) for group in cut.groups) == count
    for group in cut.groups:
        assert group.is_complete
        assert len(group.members) <= 4
        assert not any(is_apart(member, group.members) for member in group.members)


def test_two_that_are_alone_try_again():
    assert len(cut_groups(candidates(2, (0, 1)), 2, 2).groups[0].members) == 2


class TestAPairInOneGroup:
    """Where there is no other group, followers that are apart average together, and a leader's partner does not."""

    def test_a_pair_of_followers_leaves_nobody_alone(self):
        cut = cut_groups(candidates(3, (1, 2)), 3, 2)
        assert [group.members for group in cut.groups] == [tuple(candidates(3, (1, 2)))]
        assert cut.groups[0].is_complete
        assert cut.left_over == ()

    def test_it_begins_as_soon_as_it_is_full(self):
        everybody = candidates(3, (1, 2))
        members = [one.peer_id for one in everybody]
        assert may_begin_early(everybody, members, PEERS[0], 3, 2).verdict is not EarlyBegin.NO

    @pytest.mark.parametrize("pair", [(0, 2), (1, 0)])
    def test_a_partner_of_the_leader_is_left_over(self, pair: tuple[int, int]):
        cut = cut_groups(candidates(3, pair), 3, 2)
        assert [len(group.members) for group in cut.groups if group.is_complete] == [2]
        assert [one.peer_id for one in cut.left_over] == [PEERS[max(pair)]]

    def test_a_minimum_of_all_is_met(self):
        cut = cut_groups(candidates(4, (3, 2)), 4, 4)
        assert [len(group.members) for group in cut.groups] == [4]

    def test_another_group_without_its_partner_comes_first(self):
        cut = cut_groups(candidates(6, (1, 2)), 3, 2)
        assert [len(group.members) for group in cut.groups] == [3, 3]
        assert not any(is_apart(one, group.members) for group in cut.groups for one in group.members)

    def test_one_that_several_cannot_reach_is_left_over(self):
        """Its round would go on without it."""
        cut = cut_groups(candidates(4, (3, 1), (3, 2)), 4, 3)
        assert [one.peer_id for one in cut.left_over] == [PEERS[3]]

    def test_those_without_a_place_make_a_group_of_their_own(self):
        cut = cut_groups(candidates(4, (1, 2), (1, 3)), 4, 2)
        groups = [{one.peer_id for one in group.members} for group in cut.groups if group.is_complete]
        assert groups == [{PEERS[0], PEERS[1]}, {PEERS[2], PEERS[3]}]


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


def is_bearable(group: Sequence[Candidate]) -> bool:
    """Nobody is apart from the leader, nor from several others."""
    ordered = sorted(group)
    leader = next(member for member in ordered if member.can_lead)
    followers = [member for member in ordered if member is not leader]
    return not is_apart(leader, followers) and all(
        sum(are_apart(one, other) for other in followers if other is not one) < 2 for one in followers
    )


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
    cut = cut_groups(everybody, target, minimum)
    complete = [group.members for group in cut.groups if group.is_complete]
    members = [member for group in complete for member in group]
    assert len(members) == len(set(members))
    assert set(members) | set(cut.left_over) == set(everybody)
    for group in complete:
        assert minimum <= len(group) <= target
        assert group[0].can_lead
        assert all(group[0] < member for member in group[1:] if member.can_lead)
    plain = cut_groups(peers(), target, minimum)
    plans = [[one.peer_id for one in group.members] for group in plain.groups if group.is_complete]
    if all(is_bearable(group) for group in complete):
        with_room = [group for group in complete if len(group) < target]
        placed = {peer for plan in plans for peer in plan} - cut.shunned
        for one in cut.left_over:
            assert one.peer_id not in placed or not any(is_bearable((*group, one)) for group in with_room)
    else:
        # No group at all would be left: the plan is as if nobody had said anything.
        assert [[one.peer_id for one in group] for group in complete] == plans


def test_clients_need_no_route_to_each_other():
    one, other, leader = candidates(3, (0, 1))
    one, other = one._replace(can_lead=False), other._replace(can_lead=False)
    assert not is_apart(one, [other, leader])
    assert is_apart(one, [other._replace(can_lead=True)])


def test_a_peer_that_most_name_is_planned_with_nobody():
    """Newcomers, which name nobody, are not sent to it either."""
    everybody = candidates(6, (1, 0), (2, 0), (3, 0))
    cut = cut_groups(everybody, 5, 2)
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


class TestRoutesThatARoundSpares:
    @pytest.mark.parametrize(
        ("pairs", "idle"),
        [
            ((), set()),
            (((1, 2),), {1, 2}),
            (((2, 1),), {1, 2}),
            (((1, 2), (2, 1)), {1, 2}),
            (((1, 2), (3, 4)), {1, 2, 3, 4}),
            (((1, 2), (1, 3)), {1}),  # itself at fault
            (((1, 3), (2, 3)), {3}),
            (((1, 2), (2, 3), (3, 4)), {1, 2, 3}),  # the last of the two that are in two pairs is at fault
            (((0, 1),), set()),  # it has joined the leader, so that there is a route
            (((1, 0), (2, 0), (3, 0)), set()),
            (((1, 0), (1, 2)), {1, 2}),
        ],
    )
    def test_who_owns_nothing(self, pairs: tuple[tuple[int, int], ...], idle: set[int]):
        assert owns_nothing(candidates(5, *pairs)) == idle

    def test_a_peer_that_is_no_member_does_not_count(self):
        assert owns_nothing(candidates(5, (1, 4), (2, 4))[:4]) == set()

    def test_clients_exchange_nothing_anyway(self):
        leader, one, other = candidates(3, (1, 2))
        clients = [leader, one._replace(can_lead=False), other._replace(can_lead=False)]
        assert owns_nothing(clients) == set()
        assert owns_nothing([leader, one, clients[2]]) == {1, 2}

    def test_an_auxiliary_takes_nothing_from_owners(self):
        leader, one, other = candidates(3, (1, 2))
        helper = one._replace(contributes=False)
        assert owns_nothing([leader, helper, other]) == {1}
        assert owns_nothing([leader, helper, other._replace(contributes=False)]) == set()

    @given(
        pairs=st.lists(st.tuples(st.integers(0, 7), st.integers(0, 7)), max_size=12),
        helpers=st.sets(st.integers(1, 7)),
    )
    def test_only_members_at_fault_would_use_a_bad_route(
        self, pairs: list[tuple[int, int]], helpers: set[int]
    ):
        members = [
            one._replace(contributes=number not in helpers)
            for number, one in enumerate(candidates(8, *(pair for pair in pairs if pair[0] != pair[1])))
        ]
        idle = owns_nothing(members)
        assert 0 not in idle
        spared = spared_routes(members)
        assert len({one for pair in spared for one in pair}) == 2 * len(spared)
        for one, other in map(tuple, spared):
            assert are_apart(members[one], members[other])
            assert one in idle or not members[other].contributes
            assert other in idle or not members[one].contributes
        at_fault = idle - {one for pair in spared for one in pair}
        for one in at_fault:
            assert sum(are_apart(members[one], members[other]) for other in range(1, 8) if other != one) > 1
        for owner in set(range(8)) - idle - at_fault - {0}:
            for sender in set(range(1, 8)) - {owner} - at_fault:
                assert not (members[sender].contributes and are_apart(members[owner], members[sender]))
