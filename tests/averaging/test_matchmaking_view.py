"""Whom a search plans with: what peers say of themselves counts, what they say of others counts for a while."""

from __future__ import annotations

from shoal.averaging.group import SCHEMA_HASH_BYTES, PeerMode
from shoal.averaging.matchmaking.candidate import Candidate
from shoal.averaging.matchmaking.messages import Declaration, DeclaredState, Search
from shoal.averaging.matchmaking.view import HEARSAY_LASTS, View
from shoal.testing.peers import make_identity

HASH = bytes(SCHEMA_HASH_BYTES)
ME, LEADER, MEMBER = (Candidate(float(i), make_identity(f"peer {i}").peer_id, True) for i in range(3))


def declaration(peer: Candidate, state: DeclaredState, *group: Candidate) -> tuple:
    members = tuple(Search(member.peer_id.to_bytes(), member.start_time) for member in group)
    return peer.peer_id, Declaration(peer.start_time, state, HASH, PeerMode.FULL, (), members)


LEADER_BEGAN = declaration(LEADER, DeclaredState.TAKEN, LEADER, MEMBER)
MEMBER_LOOKS = declaration(MEMBER, DeclaredState.LOOKING)


def test_one_record_takes_a_whole_group_out_of_the_plan_at_once():
    view = View(ME, HASH)
    view.take_in([LEADER_BEGAN, MEMBER_LOOKS], 0.0, 0.0)
    assert view.candidates(0.0) == [ME]


def test_a_member_that_never_heard_of_its_group_is_planned_with_again_though_the_dead_leaders_record_lasts():
    view = View(ME, HASH)
    for now in (0.0, HEARSAY_LASTS / 2, HEARSAY_LASTS):
        view.take_in([LEADER_BEGAN, MEMBER_LOOKS], now, now)
    assert view.candidates(HEARSAY_LASTS) == [ME, MEMBER]


def test_what_a_member_says_of_itself_counts_for_ever():
    view = View(ME, HASH)
    view.take_in([LEADER_BEGAN, declaration(MEMBER, DeclaredState.TAKEN, LEADER, MEMBER)], 0.0, 0.0)
    view.take_in([MEMBER_LOOKS], 3600.0, 3600.0)
    assert view.candidates(3600.0) == [ME]
