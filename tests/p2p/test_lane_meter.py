"""What lanes have sent and lost, and how the smallest round-trip time is remembered."""

from __future__ import annotations

import math

from shoal.p2p.lanes.memory import RTT_SECONDS, PathMemory
from shoal.p2p.lanes.meter import Counts, Interval, Meter
from shoal.p2p.tcp_info import TcpInfo


def info(sent: int, retransmitted: int, delivered: int) -> TcpInfo:
    return TcpInfo(0.1, 0.1, sent, retransmitted, delivered)


def test_everything_counts_that_was_sent_since_the_beginning():
    meter = Meter()
    meter.begin([("old", info(100, 10, 1000))])
    assert not meter.read("old", info(100, 10, 1000))
    assert meter.read("old", info(130, 11, 1500))
    assert meter.read("new", info(20, 2, 300))  # opened after the beginning: all that it has sent counts
    assert meter.total == Counts(50, 3, 800)
    meter.begin([])
    assert meter.total == Counts()


def test_what_lanes_are_chosen_by_is_counted_apart():
    meter = Meter()
    meter.begin([])
    meter.read("lane", info(10, 0, 100))
    meter.interval = Interval(1.0)
    meter.read("lane", info(30, 1, 500))
    assert meter.interval.counts == Counts(20, 1, 400)
    assert meter.total == Counts(30, 1, 500)


def test_a_lane_that_is_gone_is_a_new_one_when_it_comes_again():
    meter = Meter()
    meter.read("lane", info(10, 0, 100))
    meter.forget("lane")
    meter.read("lane", info(5, 0, 50))
    assert meter.total == Counts(15, 0, 150)


def test_the_smallest_round_trip_time_follows_a_route_that_has_changed():
    memory = PathMemory()
    assert memory.min_rtt == math.inf
    now = 0.0
    while now < 100.0:
        memory.note_rtt(0.05 if now % 10 < 1 else 0.08, now)
        assert memory.min_rtt == 0.05
        now += 0.5
    changed_at = now
    while now < changed_at + 2 * RTT_SECONDS:
        memory.note_rtt(0.2, now)
        now += 0.5
    assert memory.min_rtt == 0.2


def test_a_smaller_round_trip_time_counts_at_once_and_an_old_one_not_at_all():
    memory = PathMemory()
    memory.note_rtt(0.2, 0.0)
    memory.note_rtt(0.1, 1.0)
    assert memory.min_rtt == 0.1
    memory.note_rtt(0.3, 1.0 + 3 * RTT_SECONDS)
    assert memory.min_rtt == 0.3
