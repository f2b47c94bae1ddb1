from __future__ import annotations

import hashlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shoal.dht.ids import ID_BITS, bucket_index, id_from_bytes, id_in_bucket, id_to_bytes, key_id, node_id
from shoal.errors import InvalidValueError
from shoal.p2p.identity import Identity

ids = st.integers(0, 2**ID_BITS - 1)


def test_ids_are_the_first_160_bits_of_sha256() -> None:
    peer = Identity.generate(b"\1" * 32).peer_id
    assert id_to_bytes(node_id(peer)) == hashlib.sha256(peer.to_bytes()).digest()[:20]
    assert id_to_bytes(key_id(b"key")) == hashlib.sha256(b"key").digest()[:20]


@given(ids)
def test_bytes_of_an_id(identifier: int) -> None:
    assert id_from_bytes(id_to_bytes(identifier)) == identifier


@pytest.mark.parametrize("length", [0, 19, 21])
def test_an_id_has_20_bytes(length: int) -> None:
    with pytest.raises(InvalidValueError, match=f"an id must be 20 bytes, got {length}"):
        id_from_bytes(bytes(length))


@given(ids, st.integers(0, ID_BITS - 1), ids)
def test_ids_made_for_a_bucket_fall_into_it(own: int, index: int, entropy: int) -> None:
    assert bucket_index(own, id_in_bucket(own, index, entropy)) == index


def test_no_bucket_for_oneself() -> None:
    with pytest.raises(InvalidValueError):
        bucket_index(5, 5)
