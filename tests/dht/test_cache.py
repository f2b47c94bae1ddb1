"""What other nodes answer is believed within the limits of what this node itself would store."""

from __future__ import annotations

import math

import pytest

from shoal.dht.cache import RecordCache
from shoal.dht.ids import key_id
from shoal.dht.storage import PLAIN, Entry, StorageLimits
from shoal.dht.validation import CompositeValidator, DHTRecord, RecordValidatorBase
from shoal.p2p.identity import PeerID
from shoal.utils.serializer import MSGPackSerializer

dumps = MSGPackSerializer.dumps
KEY = dumps("key")
NOW = 1_000_000.0


def make_cache(limits: StorageLimits | None = None, max_records: int = 10) -> RecordCache:
    return RecordCache(max_records, CompositeValidator(), limits or StorageLimits(), lambda: NOW)


@pytest.mark.parametrize("expiration", [NOW + 3600 + 61, 1e300, math.inf, math.nan, NOW, NOW - 1])
def test_no_answer_lives_longer_than_a_record_may(
    expiration: float, many_peers: list[PeerID], caplog: pytest.LogCaptureFixture
) -> None:
    cache = make_cache()
    known = cache.open(key_id(KEY), KEY)
    cache.merge(key_id(KEY), known, many_peers[0], [(PLAIN, Entry(dumps("forged"), expiration))], 1)
    assert known.value(NOW) is None
    cache.merge(key_id(KEY), known, many_peers[1], [(PLAIN, Entry(dumps("good"), NOW + 10))], 1)
    assert known.value(NOW) == ("good", NOW + 10)
    assert ("ignored" in caplog.text) == (not expiration <= NOW)


def test_no_answer_is_larger_than_a_record_may_be(many_peers: list[PeerID]) -> None:
    limits = StorageLimits(max_subkeys=20, max_record_size=2000, max_value_size=500)
    cache = make_cache(limits)
    known = cache.open(key_id(KEY), KEY)
    for number in range(200):
        entry = (dumps(number), Entry(dumps(bytes(number)), NOW + 100 + number))
        cache.merge(key_id(KEY), known, many_peers[0], [entry], number + 1)
        assert len(known.record.entries) <= 20
        assert known.record.size <= 2000
    value = known.value(NOW)
    assert value is not None
    assert max(value.value) == 199, "what expires first goes first"
    cache.merge(key_id(KEY), known, many_peers[0], [(dumps("x"), Entry(dumps(bytes(501)), NOW + 1000))], 999)
    assert "x" not in value.value


def test_keys_that_nobody_has_are_forgotten_too(many_peers: list[PeerID]) -> None:
    cache = make_cache(max_records=10)
    for number in range(100):
        cache.open(key_id(dumps(number)), dumps(number))
    assert sum(cache.get(key_id(dumps(number))) is not None for number in range(100)) == 10


def test_a_reason_that_quotes_a_record_is_one_line(
    many_peers: list[PeerID], caplog: pytest.LogCaptureFixture
) -> None:
    class Quoting(RecordValidatorBase):
        def validate(self, record: DHTRecord) -> bool:
            raise ValueError(MSGPackSerializer.loads(record.value))

    validator = CompositeValidator([Quoting()])
    cache = RecordCache(10, validator, StorageLimits(), lambda: NOW)
    known = cache.open(key_id(KEY), KEY)
    forged = dumps("no\n[ERROR] forged" + "x" * 10_000)
    cache.merge(key_id(KEY), known, many_peers[0], [(PLAIN, Entry(forged, NOW + 10))], 1)
    assert known.value(NOW) is None
    (record,) = caplog.records
    assert "forged" in record.getMessage()
    assert record.getMessage().isprintable()
    assert len(record.getMessage()) < 600
