"""Trackers on real DHTs: epochs end by samples, together, and nobody waits."""

from __future__ import annotations

import math
import threading
from collections.abc import Iterator

import pytest
from real_swarm import wait_until

import shoal
from shoal.dht.node import DHTNode
from shoal.dht.validation import protected_key
from shoal.errors import InvalidStateError, InvalidTypeError, InvalidValueError
from shoal.optim import ProgressTracker
from shoal.optim.progress.records import records_of

TARGET = 100


@pytest.fixture(scope="module")
def dhts() -> Iterator[tuple[shoal.DHT, shoal.DHT]]:
    with shoal.DHT(start=True) as first, shoal.DHT(first.get_visible_maddrs(), start=True) as second:
        yield first, second


def make(dht: shoal.DHT, run: str, start: bool = True) -> ProgressTracker:
    return ProgressTracker(
        dht,
        run,
        TARGET,
        min_refresh_period=0.05,
        default_refresh_period=0.1,
        max_refresh_period=0.5,
        start=start,
    )


async def count_trackers(_: object, node: DHTNode) -> int:
    return len(records_of(node))


def wait_until_over(tracker: ProgressTracker) -> None:
    with tracker._state:
        while not tracker._ledger.is_over():
            assert tracker._state.wait(20)


def test_two_peers_end_an_epoch_together(dhts: tuple[shoal.DHT, shoal.DHT]):
    one, other = (make(dht, "together") for dht in dhts)
    one.report_local_progress(0, 60)
    assert not one.ready_to_update_epoch
    other.report_local_progress(0, 45)
    for tracker in (one, other):
        wait_until_over(tracker)
        assert tracker.global_progress.samples_accumulated == 105
        assert tracker.global_progress.num_peers == 2
        assert tracker.estimated_next_update_time == pytest.approx(shoal.get_dht_time(), abs=1)
    with one.pause_updates():
        assert one.update_epoch() == 1
    assert one.fetched_global_progress_this_epoch.wait(20)
    assert other.ready_to_update_epoch, "what the first one gave to this epoch still counts"
    with other.pause_updates():
        assert other.update_epoch(max(1, other.global_epoch)) == 1
    assert not other.ready_to_update_epoch
    assert one.local_progress.epoch == other.local_progress.epoch == 1
    for tracker in (one, other):
        tracker.shutdown()


def test_a_paused_peer_sees_that_all_others_have_left_its_epoch(dhts: tuple[shoal.DHT, shoal.DHT]):
    """Its forecast stands still: what it does at the end of its epoch follows from one look."""
    one, other = (make(dht, "left") for dht in dhts)
    for tracker in (one, other):
        tracker.report_local_progress(0, 60)
    wait_until_over(one)
    with one.pause_updates():
        assert not one.left_alone
        with other.pause_updates():
            other.update_epoch(1)
        wait_until(lambda: one.left_alone)
        assert one.global_epoch == 0
        assert one.update_epoch(1) == 1
        assert not one.left_alone
    for tracker in (one, other):
        tracker.shutdown()


def test_what_a_peer_found_in_a_pause_counts_after_it_if_no_epoch_has_begun(
    dhts: tuple[shoal.DHT, shoal.DHT],
):
    """One that tries again and again is paused nearly all the time, and has to see at last that it is behind."""
    one, other = (make(dht, "retried") for dht in dhts)
    for tracker in (one, other):
        tracker.report_local_progress(0, 60)
    wait_until_over(one)
    with one.pause_updates():
        with other.pause_updates():
            other.update_epoch(1)
        wait_until(lambda: one.left_alone)
        with one.pause_updates():
            pass
        assert one.global_epoch == 0
    assert one.global_epoch == 1
    with one.pause_updates():
        wait_until(lambda: one._found_in_pause is not None)
        one.update_epoch(2)
    assert one.global_epoch == 2
    for tracker in (one, other):
        tracker.shutdown()


def test_peers_found_in_a_pause_are_known_in_the_epoch_that_begins_in_it(
    dhts: tuple[shoal.DHT, shoal.DHT],
):
    """A newcomer loads a state in a pause, which its first look falls into: it must not take itself to be alone."""
    one = make(dhts[0], "newcomer")
    with one.pause_updates():
        one.update_epoch(3)
    one.report_local_progress(3, 10)
    with (other := make(dhts[1], "newcomer", start=False)).pause_updates():
        other.run_in_background()
        wait_until(lambda: other._found_in_pause is not None and other._found_in_pause[0].num_peers == 2)
        with other._state:  # no later look comes between
            other.update_epoch(3)
            assert other.global_progress.num_peers == 2
    for tracker in (one, other):
        tracker.shutdown()


def test_the_donor_of_a_state_is_known_before_the_first_look(dhts: tuple[shoal.DHT, shoal.DHT]):
    newcomer = make(dhts[0], "donated", start=False)
    assert newcomer.is_alone
    with newcomer.pause_updates():
        newcomer.update_epoch(3, others=1)
    assert newcomer.global_progress.num_peers == 2
    assert not newcomer.is_alone


def test_before_the_first_report_nothing_is_known_and_nobody_waits(dhts: tuple[shoal.DHT, shoal.DHT]):
    unready = shoal.DHT(start=False)
    tracker = ProgressTracker(unready, "early", TARGET, start=False)
    progress = tracker.global_progress
    assert (progress.num_peers, progress.samples_accumulated) == (1, 0)
    assert progress.eta_next_epoch == tracker.estimated_next_update_time == math.inf
    assert not tracker.is_alive()
    tracker.shutdown()


def test_a_shutdown_withdraws_the_record_and_may_be_repeated(dhts: tuple[shoal.DHT, shoal.DHT]):
    one, other = (make(dht, "withdrawn") for dht in dhts)
    one.report_local_progress(0, 60)
    other.report_local_progress(0, 60)
    wait_until_over(other)
    one.shutdown()
    one.shutdown()
    assert not one.is_alive()
    with pytest.raises(InvalidStateError):
        one.run_in_background()
    stored = dhts[0].get(protected_key("withdrawn_progress"), latest=True)
    assert stored is not None
    told = stored.value[dhts[0].peer_id.to_bytes()].value
    assert list(told) == [0, 0, 0, 0.0, 0.0, True]
    other.shutdown()


def test_the_end_of_a_dht_withdraws_the_records_of_its_trackers(dhts: tuple[shoal.DHT, shoal.DHT]):
    """Others would wait for the peer in each epoch until its record expires."""
    one = make(dhts[0], "ended")
    with shoal.DHT(dhts[0].get_visible_maddrs(), start=True) as ending:
        other = make(ending, "ended")
        for tracker in (one, other):
            tracker.report_local_progress(0, 10)
        wait_until(lambda: one.global_progress.num_peers == 2)
    wait_until(lambda: one.global_progress.num_peers == 1)
    for tracker in (one, other):
        tracker.shutdown()


def test_a_tracker_that_is_dropped_ends_its_thread(dhts: tuple[shoal.DHT, shoal.DHT]):
    before = dhts[0].run_coroutine(count_trackers)
    tracker = make(dhts[0], "dropped")
    tracker.report_local_progress(0, 60)
    assert tracker.fetched_global_progress_this_epoch.wait(20)
    assert dhts[0].run_coroutine(count_trackers) == before + 1
    thread = tracker._thread
    assert isinstance(thread, threading.Thread)
    del tracker
    thread.join(20)
    assert not thread.is_alive()
    assert dhts[0].run_coroutine(count_trackers) == before


def test_an_epoch_changes_only_while_updates_are_paused(dhts: tuple[shoal.DHT, shoal.DHT]):
    tracker = ProgressTracker(dhts[0], "paused", TARGET, start=False)
    with pytest.raises(InvalidStateError, match="pause_updates"):
        tracker.update_epoch()


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("target_batch_size", 0),
        ("prefix", ""),
        ("min_refresh_period", 0),
        ("max_refresh_period", 0.05),
        ("expected_drift_rate", -1),
        ("metadata_expiration", math.nan),
        ("performance_ema_alpha", 2),
    ],
)
def test_wrong_values_are_named(dhts: tuple[shoal.DHT, shoal.DHT], name: str, value: object):
    given = {"prefix": "wrong", "target_batch_size": TARGET, "start": False, name: value}
    with pytest.raises(InvalidValueError, match=name.removeprefix("performance_ema_")):
        ProgressTracker(dhts[0], **given)  # type: ignore[arg-type]
    with pytest.raises(InvalidTypeError, match="dht must be"):
        ProgressTracker("dht", "wrong", TARGET, start=False)  # type: ignore[arg-type]
