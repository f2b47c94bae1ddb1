"""When a silent peer is asked, and when it is given up: the pure core."""

from __future__ import annotations

import pytest

from shoal.p2p.config import HostConfig
from shoal.p2p.protocol.keepalive import KeepAlive, Verdict


def find_death(
    alive: KeepAlive, start: float, *, unsent=lambda now: 0, written=lambda now: 0, limit: float = 100.0
) -> float | None:
    """Check whenever the core asks for it; when it gives the peer up."""
    now = start
    while now < limit:
        verdict, again = alive.check(now, unsent(now), written(now))
        if verdict is Verdict.DEAD:
            return now
        assert again > now
        now = again
    return None


def test_a_silent_peer_in_use_is_found_within_five_seconds():
    alive = KeepAlive(HostConfig(), 0.0)
    alive.set_in_use(True, 20.0)
    assert 4.0 < find_death(alive, 20.0) - 20.0 <= 5.0


def test_a_silent_peer_with_a_long_round_trip_gets_more_time_but_fifteen_seconds_at_most():
    alive = KeepAlive(HostConfig(), 0.0)
    alive.set_in_use(True, 0.0)
    alive.measure(0.6)
    assert 5.0 < find_death(alive, 0.0) <= 15.0
    alive = KeepAlive(HostConfig(), 0.0)
    alive.set_in_use(True, 0.0)
    alive.measure(9.0)
    assert 10.0 < find_death(alive, 0.0) <= 15.0


def test_an_unused_connection_is_asked_seldom():
    alive = KeepAlive(HostConfig(), 0.0)
    assert alive.check(0.0, 0, 0) == (Verdict.WAIT, 30.0)
    assert alive.check(30.0, 0, 0)[0] is Verdict.PROBE
    assert alive.awaits_pong


def test_answers_keep_it_alive_and_measure_the_round_trip():
    alive = KeepAlive(HostConfig(), 0.0)
    alive.set_in_use(True, 0.0)
    now = 0.0
    for _ in range(20):
        verdict, again = alive.check(now, 0, 0)
        if verdict is Verdict.PROBE:
            alive.receive_bytes(now + 0.05)
            alive.receive_pong(now + 0.05)
        assert verdict is not Verdict.DEAD
        now = again
    assert alive.rtt == pytest.approx(0.05)


def test_any_received_bytes_are_life():
    alive = KeepAlive(HostConfig(), 0.0)
    alive.set_in_use(True, 0.0)
    now = 0.0
    while now < 60.0:
        alive.receive_bytes(now)
        assert alive.check(now, 0, 0)[0] is not Verdict.DEAD
        now += 2.5


def test_a_peer_that_takes_our_bytes_slowly_is_alive_and_dead_once_it_stops():
    alive = KeepAlive(HostConfig(), 0.0)
    alive.set_in_use(True, 0.0)
    died = find_death(alive, 0.0, unsent=lambda now: 4_000_000 - int(min(now, 40.0) * 100_000))
    assert 40.0 < died <= 55.0


@pytest.mark.parametrize("unsent", [1_000_000, 3_000_000])
def test_a_busy_peer_whose_backlog_never_shrinks_is_alive(unsent):
    """We refill what it takes: at every look as much waits as before, or even more."""
    alive = KeepAlive(HostConfig(), 0.0)
    alive.set_in_use(True, 0.0)
    died = find_death(
        alive,
        0.0,
        unsent=lambda now: unsent + int(now),
        written=lambda now: unsent + int(now) + int(min(now, 40.0) * 100_000),
    )
    assert 40.0 < died <= 55.0


@pytest.mark.parametrize("backlog", [0, 36])
def test_what_was_taken_some_time_ago_does_not_count(backlog):
    """A peer that took what waited, and fell silent later, is found as soon as one that took nothing."""
    alive = KeepAlive(HostConfig(), 0.0)
    alive.check(10.0, backlog, 100)
    alive.set_in_use(True, 20.0)
    assert find_death(alive, 20.0, unsent=lambda now: 57, written=lambda now: 157) - 20.0 <= 5.0


def test_going_out_of_use_and_back_starts_the_silence_again():
    alive = KeepAlive(HostConfig(), 0.0)
    assert alive.set_in_use(True, 1.0)
    assert not alive.set_in_use(True, 2.0)
    alive.set_in_use(False, 3.0)
    assert alive.set_in_use(True, 25.0)
    assert alive.check(25.0, 0, 0) == (Verdict.WAIT, 26.5)


def test_a_peer_that_lives_on_another_connection_gets_the_longest_time_for_its_answer_on_this_one():
    config = HostConfig()
    alive = KeepAlive(config, 0.0)
    alive.set_in_use(True, 0.0)
    now = 0.0
    while (step := alive.check(now, 0, 0, seen_elsewhere=now))[0] is not Verdict.DEAD:
        now = step[1]
    assert now == pytest.approx(config.probe_after + config.max_answer_time)
