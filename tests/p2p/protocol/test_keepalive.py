"""When a silent peer is asked, and when it is given up: the pure core."""

from __future__ import annotations

import pytest

from shoal.p2p.config import HostConfig
from shoal.p2p.protocol.keepalive import LOOK_EVERY, KeepAlive, Patience, Verdict, patience


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


def answer(alive: KeepAlive, asked_at: float, now: float) -> bool:
    """The peer, which was looked at meanwhile, answers; whether it is asked once more."""
    look = asked_at + LOOK_EVERY
    while look < now:
        assert alive.check(look, 0, 0)[0] is Verdict.WAIT
        look += LOOK_EVERY
    alive.receive_bytes(now)
    return alive.receive_pong(now)


def test_a_late_answer_is_asked_for_again_and_forgotten_if_the_next_one_is_quick():
    alive = asked()
    alive.measure(0.01)
    before = alive.patience
    assert answer(alive, 1.5, 3.5), "it took 2 s"
    assert alive.patience > before, "meanwhile it counts"
    assert not answer(alive, 3.5, 3.51)
    assert alive.rtt == pytest.approx(0.01)
    assert alive.patience == before


def test_a_way_that_has_become_long_is_believed_the_second_time():
    alive = asked()
    alive.measure(0.01)
    assert answer(alive, 1.5, 3.0)
    assert not answer(alive, 3.0, 4.5)
    assert alive.patience.answer_within == HostConfig().max_answer_time


def test_a_long_time_of_a_handshake_is_asked_for_again_too():
    """Its first message may have been sent into a link that was cut."""
    alive = KeepAlive(HostConfig(), 0.0)
    alive.measure(2.0)
    assert alive.check(0.0, 0, 0)[0] is Verdict.PROBE
    assert not answer(alive, 0.0, 0.01)
    assert alive.patience == patience(0.01, 0.005, HostConfig())


@pytest.mark.parametrize(
    ("rtt", "deviation", "expected"),
    [
        pytest.param(None, 0.0, Patience(1.5, 3.0), id="not measured"),
        pytest.param(0.0001, 0.00005, Patience(1.5, 3.0), id="loopback"),
        pytest.param(0.05, 0.01, Patience(1.5, 3.0), id="a country"),
        pytest.param(0.2, 0.05, Patience(1.5, 3.2), id="an ocean"),
        pytest.param(0.6, 0.1, Patience(1.5, 8.0), id="a satellite"),
        pytest.param(1.2, 0.1, Patience(1.6, 12.8), id="a full link"),
        pytest.param(9.0, 4.5, Patience(2.0, 13.0), id="a link that is hardly one"),
    ],
)
def test_patience_follows_the_round_trip_time(rtt, deviation, expected):
    found = patience(rtt, deviation, HostConfig())
    assert found == pytest.approx(expected)
    assert sum(found) <= (5.0 if (rtt or 0.0) <= 0.2 else 15.0)


def test_a_longer_floor_is_kept_at_every_round_trip_time():
    config = HostConfig(probe_after=4.0)
    assert patience(0.01, 0.0, config).ask_after == patience(9.0, 0.0, config).ask_after == 4.0


def asked(config: HostConfig = HostConfig()) -> KeepAlive:
    """Silent since 0.0 and in use; asked at 1.5."""
    alive = KeepAlive(config, 0.0)
    alive.set_in_use(True, 0.0)
    assert alive.check(1.5, 0, 0) == (Verdict.PROBE, 1.5 + LOOK_EVERY)
    return alive


def test_who_was_suspended_reads_before_it_gives_anybody_up():
    alive = asked()
    assert alive.check(41.5, 0, 0) == (Verdict.WAIT, 41.5 + LOOK_EVERY)
    alive.receive_bytes(41.6)
    alive.receive_pong(41.6)
    assert alive.check(41.75, 0, 0) == (Verdict.WAIT, pytest.approx(43.1))
    assert alive.rtt is None, "the time of the suspension is no round trip"


def test_a_peer_that_died_meanwhile_is_found_in_time_that_the_loop_ran():
    alive = asked()
    _, again = alive.check(41.5, 0, 0)
    died = find_death(alive, again)
    assert died - 41.5 == pytest.approx(3.0 - LOOK_EVERY)


def test_suspended_at_the_last_moment_one_more_look_is_taken():
    alive = asked()
    now = 1.5
    for _ in range(11):
        now += LOOK_EVERY
        assert alive.check(now, 0, 0)[0] is Verdict.WAIT
    assert alive.check(now + 60.0, 0, 0)[0] is Verdict.WAIT
    alive.receive_bytes(now + 60.1)
    assert alive.check(now + 60.25, 0, 0)[0] is Verdict.WAIT


def test_a_loop_that_is_always_late_gives_its_peers_more_time_and_finds_the_dead():
    alive = asked()
    now, verdict = 1.5, Verdict.WAIT
    while verdict is not Verdict.DEAD:
        now += 2 * LOOK_EVERY
        verdict, _ = alive.check(now, 0, 0)
    assert now - 1.5 == pytest.approx(6.0, abs=2 * LOOK_EVERY)


def test_the_excuse_ends_with_the_next_sign_of_life():
    alive = asked()
    alive.check(41.5, 0, 0)
    alive.receive_bytes(41.6)
    alive.receive_pong(41.6)
    assert find_death(alive, 43.1) - 41.6 <= 5.0


def test_an_unused_connection_is_asked_with_another_one_of_its_peer():
    alive = KeepAlive(HostConfig(), 0.0)
    assert alive.ask(10.0)
    assert not alive.ask(10.1), "it is asked already"
    assert find_death(alive, 10.0 + LOOK_EVERY) == pytest.approx(13.0)
    alive = KeepAlive(HostConfig(), 0.0)
    alive.set_in_use(True, 0.0)
    assert not alive.ask(1.0), "it will be asked in its own time"
