"""Failures are remembered, double the time for which a peer is avoided, and fade."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shoal.averaging.group import MAX_LOST
from shoal.averaging.matchmaking.memory import (
    AVOIDED_AT_MOST,
    AVOIDED_FOR,
    FORGIVEN_ONCE,
    HALF_LIFE,
    MAX_REMEMBERED,
    SEVERAL,
    FailureMemory,
    Fault,
)
from shoal.p2p.identity import Identity, PeerID

PEERS = sorted(Identity.generate(bytes([number]) * 32).peer_id for number in range(16))
A, B, C = PEERS[:3]


def memory(*connected: PeerID) -> FailureMemory:
    return FailureMemory(set(connected).__contains__, lambda peer: 1)


def avoided_for(known: FailureMemory, peer: PeerID, now: float) -> float:
    """Seconds, from ``now`` on, for which ``peer`` is avoided."""
    return next(float(later) for later in range(10_000) if peer not in known.avoided(now + later))


@pytest.mark.parametrize("fault", sorted(set(Fault) - FORGIVEN_ONCE.keys(), key=str))
def test_one_failure_is_over_after_the_time_that_it_is_worth(fault: Fault):
    known = memory()
    known.note(A, fault, 5.0)
    end = 5.0 + AVOIDED_FOR[fault]
    assert known.avoided(end - 0.1) == (A,)
    assert known.avoids(A, fault, end - 0.1)
    assert known.avoided(end) == ()
    assert not known.avoids(A, fault, end)


def test_each_further_failure_doubles_the_time():
    now, lengths = 0.0, []
    known = memory()
    for _ in range(4):
        known.note(A, Fault.STALLED, now)
        lengths.append(avoided_for(known, A, now))
    assert lengths == [20.0, 40.0, 80.0, 160.0]


@pytest.mark.parametrize("fault", FORGIVEN_ONCE)
def test_some_failures_are_forgiven_once(fault: Fault):
    known, again = memory(), 1.0 + FORGIVEN_ONCE[fault]
    known.note(A, fault, 0.0)
    assert avoided_for(known, A, 0.0) == FORGIVEN_ONCE[fault] < AVOIDED_FOR[fault]
    known.note(A, fault, again)
    assert avoided_for(known, A, again) == AVOIDED_FOR[fault]


def test_a_peer_that_fails_whenever_it_is_asked_costs_little_time_and_less():
    """Asked again as soon as it is avoided no more, it fails 15 times in half an hour, and not 180 times."""
    known, now, failures = memory(), 0.0, 0
    while now < 1800.0:
        known.note(A, Fault.STALLED, now)
        failures += 1
        now += avoided_for(known, A, now)
    assert failures <= 15


def test_nobody_is_avoided_for_ever():
    known = memory()
    for _ in range(100):
        known.note(A, Fault.STALLED, 0.0)
    assert known.avoided(AVOIDED_AT_MOST - 0.1) == (A,)
    assert known.avoided(AVOIDED_AT_MOST) == ()


def test_failures_fade():
    known = memory()
    known.note(A, Fault.STALLED, 0.0)
    late = 10 * HALF_LIFE
    known.note(A, Fault.STALLED, late)
    assert avoided_for(known, A, late) == pytest.approx(AVOIDED_FOR[Fault.STALLED], abs=1.0)


def test_a_round_that_commits_ends_it_and_halves_what_is_remembered():
    known = memory()
    for _ in range(3):
        known.note(A, Fault.STALLED, 0.0)
    known.note(B, Fault.STALLED, 0.0)
    known.forgive([A], 1.0)
    assert known.avoided(1.0) == (B,)
    known.note(A, Fault.STALLED, 1.0)
    assert avoided_for(known, A, 1.0) == pytest.approx(20.0 * 2**1.5, abs=1.0)


class TestWordsOfOthers:
    def test_one_alone_is_not_believed_however_often_it_says_so(self):
        known = memory()
        for now in range(10):
            known.hear(A, Fault.STALLED, float(now), told_by=B)
        assert known.avoided(10.0) == ()

    def test_several_are_believed(self):
        known = memory()
        for number in range(SEVERAL):
            assert known.avoided(0.0) == ()
            known.hear(A, Fault.STALLED, 0.0, told_by=PEERS[1 + number])
        assert known.avoided(0.0) == (A,)

    def test_what_was_said_long_ago_does_not_count(self):
        known = memory()
        known.hear(A, Fault.STALLED, 0.0, told_by=B)
        known.hear(A, Fault.STALLED, HALF_LIFE + 1.0, told_by=C)
        assert known.avoided(HALF_LIFE + 1.0) == ()


class TestConnections:
    """A process that was started again must not be kept apart from all who saw it die."""

    def test_one_that_came_back_can_be_reached_again(self):
        connected: set[PeerID] = set()
        known = FailureMemory(connected.__contains__, lambda peer: 1)
        for peer in (A, B):
            known.note(peer, Fault.UNREACHED, 0.0)
        assert set(known.avoided(1.0)) == {A, B}
        connected.add(A)
        assert known.avoided(2.0) == (B,)

    def test_one_that_is_back_before_the_next_search_is_avoided_no_more(self):
        connected: set[PeerID] = set()
        known = FailureMemory(connected.__contains__, lambda peer: 1)
        known.note(A, Fault.UNREACHED, 0.0)
        connected.add(A)
        assert known.avoided(1.0) == ()

    def test_a_connection_that_was_never_closed_may_be_a_dead_one(self):
        connected = {A}
        known = FailureMemory(connected.__contains__, lambda peer: 1)
        known.note(A, Fault.UNREACHED, 0.0)
        assert known.avoided(1.0) == (A,)
        connected.clear()
        assert known.avoided(2.0) == (A,)
        connected.add(A)
        assert known.avoided(3.0) == ()

    def test_it_makes_up_for_answers_that_could_not_come(self):
        """A peer that was cut off for long must not be avoided for long."""
        connected: set[PeerID] = set()
        known = FailureMemory(connected.__contains__, lambda peer: 1)
        for now in range(0, 40, 4):
            known.note(A, Fault.UNANSWERED, float(now))
        known.note(A, Fault.UNREACHED, 40.0)
        known.note(A, Fault.STALLED, 40.0)
        connected.add(A)
        assert avoided_for(known, A, 40.0) == AVOIDED_FOR[Fault.STALLED]

    def test_a_connection_makes_up_for_nothing_else(self):
        connected: set[PeerID] = set()
        known = FailureMemory(connected.__contains__, lambda peer: 1)
        known.note(A, Fault.UNREACHED, 0.0)
        known.note(A, Fault.STALLED, 0.0)
        connected.add(A)
        assert known.avoided(1.0) == (A,)


class TestIncarnations:
    def test_a_new_process_answers_for_nothing_that_the_old_one_did(self):
        """It may be connected before anybody has looked whether the old one was gone."""
        incarnations = {A: 1, B: 1}
        known = FailureMemory(lambda peer: True, incarnations.get)
        for peer in (A, B):
            known.note(peer, Fault.UNREACHED, 0.0)
            known.note(peer, Fault.STALLED, 0.0)
        assert set(known.avoided(1.0)) == {A, B}
        incarnations[A] = 2
        assert known.avoided(2.0) == (B,)
        known.note(A, Fault.STALLED, 2.0)
        assert avoided_for(known, A, 2.0) == AVOIDED_FOR[Fault.STALLED]

    def test_one_whose_process_is_not_known_is_the_same(self):
        incarnations: dict[PeerID, int] = {A: 1}
        known = FailureMemory(lambda peer: True, incarnations.get)
        known.note(A, Fault.STALLED, 0.0)
        incarnations.clear()
        assert known.avoided(1.0) == (A,)


def test_a_declaration_names_those_that_are_avoided_longest():
    known = memory()
    for number, peer in enumerate(PEERS):
        known.note(peer, Fault.UNREACHED, float(number))
    assert known.avoided(15.0) == tuple(reversed(PEERS[-MAX_LOST:]))


def test_memory_is_bounded():
    known = memory()
    peers = [
        PeerID.from_bytes(PEERS[0].to_bytes()[:-2] + n.to_bytes(2, "big")) for n in range(MAX_REMEMBERED + 10)
    ]
    for peer in peers:
        known.note(peer, Fault.UNREACHED, 0.0)
        known.hear(peer, Fault.STALLED, 0.0, told_by=A)
    remembered = [peer for peer in peers if known.avoids(peer, Fault.UNREACHED, 1.0)]
    assert remembered == peers[-MAX_REMEMBERED:]


@given(
    events=st.lists(
        st.tuples(
            st.sampled_from(PEERS[:4]),
            st.sampled_from([*Fault, "forgive", "hear"]),
            st.floats(0.0, 100.0),
            st.sampled_from(PEERS[4:7]),
        )
    )
)
def test_whatever_happens_is_over_in_time_and_forgotten(
    events: list[tuple[PeerID, Fault | str, float, PeerID]],
):
    known, now = memory(), 0.0
    for peer, what, later, member in events:
        now += later
        match what:
            case "forgive":
                known.forgive([peer], now)
                assert peer not in known.avoided(now)
            case "hear":
                known.hear(peer, Fault.STALLED, now, told_by=member)
            case Fault():
                known.note(peer, what, now)
                assert peer in known.avoided(now) or what in FORGIVEN_ONCE
    assert known.avoided(now + AVOIDED_AT_MOST) == ()
    known.avoided(now + 20 * HALF_LIFE)
    assert known._failures == {}
