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
    meter.begin({"old": info(100, 10, 1000)})
    assert meter.read({"old": info(100, 10, 1000)}) == []
    moving = info(130, 11, 1500)
    assert meter.read({"old": moving}) == [moving]
    meter.read(
        {"old": moving, "new": info(20, 2, 300)}
    )  # opened after the beginning: all that it has sent counts
    meter.count("home", info(7, 0, 70))
    assert meter.total == Counts(57, 3, 870)
    meter.begin({})
    assert meter.total == Counts()


def test_what_lanes_are_chosen_by_is_counted_apart():
    meter = Meter()
    meter.begin({})
    meter.read({"lane": info(10, 0, 100)})
    meter.interval = Interval(1.0)
    meter.read({"lane": info(30, 1, 500)})
    meter.count("other", info(50, 50, 50))
    assert meter.interval.counts == Counts(20, 1, 400)
    assert meter.total == Counts(80, 51, 550)


def test_what_a_lane_did_while_it_carried_nothing_is_no_loss_of_now():
    meter = Meter()
    meter.begin({})
    meter.read({"one": info(10, 0, 100), "two": info(10, 0, 100)})
    meter.interval = Interval(1.0)
    meter.read({"one": info(20, 0, 200)})  # the other one was taken away, and had lost packets
    assert meter.read({"one": info(30, 0, 300), "two": info(40, 9, 400)}) == [info(30, 0, 300)]
    assert meter.interval.counts == Counts(20, 0, 200)
    meter.read({"one": info(30, 0, 300), "two": info(50, 9, 500)})
    assert meter.interval.counts == Counts(30, 0, 300)
    assert meter.total == Counts(80, 9, 800)


def test_a_lane_that_is_gone_is_a_new_one_when_it_comes_again():
    meter = Meter()
    meter.read({"lane": info(10, 0, 100)})
    meter.forget("lane")
    meter.read({"lane": info(5, 0, 50)})
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


def test_a_pause_makes_no_smallest_round_trip_time_forgotten():
    """Else a queue that others had filled meanwhile would be taken for the path."""
    memory = PathMemory()
    memory.note_rtt(0.2, 0.0)
    memory.note_rtt(0.1, 1.0)
    for pause in range(1, 10):
        memory.note_rtt(0.3, 100.0 * pause)
        assert memory.min_rtt == 0.1
