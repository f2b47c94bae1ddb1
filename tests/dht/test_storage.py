from __future__ import annotations

import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shoal.dht.ids import key_id
from shoal.dht.storage import PLAIN, Entry, Record, Storage, StorageLimits

NOW = 1_000_000.0


def contents(storage: Storage, key: bytes, now: float = NOW) -> dict[bytes, bytes]:
    record = storage.get(key_id(key), now)
    return {} if record is None else {subkey: entry.value for subkey, entry in record.entries.items()}


@pytest.fixture
def storage() -> Storage:
    return Storage(StorageLimits())


def test_the_larger_expiration_wins(storage: Storage) -> None:
    assert storage.store(b"k", PLAIN, b"a", NOW + 10, NOW) is None
    assert storage.store(b"k", PLAIN, b"b", NOW + 20, NOW) is None
    assert "expires 5 s later than this one" in (storage.store(b"k", PLAIN, b"c", NOW + 15, NOW) or "")
    assert contents(storage, b"k") == {PLAIN: b"b"}


def test_equal_expirations_are_decided_by_the_bytes(storage: Storage) -> None:
    assert storage.store(b"k", PLAIN, b"m", NOW + 10, NOW) is None
    assert storage.store(b"k", PLAIN, b"a", NOW + 10, NOW) is not None
    assert storage.store(b"k", PLAIN, b"m", NOW + 10, NOW) is None  # the same again
    assert storage.store(b"k", PLAIN, b"z", NOW + 10, NOW) is None
    assert contents(storage, b"k") == {PLAIN: b"z"}


def test_subkeys_are_merged_and_expire_one_by_one(storage: Storage) -> None:
    storage.store(b"k", b"s1", b"a", NOW + 10, NOW)
    storage.store(b"k", b"s2", b"b", NOW + 20, NOW)
    storage.store(b"k", b"s1", b"c", NOW + 5, NOW)
    assert contents(storage, b"k") == {b"s1": b"a", b"s2": b"b"}
    assert contents(storage, b"k", NOW + 10) == {b"s2": b"b"}
    assert contents(storage, b"k", NOW + 20) == {}
    assert len(storage) == 0
    assert storage.total_size == 0


def test_plain_values_and_dictionaries_displace_each_other_by_expiration(storage: Storage) -> None:
    storage.store(b"k", b"s1", b"a", NOW + 10, NOW)
    storage.store(b"k", b"s2", b"b", NOW + 20, NOW)
    assert "dictionary" in (storage.store(b"k", PLAIN, b"p", NOW + 15, NOW) or "")
    assert storage.store(b"k", PLAIN, b"p", NOW + 30, NOW) is None
    assert contents(storage, b"k") == {PLAIN: b"p"}
    assert "plain value" in (storage.store(b"k", b"s1", b"c", NOW + 25, NOW) or "")
    assert storage.store(b"k", b"s1", b"c", NOW + 40, NOW) is None
    assert contents(storage, b"k") == {b"s1": b"c"}


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ((b"k", PLAIN, b"v", NOW - 2), "it expired 2 s ago"),
        ((b"k", PLAIN, b"v", NOW - 1e9), "must be a time, as get_dht_time() + 60, got"),
        ((b"k", PLAIN, b"v", math.nan), "must be a time, as get_dht_time() + 60, got nan"),
        ((b"k", PLAIN, b"v", NOW + 3661), "at most 1 h"),
        ((b"k", PLAIN, b"v", math.inf), "at most 1 h"),
        ((b"k" * 1025, PLAIN, b"v", NOW + 1), "longer than 1024"),
        ((b"k", b"s" * 1025, b"v", NOW + 1), "longer than 1024"),
        ((b"k", PLAIN, bytes(128 * 1024 + 1), NOW + 1), "131,073 bytes"),
    ],
)
def test_limits_of_one_entry(storage: Storage, arguments: Any, reason: str) -> None:
    assert reason in (storage.store(*arguments, NOW) or "")
    assert len(storage) == 0


def test_a_full_record_drops_what_expires_first() -> None:
    storage = Storage(StorageLimits(max_subkeys=2))
    storage.store(b"k", b"s1", b"a", NOW + 10, NOW)
    storage.store(b"k", b"s2", b"b", NOW + 20, NOW)
    assert "full" in (storage.store(b"k", b"s3", b"c", NOW + 9, NOW) or "")
    assert storage.store(b"k", b"s3", b"c", NOW + 15, NOW) is None
    assert contents(storage, b"k") == {b"s2": b"b", b"s3": b"c"}
    assert storage.store(b"k", b"s2", b"d", NOW + 21, NOW) is None  # replacing needs no room
    assert contents(storage, b"k") == {b"s2": b"d", b"s3": b"c"}


def test_a_record_is_bounded_in_bytes() -> None:
    storage = Storage(StorageLimits(max_value_size=100, max_record_size=250))
    for number in range(5):
        assert storage.store(b"k", b"s%d" % number, bytes(100), NOW + 10 + number, NOW) is None
    assert sorted(contents(storage, b"k")) == [b"s3", b"s4"]


def test_a_full_storage_drops_what_expires_first() -> None:
    storage = Storage(StorageLimits(max_records=3))
    for number, ahead in enumerate([30, 10, 20]):
        assert storage.store(b"k%d" % number, PLAIN, b"v", NOW + ahead, NOW) is None
    assert "full" in (storage.store(b"k3", PLAIN, b"v", NOW + 5, NOW) or "")
    assert storage.store(b"k4", PLAIN, b"v", NOW + 15, NOW) is None
    assert [bool(contents(storage, b"k%d" % n)) for n in range(5)] == [True, False, True, False, True]


def test_total_size_is_bounded() -> None:
    storage = Storage(StorageLimits(max_total_size=10_000))
    for number in range(100):
        storage.store(b"k%d" % number, b"s", bytes(500), NOW + 1 + number, NOW)
        assert storage.total_size <= 10_000
    assert contents(storage, b"k99")


def test_replacing_one_entry_for_ever_takes_no_memory(storage: Storage) -> None:
    for number in range(5000):
        storage.store(b"k", b"s", b"v", NOW + 1 + number / 10, NOW)
    assert len(storage._by_expiration) <= 1002


def test_only_changes_are_told_to_those_who_know_the_rest() -> None:
    storage = Storage(StorageLimits(), first_sequence=1000)
    storage.store(b"k", b"s1", b"a", NOW + 10, NOW)
    record = storage.get(key_id(b"k"), NOW)
    assert record is not None
    assert [subkey for subkey, _ in record.changes_since(0)] == [b"s1"]
    known = record.sequence
    assert record.changes_since(known) == []
    storage.store(b"k", b"s2", b"b", NOW + 10, NOW)
    storage.store(b"k", b"s1", b"a", NOW + 10, NOW)  # no change
    assert [subkey for subkey, _ in record.changes_since(known)] == [b"s2"]
    # numbers of another life of the node, larger or smaller
    assert len(record.changes_since(known + 10**9)) == 2
    assert len(record.changes_since(5)) == 2


@given(
    st.lists(st.tuples(st.integers(0, 3), st.integers(0, 5), st.binary(max_size=2)), max_size=12),
    st.randoms(),
)
def test_replicas_agree_whatever_the_order(entries: list[tuple[int, int, bytes]], rng: Any) -> None:
    """Dictionaries only: between a plain value and a dictionary the order may matter until both were stored again."""
    shuffled = entries[:]
    rng.shuffle(shuffled)
    records = []
    for order in (entries, shuffled):
        record = Record(b"k")
        for sequence, (subkey, expiration, value) in enumerate(order):
            record.merge(b"s%d" % subkey, Entry(value, float(expiration)), sequence)
        records.append(record)
    assert records[0].entries == records[1].entries
    assert records[0].size == records[1].size == sum(2 + len(e.value) for e in records[0].entries.values())


@given(
    st.lists(
        st.tuples(
            st.integers(0, 5), st.integers(0, 3), st.integers(-2, 30), st.integers(0, 40), st.integers(0, 3)
        ),
        max_size=40,
    )
)
def test_accounts_stay_right_under_any_load(operations: list[tuple[int, int, int, int, int]]) -> None:
    limits = StorageLimits(max_subkeys=2, max_records=3, max_total_size=900, max_record_size=60)
    storage, now = Storage(limits), NOW
    for key, subkey, ahead, size, elapsed in operations:
        now += elapsed
        stored_key, stored_subkey = b"k%d" % key, (b"s%d" % subkey if subkey else PLAIN)
        reason = storage.store(stored_key, stored_subkey, bytes(size), now + ahead, now)
        record = storage.get(key_id(stored_key), now)
        if reason is None:
            assert record is not None
            assert record.entries[stored_subkey] == Entry(bytes(size), now + ahead)
        records = [record for _, record in storage.records()]
        assert all(record.entries and len(record.entries) <= 2 and record.size <= 60 for record in records)
        assert all(entry.expiration > now for record in records for entry in record.entries.values())
        footprint = sum(len(r.key) + r.size + 200 * len(r.entries) for r in records)
        assert storage.total_size == footprint <= 900
        assert len(storage) <= 3
