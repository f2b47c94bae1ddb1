"""Whom a search plans with: what peers say of themselves counts, what they say of others counts for a while."""

from __future__ import annotations

import math

import pytest

from shoal.averaging.group import SCHEMA_HASH_BYTES, PeerMode
from shoal.averaging.matchmaking.candidate import Candidate
from shoal.averaging.matchmaking.left_out import (
    HEARSAY_AT_LEAST,
    HEARSAY_AT_MOST,
    HEARSAY_LATENCIES,
    MAX_HEARSAY,
)
from shoal.averaging.matchmaking.messages import (
    MAX_DECLARED_MEMBERS,
    Declaration,
    DeclaredState,
    SearchId,
    decode_declaration,
    encode_declaration,
    search_marks,
)
from shoal.averaging.matchmaking.view import View
from shoal.errors import InvalidValueError
from shoal.testing.matchmaking_cores import core_peer_id
from shoal.testing.peers import make_identity

HASH = bytes(SCHEMA_HASH_BYTES)
ME, LEADER, MEMBER = (Candidate(float(i), make_identity(f"peer {i}").peer_id, True) for i in range(3))


def declaration(peer: Candidate, state: DeclaredState, *group: Candidate) -> tuple:
    members = tuple(SearchId(member.peer_id.to_bytes(), member.start_time) for member in group)
    return peer.peer_id, Declaration(peer.start_time, state, HASH, PeerMode.FULL, (), search_marks(members))


LEADER_BEGAN = declaration(LEADER, DeclaredState.TAKEN, LEADER, MEMBER)
MEMBER_LOOKS = declaration(MEMBER, DeclaredState.LOOKING)


def test_one_record_takes_a_whole_group_out_of_the_plan_at_once():
    view = View(ME, HASH)
    view.take_in([LEADER_BEGAN, MEMBER_LOOKS], 0.0, 0.0)
    assert view.candidates(0.0) == [ME]


@pytest.mark.parametrize("latency", [0.0, 0.5, 100.0])
def test_a_member_that_never_heard_of_its_group_is_planned_with_again_though_the_dead_leaders_record_lasts(
    latency,
):
    lasts = min(HEARSAY_AT_LEAST + HEARSAY_LATENCIES * latency, HEARSAY_AT_MOST)
    view = View(ME, HASH)
    view.note_latency(latency)
    for now in (0.0, lasts / 2, lasts):
        view.take_in([LEADER_BEGAN, MEMBER_LOOKS], now, now)
        assert (view.candidates(now) == [ME]) == (now < lasts)
    assert view.candidates(lasts) == [ME, MEMBER]


def test_one_record_that_names_everybody_again_and_again_hides_each_search_once_and_briefly():
    view = View(ME, HASH)
    hidden = 0
    for poll in range(100):
        later = MEMBER._replace(start_time=1e12 + poll)
        for group in ((LEADER, MEMBER), (LEADER, later)):
            view.take_in([declaration(LEADER, DeclaredState.TAKEN, *group), MEMBER_LOOKS], 0.0, poll / 10)
            hidden += view.candidates(poll / 10) == [ME]
    assert 0 < hidden <= 2 * 10 * HEARSAY_AT_LEAST


def test_what_others_say_of_peers_that_were_never_seen_takes_little_memory():
    view = View(ME, HASH)
    view.take_in([LEADER_BEGAN, MEMBER_LOOKS], 0.0, 0.0)
    for poll in range(100):
        strangers = [MEMBER._replace(start_time=1e12 + 64 * poll + number) for number in range(64)]
        view.take_in([declaration(LEADER, DeclaredState.TAKEN, *strangers), MEMBER_LOOKS], 0.0, float(poll))
    assert len(view._out._hearsay) <= MAX_HEARSAY
    view.take_in([LEADER_BEGAN, MEMBER_LOOKS], 200.0, 200.0)
    assert view.candidates(200.0) == [ME, MEMBER]  # what was said of it is not forgotten: it counts once


def test_what_was_said_of_a_search_counts_when_that_is_seen_later():
    view = View(ME, HASH)
    view.leave_out_group((SearchId(MEMBER.peer_id.to_bytes(), MEMBER.start_time),), math.inf, 0.0)
    view.take_in([MEMBER_LOOKS], 0.1, 0.1)
    assert view.candidates(0.1) == [ME]


def test_a_declaration_names_so_many_members_at_most_that_many_of_them_fit_a_record():
    members = [MEMBER._replace(peer_id=core_peer_id(number)) for number in range(MAX_DECLARED_MEMBERS + 1)]
    _, fits = declaration(LEADER, DeclaredState.TAKEN, *members[1:])
    assert len(encode_declaration(decode_declaration(encode_declaration(fits)))) < 4096
    _, larger = declaration(LEADER, DeclaredState.TAKEN, *members)
    with pytest.raises(InvalidValueError, match="of a group"):
        decode_declaration(encode_declaration(larger))


def test_what_a_member_says_of_itself_counts_for_ever():
    view = View(ME, HASH)
    view.take_in([LEADER_BEGAN, declaration(MEMBER, DeclaredState.TAKEN, LEADER, MEMBER)], 0.0, 0.0)
    view.take_in([MEMBER_LOOKS], 3600.0, 3600.0)
    assert view.candidates(3600.0) == [ME]


def test_a_member_of_a_full_group_that_has_begun_is_not_counted_as_one_that_may_still_be_placed():
    view = View(ME, HASH)
    view.take_in([MEMBER_LOOKS], 0.0, 0.0)
    view.leave_out(MEMBER.peer_id, 5.0, is_looking=True)
    assert view.candidates(1.0, with_full_groups=True) == [ME, MEMBER]
    view.leave_out_group((SearchId(MEMBER.peer_id.to_bytes(), MEMBER.start_time),), math.inf, 0.5)
    assert view.candidates(1.0, with_full_groups=True) == [ME]


def test_a_group_that_has_begun_takes_back_whom_its_leader_named_before_and_let_go():
    view = View(ME, HASH)
    view.take_in([MEMBER_LOOKS], 0.0, 0.0)
    full = tuple(SearchId(peer.peer_id.to_bytes(), peer.start_time) for peer in (LEADER, MEMBER))
    view.leave_out_group(full, math.inf, 0.0, is_looking=True)
    assert view.candidates(0.1) == [ME]
    view.take_in([MEMBER_LOOKS, declaration(LEADER, DeclaredState.TAKEN, LEADER)], 0.2, 0.2)
    assert view.candidates(0.2) == [ME, MEMBER]


def test_a_group_that_has_begun_says_nothing_of_the_members_of_another_one():
    other = MEMBER._replace(peer_id=core_peer_id(7))
    view = View(ME, HASH)
    view.take_in([MEMBER_LOOKS], 0.0, 0.0)
    full = tuple(SearchId(peer.peer_id.to_bytes(), peer.start_time) for peer in (other, MEMBER))
    view.leave_out_group(full, math.inf, 0.0, is_looking=True)
    view.take_in([MEMBER_LOOKS, declaration(LEADER, DeclaredState.TAKEN, LEADER)], 0.2, 0.2)
    assert view.candidates(0.2) == [ME]
