"""From records to epoch, samples and times: forecast, agenda and shards."""

from __future__ import annotations

import math
import random
from dataclasses import replace
from typing import Any

import pytest

from shoal.errors import InvalidValueError
from shoal.optim.progress.agenda import Agenda
from shoal.optim.progress.forecast import Forecast, Periods, Sighting, forecast, global_epoch
from shoal.optim.progress.ledger import Ledger
from shoal.optim.progress.shards import (
    MAX_LEVEL,
    keys_of,
    levels_to_read,
    next_level,
    own_key,
    shard_of,
)
from shoal.optim.progress.values import ProgressRecord

TARGET = 1000


def record(epoch: int = 5, samples: int = 0, **values: Any) -> ProgressRecord:
    return replace(ProgressRecord(epoch, samples, 0, 0.0, 0.0, client_mode=False), **values)


def see(*records: ProgressRecord, own: ProgressRecord, now: float = 0.0, **periods: float) -> Forecast:
    sightings = [Sighting(entry, 0.0) for entry in records]
    return forecast(own, sightings, target=TARGET, now=now, periods=Periods(**periods))


def test_nobody_waits_for_peers_that_have_ended_but_their_samples_count():
    """Others, which have not seen their end, count the samples, too: all end the epoch together."""
    there, gone = Sighting(record(samples=100), 0.0), Sighting(record(samples=300), 0.0, is_gone=True)
    found = forecast(record(samples=10), [there, gone], target=TARGET, now=0.0, periods=Periods())
    assert (found.others_samples, found.num_peers, found.companions) == (400, 2, 1)
    assert not found.others_are_gone
    found = forecast(record(samples=10), [gone], target=TARGET, now=0.0, periods=Periods())
    assert (found.others_samples, found.num_peers, found.companions) == (300, 1, 0)
    assert found.others_are_gone
    assert not see(own=record(samples=10)).others_are_gone, "a read that finds nothing says nothing"


# ---- the epoch and its samples


def test_an_epoch_ends_by_samples_and_not_by_its_estimated_end():
    own = record(samples=300, samples_per_second=10.0)
    found = see(record(samples=300, samples_per_second=10.0), own=own, now=1000.0)
    assert found.eta == 0.0
    assert not found.is_over(5, 300, TARGET)
    assert found.is_over(5, 700, TARGET)


def test_those_who_are_still_in_an_epoch_count_what_others_gave_to_it():
    ahead = record(epoch=6, samples=7, samples_before=600)
    found = see(ahead, record(samples=100), own=record(samples=300))
    assert (found.epoch, found.others_samples) == (5, 700)
    assert found.is_over(5, 300, TARGET)


def test_companions_are_the_other_peers_of_the_own_epoch():
    assert see(record(), record(epoch=6), record(epoch=4), own=record()).companions == 1
    assert see(record(epoch=6), record(epoch=6), own=record()).companions == 0


def test_one_peer_that_is_always_ahead_ends_no_epoch_and_two_do():
    own, liar = record(samples=1), record(epoch=6)
    assert not see(liar, record(), record(), own=own).is_over(5, 1, TARGET)
    assert see(liar, liar, record(), own=own).is_over(5, 1, TARGET)


@pytest.mark.parametrize(
    ("own", "others", "expected"),
    [
        (0, [], 0),
        (0, [500], 500),
        (0, [500, 501], 500),
        (0, [500, 10**12], 500),
        (0, [500, 500, 10**12], 500),
        (500, [500, 10**12], 500),
        (500, [499, 501], 500),
        (500, [501, 501, 500], 501),
        (500, [0, 0, 0], 500),
    ],
)
def test_the_epoch_is_one_that_peers_confirm(own: int, others: list[int], expected: int):
    assert global_epoch(own, others) == expected


def test_the_epoch_of_a_client_moves_nobody():
    found = see(*[record(epoch=9, client_mode=True)] * 3, own=record())
    assert (found.epoch, found.num_clients) == (5, 0)


def test_peers_of_the_epoch_and_those_about_to_follow_are_counted():
    others = [record(epoch=4), record(client_mode=True), record(epoch=1), record(epoch=900)]
    found = see(*others, own=record())
    assert (found.num_peers, found.num_clients) == (3, 1)


def test_a_record_of_more_than_can_be_is_left_out():
    found = see(record(samples=10**9, samples_per_second=1e11), record(samples=1), own=record())
    assert (found.others_samples, found.num_peers) == (1, 2)


# ---- times


def test_no_speed_no_estimate():
    found = see(own=record(), default=3.0)
    assert found.eta == math.inf
    assert found.next_look == 3.0


def test_the_estimate_goes_by_speeds_and_ages():
    other = record(samples=200, samples_per_second=30.0, age=2.0)
    found = see(other, own=record(samples=100, samples_per_second=10.0), now=3.0)
    assert found.eta == pytest.approx((TARGET - 300 - 30 * 5) / 40)


def test_a_look_comes_before_the_end_by_as_much_as_peers_may_join():
    own = record(samples_per_second=200.0)
    assert see(own=own).next_look == pytest.approx(5 * 1 / 4)
    assert see(own=record(samples_per_second=1.0)).next_look == 10.0


def test_long_epochs_are_looked_at_less_often():
    own = record(samples=TARGET - 1, samples_per_second=5.0)
    assert see(own=own).next_look == pytest.approx(0.02 * TARGET / 5)
    assert see(own=record(samples_per_second=50 * TARGET)).pace == 0.1


def test_a_forecast_is_said_in_words():
    found = see(record(samples=20, samples_per_second=10.0, client_mode=True), own=record(samples=1))
    assert str(found).endswith("20 samples of others, 2 peers, 1 client among them")
    assert (
        str(see(own=record()))
        == "epoch 5 ends at an unknown time: 0 samples of others, 1 peer, 0 clients among them"
    )


def test_many_peers_are_looked_at_less_often():
    """Each look reads the records of all."""
    others = [record(samples_per_second=TARGET) for _ in range(999)]
    assert see(*others, own=record(samples_per_second=TARGET)).pace == pytest.approx(1000 * 0.0005)


def test_the_first_speed_that_is_known_is_a_reason_to_look():
    """Otherwise a peer that has just come learns of the others only after the default period."""
    ledger = Ledger(TARGET, Periods(), now=0.0)
    assert ledger.found(see(own=record(samples=0)), begun=0, now=0.0)
    assert ledger.agenda.next_look == 3.0
    ledger.report(1, 4.0, now=0.1)
    assert ledger.agenda.next_look <= 0.1


def test_reports_are_told_at_a_pace_and_urgent_ones_at_once():
    agenda = Agenda(pace=0.5)
    assert agenda.tells_at() == math.inf
    agenda.report(urgent=False)
    agenda.told(10.0)
    agenda.report(urgent=False)
    assert agenda.tells_at() == 10.5
    agenda.report(urgent=True)
    assert agenda.tells_at() <= 10.0
    agenda.told(10.1)
    assert agenda.tells_at() == math.inf


# ---- what strangers write


@pytest.mark.parametrize(
    "wrong",
    [
        None,
        "text",
        [5, 1, 0, 1.0, 0.0],
        [-1, 1, 0, 1.0, 0.0, False],
        [2**60, 1, 0, 1.0, 0.0, False],
        [True, 1, 0, 1.0, 0.0, False],
        [5, 1.5, 0, 1.0, 0.0, False],
        [5, 1, -1, 1.0, 0.0, False],
        [5, 1, 0, math.nan, 0.0, False],
        [5, 1, 0, math.inf, 0.0, False],
        [5, 1, 0, -1.0, 0.0, False],
        [5, 1, 0, 10**400, 0.0, False],
        [5, 1, 0, 1.0, 1e9, False],
        [5, 1, 0, 1.0, 0.0, 1],
    ],
)
def test_nonsense_is_no_record(wrong: Any):
    with pytest.raises(InvalidValueError, match="record of progress"):
        ProgressRecord.decode(wrong)


def test_a_record_is_read_as_it_was_written():
    told = record(samples=3, samples_before=4, samples_per_second=2.5, age=1.25, client_mode=True)
    assert ProgressRecord.decode(told.encode()) == told


# ---- shards


def test_a_small_swarm_has_one_key():
    assert next_level(0, 1000) == 0
    assert levels_to_read(0, 500) == [0]
    assert keys_of("run", 0) == ["run_progress"]


def test_a_first_look_finds_a_swarm_of_any_size():
    assert levels_to_read(0, None) == list(range(MAX_LEVEL + 1))


@pytest.mark.parametrize("count", [1001, 2000, 3000, 9000])
def test_peers_that_count_a_few_more_or_less_are_read(count: int):
    level = next_level(0, count)
    for seen in (count * 95 // 100, count, count * 105 // 100):
        other = next_level(level, seen)
        assert other in levels_to_read(level, count)
        assert level in levels_to_read(other, seen)


def test_levels_do_not_flutter():
    for count in range(1, 9000, 50):
        level = next_level(0, count)
        assert next_level(level, count) == level
        assert next_level(next_level(level, count * 2 // 3), count) in (level, level - 1)


def test_shards_are_about_equal():
    rng = random.Random(0)
    counts = [0] * 8
    for _ in range(4000):
        peer = rng.randbytes(38)
        counts[shard_of(peer, 3)] += 1
        assert own_key("run", peer, 3) in keys_of("run", 3)
    assert max(counts) < 600


def test_one_that_has_ended_leads_nobody_to_its_epoch():
    """Nobody can give its state: a peer that wanted to load it would drop its batches while the record stands."""
    gone = Sighting(record(6, samples_before=600), 0.0, is_gone=True)
    found = forecast(record(samples=100), [gone], target=TARGET, now=0.0, periods=Periods())
    assert (found.epoch, found.others_samples) == (5, 600)
    there = Sighting(record(6), 0.0)
    assert forecast(record(), [gone, there], target=TARGET, now=0.0, periods=Periods()).epoch == 6
