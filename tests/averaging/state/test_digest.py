"""The digest of a state covers every byte of it, the order of its chunks, and what it consists of."""

from __future__ import annotations

from itertools import permutations

from shoal.averaging.state.digest import DIGEST_BYTES, KEY_BYTES, StateDigest

KEY = bytes(range(KEY_BYTES))
CHUNKS = (b"abc", bytes(100), b"", bytes(range(256)))


def digest(chunks: tuple[bytes, ...] = CHUNKS, *, key: bytes = KEY, fingerprint: bytes = b"shapes") -> bytes:
    one = StateDigest(key, fingerprint)
    for chunk in chunks:
        one.update(chunk)
    return one.value()


def test_the_same_state_has_the_same_digest_wherever_it_lies():
    assert digest() == digest(tuple(memoryview(bytearray(chunk)) for chunk in CHUNKS))
    assert len(digest()) == DIGEST_BYTES


def test_it_changes_with_every_bit():
    seen = {digest()}
    for number, chunk in enumerate(CHUNKS):
        for bit in range(8 * len(chunk)):
            changed = bytearray(chunk)
            changed[bit // 8] ^= 1 << bit % 8
            seen.add(digest((*CHUNKS[:number], bytes(changed), *CHUNKS[number + 1 :])))
    assert len(seen) == 1 + 8 * sum(map(len, CHUNKS))


def test_it_changes_with_order_cut_key_and_fingerprint():
    different = {digest(order) for order in permutations(CHUNKS)}
    different |= {digest(CHUNKS[:-1]), digest((*CHUNKS, b"")), digest((b"".join(CHUNKS),))}
    different |= {digest(key=bytes(KEY_BYTES)), digest(fingerprint=b"other shapes")}
    assert len(different) == 24 + 5
