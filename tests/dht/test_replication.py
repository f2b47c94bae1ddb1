from __future__ import annotations

import asyncio
from collections.abc import Iterable
from typing import Any

import pytest

from shoal.dht import node as node_module
from shoal.dht.ids import key_id, node_id
from shoal.dht.replication import records_after_loss, records_for_newcomer
from shoal.dht.routing import RoutingTable
from shoal.dht.storage import Record
from shoal.p2p.identity import PeerID
from shoal.testing.clock import run
from shoal.testing.dht import SimulatedDHT

KEY = b"key"
RECORDS = [(key_id(KEY), Record(KEY))]


@pytest.fixture
def by_distance(many_peers: list[PeerID]) -> list[PeerID]:
    return sorted(many_peers[:10], key=lambda peer: node_id(peer) ^ key_id(KEY))


def table_of(own: PeerID, peers: list[PeerID]) -> RoutingTable:
    table = RoutingTable(node_id(own), 20)
    for peer in peers:
        table.answered(peer, 0.0)
    return table


@pytest.mark.parametrize("newcomer", range(10))
def test_two_holders_give_to_a_newcomer_that_is_near_enough(by_distance: list[PeerID], newcomer: int) -> None:
    givers = [
        place
        for place, own in enumerate(by_distance)
        if place != newcomer
        and list(records_for_newcomer(RECORDS, table_of(own, by_distance), own, by_distance[newcomer], 3))
    ]
    assert givers == ([place for place in range(10) if place != newcomer][:2] if newcomer < 3 else [])


@pytest.mark.parametrize("lost", range(10))
def test_two_holders_give_to_the_successor_of_a_lost_one(by_distance: list[PeerID], lost: int) -> None:
    left = [peer for peer in by_distance if peer != by_distance[lost]]
    gifts = {
        place: [
            peer for peer, _ in records_after_loss(RECORDS, table_of(own, left), own, by_distance[lost], 3)
        ]
        for place, own in enumerate(left)
    }
    expected = [left[2]] if lost < 3 else []
    assert gifts == {place: expected if place < 2 else [] for place in range(9)}


def test_with_fewer_nodes_than_replicas_there_is_no_successor(by_distance: list[PeerID]) -> None:
    own, other, lost = by_distance[:3]
    assert list(records_after_loss(RECORDS, table_of(own, [other]), own, lost, 3)) == []


def test_handing_many_records_over_leaves_others_their_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    """A stranger may fill the storage and come and go: that must not hold up the event loop."""
    examined: list[int] = []

    def examine(records: Iterable[Any], *arguments: Any) -> Any:
        records = list(records)
        examined.append(len(records))
        return records_for_newcomer(records, *arguments)

    monkeypatch.setattr(node_module, "records_for_newcomer", examine)

    async def story() -> None:
        sim = SimulatedDHT(0)
        node = await sim.start(0)
        for number in range(1000):
            assert node._storage.store(b"%d" % number, b"", b"x", sim.now() + 100, sim.now()) is None
        other = await sim.start(1, [sim.address(0)])
        await asyncio.sleep(20)
        assert other.num_records == 1000
        assert sum(examined) >= 1000
        assert max(examined) <= node_module.HAND_OVER_BATCH
        await sim.close()

    run(story)


def test_who_comes_and_goes_leaves_nothing_behind() -> None:
    async def story() -> None:
        sim = SimulatedDHT(0)
        node = await sim.start(0)
        for _ in range(3):
            await sim.start(1, [sim.address(0)])
            await sim.stop(1)
            await asyncio.sleep(5)
        assert not node._newcomers
        assert not node._leavers
        await sim.close()

    run(story)
