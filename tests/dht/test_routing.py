from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shoal.dht.ids import ID_BITS, bucket_index, node_id
from shoal.dht.routing import RoutingTable, id_prefix
from shoal.p2p.identity import PeerID

OWN = 1 << 159


@pytest.fixture
def far_peers(many_peers: list[PeerID]) -> list[PeerID]:
    """Peers that share one k-bucket: those in the other half of the ids."""
    return [peer for peer in many_peers if bucket_index(OWN, node_id(peer)) == ID_BITS - 1]


def test_nearest_are_sorted_by_distance(many_peers: list[PeerID]) -> None:
    table = RoutingTable(OWN, 1000)
    for peer in many_peers:
        table.answered(peer, 0.0)
    for target in [OWN, 0, 7 << 150, node_id(many_peers[3]), OWN + 1]:
        expected = sorted(many_peers, key=lambda peer: node_id(peer) ^ target)
        assert [entry.peer for entry in table.nearest(target, 17)] == expected[:17]
        assert [entry.peer for entry in table.nearest(target, 1000)] == expected


@settings(max_examples=50)
@given(st.data())
def test_nearest_is_right_for_any_table(data: st.DataObject) -> None:
    peers = [PeerID.from_public_key(n.to_bytes(32, "big")) for n in data.draw(st.sets(st.integers(0, 500)))]
    own = data.draw(st.integers(0, 2**ID_BITS - 1))
    target = data.draw(st.integers(0, 2**ID_BITS - 1))
    table = RoutingTable(own, 100)
    for peer in peers:
        table.answered(peer, 0.0)
    expected = sorted(peers, key=lambda peer: node_id(peer) ^ target)
    assert [entry.peer for entry in table.nearest(target, 5)] == expected[:5]
    assert sorted(table) == sorted(peers)


def test_the_node_itself_never_enters(many_peers: list[PeerID]) -> None:
    table = RoutingTable(node_id(many_peers[0]), 20)
    assert table.answered(many_peers[0], 0.0) is None
    assert len(table) == 0
    assert many_peers[0] not in table
    assert table.failed(many_peers[0]) is None


def test_a_full_bucket_keeps_its_nodes_and_names_the_one_to_probe(far_peers: list[PeerID]) -> None:
    table = RoutingTable(OWN, 3)
    first, second, third, fourth, fifth = far_peers[:5]
    for moment, peer in enumerate([first, second, third]):
        assert table.answered(peer, float(moment)) is None
    assert table.answered(first, 3.0) is None  # now the second is the least recently seen
    assert table.answered(fourth, 4.0) == second
    assert fourth not in table
    assert table.answered(second, 5.0) is None  # it answered the probe, and stays
    assert table.answered(fifth, 6.0) == third
    assert table.failed(third) == fifth  # the replacement seen last moves up
    assert table.failed(first) == fourth
    assert table.failed(second) is None
    assert sorted(table) == sorted([fourth, fifth])
    assert len(table) == 2


def test_who_was_seen_a_moment_ago_is_not_probed(far_peers: list[PeerID]) -> None:
    table = RoutingTable(OWN, 1, probe_after=15.0)
    table.answered(far_peers[0], 0.0)
    assert table.answered(far_peers[1], 14.0) is None
    assert table.answered(far_peers[1], 15.0) == far_peers[0]


def test_replacements_are_bounded(far_peers: list[PeerID]) -> None:
    table = RoutingTable(OWN, 2)
    for peer in far_peers[:50]:
        table.answered(peer, 0.0)
    promoted = [table.failed(peer) for peer in far_peers[:2]]
    assert promoted == [far_peers[49], far_peers[48]]
    assert table.failed(far_peers[48]) is None


def test_a_replacement_that_failed_does_not_move_up(far_peers: list[PeerID]) -> None:
    table = RoutingTable(OWN, 2)
    for peer in far_peers[:4]:
        table.answered(peer, 0.0)
    assert table.failed(far_peers[3]) is None
    assert table.failed(far_peers[0]) == far_peers[2]


def test_buckets_to_refresh(many_peers: list[PeerID]) -> None:
    table = RoutingTable(OWN, 20)
    assert table.buckets_to_refresh(0.0, 60.0) == []
    table.answered(many_peers[0], 0.0)
    index = bucket_index(OWN, node_id(many_peers[0]))
    assert table.buckets_to_refresh(0.0, 60.0) == list(range(index, ID_BITS))
    table.refreshed(node_id(many_peers[0]), 10.0)
    assert index not in table.buckets_to_refresh(69.0, 60.0)
    assert index in table.buckets_to_refresh(70.0, 60.0)


def test_not_seen_since(many_peers: list[PeerID]) -> None:
    table = RoutingTable(OWN, 20)
    table.answered(many_peers[0], 1.0)
    table.answered(many_peers[1], 2.0)
    assert table.not_seen_since(2.0) == [many_peers[0]]


def test_prefix() -> None:
    assert id_prefix(0x0102030405060708 << 96 | 99) == bytes(range(1, 9))


def test_a_full_bucket_is_offered_one_newcomer_at_a_time(many_peers: list[PeerID]) -> None:
    table = RoutingTable(0, 2, probe_after=15.0)
    first, second, third, fourth = [peer for peer in many_peers if node_id(peer) >> 159][:4]
    for moment, peer in enumerate((first, second)):
        assert table.offer(third, moment)  # there is room
        table.answered(peer, moment)
    assert not table.has_room(third)
    assert table.offer(third, 10.0)
    assert not table.offer(fourth, 24.9)
    assert not table.offer(third, 24.9)
    assert table.offer(fourth, 25.0)
    table.failed(first)
    assert table.has_room(third)
    assert table.offer(third, 26.0)
    near = next(peer for peer in many_peers if not node_id(peer) >> 159)
    assert table.offer(near, 26.0)  # the limit is that of a bucket
