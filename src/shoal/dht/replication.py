"""Which records to hand over when a node comes or goes, so that the nearest nodes keep them (Kademlia, section 2.5).
Pure.

Each decision is taken by all holders alike, and the two nearest of them act, so that the record survives if one of the
two is gone or never had it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from shoal.dht.ids import node_id
from shoal.dht.routing import RoutingTable
from shoal.dht.storage import Record
from shoal.p2p.identity import PeerID

HANDING_OVER = 2


def records_for_newcomer(
    records: Iterable[tuple[int, Record]],
    table: RoutingTable,
    own: PeerID,
    newcomer: PeerID,
    num_replicas: int,
) -> Iterator[Record]:
    """The records that this node should give to a node that has just entered its table."""
    for identifier, record in records:
        nearest = _nearest(table, own, identifier, num_replicas + 1)
        if newcomer in nearest[:num_replicas]:
            nearest.remove(newcomer)
            if own in nearest[:HANDING_OVER]:
                yield record


def records_after_loss(
    records: Iterable[tuple[int, Record]], table: RoutingTable, own: PeerID, lost: PeerID, num_replicas: int
) -> Iterator[tuple[PeerID, Record]]:
    """The records of which a node that has left the table held one, and the node that takes its place for each."""
    for identifier, record in records:
        nearest = _nearest(table, own, identifier, num_replicas)
        if len(nearest) < num_replicas or own not in nearest[:HANDING_OVER]:
            continue
        successor = nearest[-1]
        if successor != own and node_id(lost) ^ identifier < node_id(successor) ^ identifier:
            yield successor, record


def _nearest(table: RoutingTable, own: PeerID, identifier: int, count: int) -> list[PeerID]:
    """The nodes nearest to a key, this one included."""
    peers = [own, *(node.peer for node in table.nearest(identifier, count))]
    return sorted(peers, key=lambda peer: node_id(peer) ^ identifier)[:count]
