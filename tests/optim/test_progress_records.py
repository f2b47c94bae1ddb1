"""Records of progress on a simulated DHT, and how many of them fit."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

import pytest

from shoal.dht.storage import Storage, StorageLimits
from shoal.dht.types import ValueWithExpiration
from shoal.dht.validation import DHTRecord, ProtectedKeyValidator, protected_key
from shoal.optim.progress import records as module
from shoal.optim.progress.forecast import Forecast, Periods
from shoal.optim.progress.records import KIND, ProgressRecords
from shoal.optim.progress.shards import next_level, own_key
from shoal.optim.progress.values import ProgressRecord
from shoal.p2p.identity import Identity
from shoal.testing.clock import run
from shoal.testing.dht import SimulatedDHT
from shoal.utils.serializer import MSGPackSerializer

TARGET = 1000


def record(samples: int, epoch: int = 3, rate: float = 10.0) -> ProgressRecord:
    return ProgressRecord(epoch, samples, 0, rate, 0.0, client_mode=False)


async def look(records: ProgressRecords, own: ProgressRecord) -> Forecast:
    return await records.look(own, target=TARGET, periods=Periods())


def in_swarm(
    story: Callable[[SimulatedDHT, list[ProgressRecords]], Awaitable[None]], **errors: float
) -> None:
    async def main() -> None:
        dht = SimulatedDHT(1)
        dht.clock_errors = {int(name[1:]): error for name, error in errors.items()}
        nodes = await dht.start_many(3)
        swarm = [ProgressRecords(node, "run", lifetime=60.0) for node in nodes]
        try:
            await story(dht, swarm)
        finally:
            for records in swarm:
                await records.close()
            await dht.close()

    run(main)


def test_what_one_tells_others_read_with_its_age():
    async def story(_: SimulatedDHT, swarm: list[ProgressRecords]) -> None:
        swarm[0].tell(record(400, rate=20.0))
        await asyncio.sleep(2.0)
        first = await look(swarm[1], record(100, rate=0.0))
        await asyncio.sleep(5.0)
        second = await look(swarm[1], record(100, rate=0.0))
        assert (first.epoch, first.others_samples, first.num_peers) == (3, 400, 2)
        assert first.eta - second.eta == pytest.approx(5.0, abs=0.5)

    in_swarm(story)


def test_clocks_that_are_off_by_a_minute_change_no_estimate():
    etas: list[float] = []

    async def story(_: SimulatedDHT, swarm: list[ProgressRecords]) -> None:
        swarm[0].tell(record(400, rate=20.0))
        await asyncio.sleep(2.0)
        await look(swarm[1], record(100, rate=0.0))
        await asyncio.sleep(5.0)
        etas.append((await look(swarm[1], record(100, rate=0.0))).eta)

    in_swarm(story)
    in_swarm(story, n0=60.0, n1=-60.0)
    assert etas[0] == pytest.approx(etas[1], abs=0.5)


def test_who_has_no_samples_or_has_left_is_not_there():
    async def story(_: SimulatedDHT, swarm: list[ProgressRecords]) -> None:
        swarm[0].tell(record(0))
        swarm[2].tell(record(5))
        await asyncio.sleep(2.0)
        assert (await look(swarm[1], record(1))).num_peers == 2
        await swarm[2].close()
        assert (await look(swarm[1], record(1))).num_peers == 1

    in_swarm(story)


def test_a_record_is_kept_alive_by_itself():
    async def story(_: SimulatedDHT, swarm: list[ProgressRecords]) -> None:
        swarm[0].tell(record(5))
        await asyncio.sleep(300.0)
        assert (await look(swarm[1], record(1))).others_samples == 5

    in_swarm(story)


def test_a_peer_that_goes_to_another_level_is_counted_once(monkeypatch: pytest.MonkeyPatch):
    async def story(_: SimulatedDHT, swarm: list[ProgressRecords]) -> None:
        for records in swarm:
            records.tell(record(5))
        await asyncio.sleep(2.0)
        monkeypatch.setattr(module, "next_level", lambda level, _: 1)
        await look(swarm[0], record(5))
        assert swarm[0].level == 1
        await asyncio.sleep(2.0)
        monkeypatch.setattr(module, "next_level", lambda level, _: level)
        newcomer = await look(swarm[1], record(5))
        assert (newcomer.num_peers, newcomer.others_samples) == (3, 10)

    in_swarm(story)


# ---- two thousand peers


def test_two_thousand_peers_fit_and_are_read():
    storage, now = Storage(StorageLimits()), 1000.0
    level = next_level(0, 2000)
    keys: dict[str, bytes] = {}
    for number in range(2000):
        identity = Identity.generate(number.to_bytes(32, "big"))
        peer = identity.peer_id.to_bytes()
        name = own_key("run", peer, level)
        key = keys.setdefault(name, MSGPackSerializer.dumps(protected_key(name)))
        told = ProgressRecord(2**31, 10**6 + number, 10**6, 123.456, 12.345, client_mode=False)
        subkey, value = MSGPackSerializer.dumps(peer), MSGPackSerializer.dumps(KIND.encode(told))
        entry = DHTRecord(key, subkey, value, now + 60)
        signed = ProtectedKeyValidator(identity).sign_value(entry)
        assert storage.store(key, subkey, signed, now + 60, now) is None
    validator = ProtectedKeyValidator(Identity.generate(bytes(32)))
    peers = set()
    assert len(keys) == len(storage) == 2
    for _, stored in storage.records():
        assert stored.size < 0.4 * StorageLimits().max_record_size
        entries = {}
        for subkey, entry in stored.entries.items():
            full = DHTRecord(stored.key, subkey, entry.value, entry.expiration)
            assert validator.explain(full) is None
            value = MSGPackSerializer.loads(validator.strip_value(full))
            entries[MSGPackSerializer.loads(subkey)] = ValueWithExpiration(value, entry.expiration)
        peers |= {peer for peer, _ in KIND.all_in(ValueWithExpiration(entries, now + 60))}
    assert len(peers) == 2000


def test_a_level_is_full_long_after_it_has_been_split():
    """A swarm of which nobody has split yet: its one key still holds everybody."""
    limits = StorageLimits()
    subkey = MSGPackSerializer.dumps(Identity.generate(bytes(32)).peer_id.to_bytes())
    longest = MSGPackSerializer.dumps(
        ProgressRecord(2**48, 2**53, 2**53, 1 / 3, 1 / 3, client_mode=True).encode()
    )
    size = len(subkey) + len(longest) + 64
    assert 2000 * size < limits.max_record_size
    assert limits.max_subkeys > 2000
