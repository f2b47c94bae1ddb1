"""Which workers are started, and what they are told."""

from __future__ import annotations

import pytest

from benchmarks.launches import launches, observers
from benchmarks.work import GLOO, HIVEMIND, SHOAL, Averaging, Download, Network, Swarm, Training, raw

LINK = Network("cubic", rtt_ms=100, rate=200)


def test_peers_of_loopback_share_a_process_and_far_ones_do_not():
    assert [(one.host, one.spec["peers"]) for one in launches(Averaging(4, 1), SHOAL)] == [(0, 4)]
    far = launches(Averaging(4, 1, LINK), SHOAL)
    assert [(one.host, one.spec["peers"], one.spec["group"]) for one in far] == [(n, 1, 4) for n in range(4)]
    assert len({one.spec["ip"] for one in far}) == 4


def test_both_libraries_are_told_the_same():
    ours, theirs = (launches(Averaging(2, 1, LINK), side) for side in (SHOAL, HIVEMIND))
    assert [one.spec | {"library": ""} for one in ours] == [one.spec | {"library": ""} for one in theirs]


def test_each_peer_is_told_its_own_bandwidth_if_at_all():
    uneven = Network("cubic", rtt_ms=20, rate=200, first_up=20)
    given = launches(Averaging(3, 1, uneven, bandwidth_given=True), SHOAL)
    assert [one.spec["bandwidth"] for one in given] == [20, 200, 200]
    assert [one.spec["bandwidth"] for one in launches(Averaging(3, 1, uneven), SHOAL)] == [None] * 3


def test_a_trainer_has_a_core_of_its_own():
    work = Averaging(2, 1, LINK, training=True)
    assert [one.spec["cores"] for one in launches(work, SHOAL)] == [[0], [1]]
    assert [one.spec["training"] for one in launches(work, SHOAL)] == [True, False]


def test_raw_connections_carry_what_one_peer_sends_and_receives():
    (side,) = raw(16)
    both = launches(Averaging(4, 2, LINK), side)
    assert [(one.spec["to_send"], one.spec["to_receive"]) for one in both] == [(2_000_000, 2_000_000)] * 2
    one_way = launches(Download(2, LINK), side)
    assert [(one.spec["to_send"], one.spec["to_receive"]) for one in one_way] == [
        (2_000_000, 0),
        (0, 2_000_000),
    ]


def test_others_on_the_same_links_are_watched_where_that_is_asked():
    assert [(one.program, one.host) for one in observers(Averaging(2, 1, LINK, foreign=True))] == [
        ("foreign", 0),
        ("foreign", 1),
    ]
    assert observers(Averaging(2, 1, LINK)) == observers(Download(1, LINK)) == []


def test_a_side_is_not_asked_for_what_it_cannot_do():
    with pytest.raises(ValueError, match="side must be one that can do swarm, got gloo"):
        launches(Swarm(16, 4, 5), GLOO)
    with pytest.raises(ValueError, match="averaging"):
        launches(Averaging(2, 1, LINK), GLOO)


def test_the_last_peers_that_train_are_clients():
    work = Training(peers=4, clients=2, epochs=3, step_s=(0.1, 0.2))
    assert [one.spec["client"] for one in launches(work, HIVEMIND)] == [False, False, True, True]
    assert {one.program for one in launches(work, SHOAL)} == {"training"}
