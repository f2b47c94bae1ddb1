"""Under which keys the peers of a run store their records, so that none grows beyond what a key may hold. Pure.

At level ``n`` a run has ``2 ** n`` keys; a hash of its PeerID says which of them is a peer's. Each peer goes by the
number of peers that it has read. Peers may be of different levels for a moment, so that each reads the neighbouring
levels where anybody can be. A small swarm stores under one key, and reads that one only.
"""

from __future__ import annotations

import hashlib

MAX_LEVEL = 3
"""Eight keys."""
SPLIT_ABOVE = 1000
"""Peers under a key; with more, a level is added. 512 KiB, the limit of a key, hold three times as many records."""
JOIN_BELOW = 250
"""Peers under a key; with fewer, a level is taken away. Far from half of the other limit: levels do not flutter."""
WATCH_ABOVE = 500
"""Peers under a key; with more, some may have gone to the next level, since others have counted more."""


def key_of(prefix: str, level: int, shard: int) -> str:
    """The name of the protected key of one shard."""
    name = f"{prefix}_progress"
    return name if level == 0 else f"{name}.{level}.{shard}"


def shard_of(peer_id: bytes, level: int) -> int:
    """In which shard of a level a peer stores."""
    return int.from_bytes(hashlib.sha256(peer_id).digest()[:2]) & ((1 << level) - 1)


def own_key(prefix: str, peer_id: bytes, level: int) -> str:
    """Where a peer stores its record."""
    return key_of(prefix, level, shard_of(peer_id, level))


def keys_of(prefix: str, level: int) -> list[str]:
    """All keys of a level."""
    return [key_of(prefix, level, shard) for shard in range(2**level)]


def next_level(level: int, num_peers: int) -> int:
    """The level of a peer that has read ``num_peers`` records at all levels together."""
    while level < MAX_LEVEL and num_peers > SPLIT_ABOVE * 2**level:
        level += 1
    while level > 0 and num_peers < JOIN_BELOW * 2**level:
        level -= 1
    return level


def levels_to_read(level: int, num_peers: int | None) -> list[int]:
    """Where other peers can be.

    :param num_peers: how many were read at the last look; None: this is the first one, which finds a swarm of any size
    """
    if num_peers is None:
        return list(range(MAX_LEVEL + 1))
    below = [level - 1] if level > 0 else []
    above = [level + 1] if level < MAX_LEVEL and num_peers > WATCH_ABOVE * 2**level else []
    return [*below, level, *above]
