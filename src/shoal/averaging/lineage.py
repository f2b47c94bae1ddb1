"""With whom a peer has mixed lately, in 130 bytes: what it declares so that its next group brings it something new.
Pure.

Two things, both the same at all members of a round once it has committed, and computed by each for itself:

- *groups*: level 0 is the last group; level n + 1 holds the level-n groups of all its members. Of each level only the
  few smallest ids are kept (a bottom-k sketch), which is enough to see that two peers have mixed with the same others.
- *sketch*: a small vector that starts at random and is averaged wherever the tensors are. Peers whose sketches are
  near each other hold nearly the same average; a group whose sketches have the mean of all will hold the mean.

Both come from other peers and cannot be proved: a peer that lies worsens the mixing of its groups, and nothing else.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from shoal.utils.structs import CompactStruct

LEVELS = 4
IDS_PER_LEVEL = 4
ID_BYTES = 4
DIMENSIONS = 32
INITIAL_SCALE = 32
"""A sketch starts with numbers below 128 times this: 16 bits hold them, and differences of a thousandth still show."""
NOISE_DIVISOR = 8
"""What a round adds to a sketch is below 128 / this, 1/256 of what it starts with: training goes on between rounds,
so what was mixed long ago must not count for ever."""
_SKETCH_TYPE = np.dtype("<i2")

IntArray = npt.NDArray[np.int64]


class Lineage(CompactStruct, frozen=True):
    """``groups``: sorted ids of each level, the last group first; ``sketch``: little-endian 16-bit integers.

    Both are empty before a peer's first round.
    """

    groups: tuple[bytes, ...] = ()
    sketch: bytes = b""


NO_LINEAGE = Lineage()


def lineage_problem(lineage: Lineage) -> str | None:
    """What is wrong with a lineage that another peer declared, if anything."""
    if len(lineage.groups) > LEVELS:
        return f"lineage of {len(lineage.groups)} levels; limit {LEVELS}"
    for ids in lineage.groups:
        if not 0 < len(ids) <= IDS_PER_LEVEL * ID_BYTES or len(ids) % ID_BYTES:
            return f"lineage with {len(ids)} bytes of group ids"
    if len(lineage.sketch) != (DIMENSIONS * _SKETCH_TYPE.itemsize if lineage.groups else 0):
        return f"lineage with a sketch of {len(lineage.sketch)} bytes"
    return None


def after_round(group_id: bytes, members: Sequence[tuple[bytes, Lineage]]) -> Lineage:
    """The lineage that all members (peer id and lineage, in the agreed order) of a committed round have then."""
    levels = [group_id[:ID_BYTES]]
    for level in range(LEVELS - 1):
        ids = {one for _, lineage in members for one in _ids(lineage, level)}
        if ids:
            levels.append(b"".join(sorted(ids)[:IDS_PER_LEVEL]))
    vectors = [sketch_of(lineage) for _, lineage in members if lineage.groups]
    if not vectors:
        vectors = [INITIAL_SCALE * _draw(peer_id) for peer_id, _ in members]
    # In integers, so that every member gets the same bytes.
    mean = np.sum(vectors, axis=0) // len(vectors)
    mixed = mean + _draw(group_id) // (NOISE_DIVISOR * math.isqrt(len(members)))
    limits = np.iinfo(_SKETCH_TYPE)
    sketch = np.clip(mixed, limits.min, limits.max).astype(_SKETCH_TYPE).tobytes()
    return Lineage(tuple(levels), sketch)


def sketch_of(lineage: Lineage) -> IntArray:
    """The sketch of a peer that has been through a round, as integers."""
    return np.frombuffer(lineage.sketch, dtype=_SKETCH_TYPE).astype(np.int64)


def _ids(lineage: Lineage, level: int) -> list[bytes]:
    if level >= len(lineage.groups):
        return []
    ids = lineage.groups[level]
    return [ids[start : start + ID_BYTES] for start in range(0, len(ids), ID_BYTES)]


def _draw(seed: bytes) -> IntArray:
    """Numbers from -128 to 127 that depend on ``seed`` alone."""
    return np.frombuffer(hashlib.shake_128(seed).digest(DIMENSIONS), dtype=np.int8).astype(np.int64)
