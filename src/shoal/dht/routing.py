"""The routing table: which peers this node knows to be alive, in k-buckets (Kademlia, sections 2.2 and 2.4).
Pure.

A node enters the table only after it answered a call of ours, at an address that was dialed or at which it
was verified; nodes in client mode never do. The caller of these methods sees to that. Bucket ``i`` holds
nodes whose distance has ``i + 1`` bits, at most ``bucket_size`` of them, least recently seen first. A node that
finds a full bucket waits in its replacement cache until a node of the bucket fails.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

from shoal.dht.ids import ID_BITS, bucket_index, node_id
from shoal.p2p.identity import PeerID


@dataclass(slots=True)
class TableNode:
    """One node of the table."""

    peer: PeerID
    node_id: int
    last_seen: float
    prefix: bytes
    """The first bytes of the id, by which requests say which nodes their sender knows already."""


@dataclass(slots=True)
class _Bucket:
    nodes: dict[PeerID, TableNode] = field(default_factory=dict)  # least recently seen first
    replacements: dict[PeerID, TableNode] = field(default_factory=dict)  # most recently seen last
    refreshed_at: float = float("-inf")
    offered_at: float = float("-inf")
    """When a node was last greeted for which there is no room."""


PREFIX_BYTES = 8


def id_prefix(identifier: int) -> bytes:
    """What a request's list of known nodes holds of an id: enough to tell nodes apart; proves nothing."""
    return (identifier >> (ID_BITS - 8 * PREFIX_BYTES)).to_bytes(PREFIX_BYTES, "big")


class RoutingTable:
    """The k-buckets of one node. Iterates over its peers, nearest buckets first."""

    def __init__(self, own_id: int, bucket_size: int, probe_after: float = 0.0) -> None:
        self.own_id = own_id
        self.bucket_size = bucket_size
        self.probe_after = probe_after
        self._buckets: dict[int, _Bucket] = {}
        self._size = 0

    def __len__(self) -> int:
        return self._size

    def __contains__(self, peer: PeerID) -> bool:
        bucket = self._bucket_of(node_id(peer))
        return bucket is not None and peer in bucket.nodes

    def __iter__(self) -> Iterator[PeerID]:
        for index in sorted(self._buckets):
            yield from self._buckets[index].nodes

    def has_room(self, peer: PeerID) -> bool:
        """Whether the peer would enter the table if it answered."""
        bucket = self._bucket_of(node_id(peer))
        return bucket is None or len(bucket.nodes) < self.bucket_size

    def offer(self, peer: PeerID, now: float) -> bool:
        """Whether a peer that calls, and is not in the table, is worth a greeting: there is room for it, or its bucket
        has been offered nobody for ``probe_after``. Greeted, it may take the place of a node that has died.

        Without that limit, a peer that calls many nodes of a large DHT would be greeted by most of them, again and
        again: the calls would grow with the DHT.
        """
        bucket = self._bucket_of(node_id(peer))
        if bucket is None or self.has_room(peer):
            return True
        if bucket.offered_at + self.probe_after > now:
            return False
        bucket.offered_at = now
        return True

    def answered(self, peer: PeerID, now: float) -> PeerID | None:
        """The peer answered a call: remember it as the most recently seen of its bucket.

        If the bucket is full the peer becomes a replacement, and the least recently seen node of the bucket
        is returned if it was not seen for ``probe_after``: call it, and report :meth:`answered` or
        :meth:`failed`.
        """
        identifier = node_id(peer)
        if identifier == self.own_id:
            return None
        bucket = self._buckets.setdefault(bucket_index(self.own_id, identifier), _Bucket())
        node = bucket.nodes.pop(peer, None)
        if node is not None:
            node.last_seen = now
            bucket.nodes[peer] = node
            return None
        node = TableNode(peer, identifier, now, id_prefix(identifier))
        bucket.replacements.pop(peer, None)
        if len(bucket.nodes) < self.bucket_size:
            bucket.nodes[peer] = node
            self._size += 1
            return None
        bucket.replacements[peer] = node
        if len(bucket.replacements) > self.bucket_size:
            del bucket.replacements[next(iter(bucket.replacements))]
        oldest = next(iter(bucket.nodes.values()))
        return oldest.peer if oldest.last_seen + self.probe_after <= now else None

    def failed(self, peer: PeerID) -> PeerID | None:
        """The peer did not answer, or left: forget it. Returns the replacement that moved up, if there is
        one.
        """
        bucket = self._bucket_of(node_id(peer))
        if bucket is None:
            return None
        bucket.replacements.pop(peer, None)
        if bucket.nodes.pop(peer, None) is None:
            return None
        self._size -= 1
        if not bucket.replacements:
            return None
        promoted, node = bucket.replacements.popitem()
        # It was seen less recently than those who answered since, but the exact order matters to nobody.
        bucket.nodes[promoted] = node
        self._size += 1
        return promoted

    def nearest(self, target: int, count: int) -> list[TableNode]:
        """The nodes nearest to an id, nearest first, at most ``count``."""
        found: list[TableNode] = []
        for group in self._groups_by_distance(target):
            found += sorted(group, key=lambda node: node.node_id ^ target)
            if len(found) >= count:
                return found[:count]
        return found

    def buckets_to_refresh(self, now: float, interval: float) -> list[int]:
        """Buckets into which nobody has looked for ``interval`` seconds, from the nearest that holds a node
        outward.

        Buckets nearer than any known node are left out: looking for one's own id covers them.
        """
        occupied = [index for index, bucket in self._buckets.items() if bucket.nodes]
        if not occupied:
            return []
        return [
            index
            for index in range(min(occupied), ID_BITS)
            if index not in self._buckets or self._buckets[index].refreshed_at + interval <= now
        ]

    def refreshed(self, target: int, now: float) -> None:
        """A lookup of ``target`` was done: its bucket needs no refresh for a while."""
        if target != self.own_id:
            self._buckets.setdefault(bucket_index(self.own_id, target), _Bucket()).refreshed_at = now

    def not_seen_since(self, moment: float) -> list[PeerID]:
        """The nodes that have not answered since then."""
        return [
            node.peer
            for index in sorted(self._buckets)
            for node in self._buckets[index].nodes.values()
            if node.last_seen < moment
        ]

    def _bucket_of(self, identifier: int) -> _Bucket | None:
        if identifier == self.own_id:
            return None
        return self._buckets.get(bucket_index(self.own_id, identifier))

    def _groups_by_distance(self, target: int) -> Iterator[Iterable[TableNode]]:
        """All nodes in groups, such that every node of a group is nearer to the target than all of the next
        group.

        Let ``b`` be the bucket in which the target itself would be: its nodes share the longest prefix with
        the target. The nodes of all nearer buckets differ from the target first at bit ``b``, as this node
        does, and come next together. Then each farther bucket by itself.
        """
        own = target == self.own_id
        middle = -1 if own else bucket_index(self.own_id, target)
        if middle in self._buckets:
            yield self._buckets[middle].nodes.values()
        yield [
            node
            for index, bucket in self._buckets.items()
            if index < middle
            for node in bucket.nodes.values()
        ]
        for index in sorted(index for index in self._buckets if index > middle):
            yield self._buckets[index].nodes.values()
