"""Noise: the public test vectors, what a handshake refuses, and the ciphers' counters and keys."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

from shoal.errors import InvalidStateError, ProtocolViolation
from shoal.p2p.protocol.noise import (
    AESGCM_SUITE,
    CHACHAPOLY_SUITE,
    MAX_NONCE,
    CipherState,
    CipherSuite,
    HandshakeState,
)
from shoal.p2p.protocol.violations import TamperedMessage

VECTORS = json.loads((Path(__file__).parent / "vectors" / "xx_vectors.json").read_text())["vectors"]
SUITES = {f"Noise_XX_25519_{suite.name}_SHA256": suite for suite in (AESGCM_SUITE, CHACHAPOLY_SUITE)}

# Points of order 1, 2, 4 and 8 (RFC 7748, section 7), and some of their other encodings.
LOW_ORDER = [
    "0000000000000000000000000000000000000000000000000000000000000000",
    "0100000000000000000000000000000000000000000000000000000000000000",
    "e0eb7a7c3b41b8ae1656e3faf19fc46ada098deb9c32b1fd866205165f49b800",
    "5f9c95bca3508c24b1d0b1559c83ef5b04445cc4581c8e86d8224eddd09f1157",
    "ecffffffffffffffffffffffffffffffffffffffffffffffffffffffffffff7f",
    "edffffffffffffffffffffffffffffffffffffffffffffffffffffffffffff7f",
    "eeffffffffffffffffffffffffffffffffffffffffffffffffffffffffffff7f",
]


def private_key(text: str) -> X25519PrivateKey:
    return X25519PrivateKey.from_private_bytes(bytes.fromhex(text))


def pair(prologues: tuple[bytes, bytes] = (b"", b"")) -> tuple[HandshakeState, HandshakeState]:
    sides = [
        HandshakeState(
            initiator=initiator,
            prologue=prologue,
            static=X25519PrivateKey.from_private_bytes(bytes([1, initiator]) * 16),
            ephemeral=X25519PrivateKey.from_private_bytes(bytes([2, initiator]) * 16),
        )
        for initiator, prologue in zip((True, False), prologues, strict=True)
    ]
    return sides[0], sides[1]


def empty(_hash: bytes) -> bytes:
    return b""


def test_both_ciphers_have_vectors() -> None:
    assert {vector["protocol_name"] for vector in VECTORS} == set(SUITES)


@pytest.mark.parametrize("vector", VECTORS, ids=lambda vector: vector["protocol_name"])
def test_public_vectors(vector: dict[str, Any]) -> None:
    suite = SUITES[vector["protocol_name"]]
    initiator, responder = (
        HandshakeState(
            initiator=side == "init",
            prologue=bytes.fromhex(vector[f"{side}_prologue"]),
            static=private_key(vector[f"{side}_static"]),
            ephemeral=private_key(vector[f"{side}_ephemeral"]),
            suite=suite,
        )
        for side in ("init", "resp")
    )
    messages = [
        (bytes.fromhex(message["payload"]), bytes.fromhex(message["ciphertext"]))
        for message in vector["messages"]
    ]
    writer, reader = initiator, responder
    for payload, ciphertext in messages[:3]:
        assert writer.write_message(lambda _hash, payload=payload: payload) == ciphertext
        assert reader.read_message(ciphertext)[0] == payload
        writer, reader = reader, writer
    for side in (initiator, responder):
        assert side.finished
        assert side.handshake_hash.hex() == vector["handshake_hash"]
    assert initiator.remote_static_public == responder.static_public
    assert responder.remote_static_public == initiator.static_public

    initiator_ciphers, responder_ciphers = initiator.split(), responder.split()
    assert len(messages) > 3
    for number, (payload, ciphertext) in enumerate(messages[3:]):
        to_initiator = number % 2 == 0
        sender = responder_ciphers[0] if to_initiator else initiator_ciphers[0]
        receiver = initiator_ciphers[1] if to_initiator else responder_ciphers[1]
        assert sender.encrypt(payload) == ciphertext
        assert receiver.decrypt(ciphertext) == payload


def test_both_sides_see_the_same_hash_with_each_payload() -> None:
    initiator, responder = pair()
    seen: list[bytes] = []

    def note(handshake_hash: bytes) -> bytes:
        seen.append(handshake_hash)
        return b"payload"

    writer, reader = initiator, responder
    for _ in range(3):
        payload, handshake_hash = reader.read_message(writer.write_message(note))
        assert (payload, handshake_hash) == (b"payload", seen[-1])
        writer, reader = reader, writer
    assert len(set(seen)) == 3


@pytest.mark.parametrize("spoiled", [1, 2, 3])
def test_every_byte_of_a_handshake_counts(spoiled: int) -> None:
    sizes = {1: 32 + 3, 2: 32 + 48 + 3 + 16, 3: 48 + 3 + 16}

    def run_handshake(changed_byte: int) -> None:
        sides = list(pair())
        for number in (1, 2, 3):
            writer, reader = sides
            message = bytearray(writer.write_message(lambda _hash: b"abc"))
            assert len(message) == sizes[number]
            if number == spoiled:
                message[changed_byte] ^= 1
            reader.read_message(bytes(message))
            sides.reverse()

    for position in range(sizes[spoiled]):
        with pytest.raises(TamperedMessage):
            run_handshake(position)


def test_another_prologue_is_another_handshake() -> None:
    initiator, responder = pair((b"ours", b"theirs"))
    responder.read_message(initiator.write_message(empty))
    with pytest.raises(TamperedMessage):
        initiator.read_message(responder.write_message(empty))


@pytest.mark.parametrize("number", [1, 2, 3])
def test_a_handshake_message_that_is_cut_short(number: int) -> None:
    full = {1: 32, 2: 32 + 48 + 16, 3: 48 + 16}[number]
    for size in range(full):
        sides = list(pair())
        for _ in range(1, number):
            sides[1].read_message(sides[0].write_message(empty))
            sides.reverse()
        with pytest.raises(ProtocolViolation):
            sides[1].read_message(sides[0].write_message(empty)[:size])


@pytest.mark.parametrize("point", LOW_ORDER)
def test_keys_of_low_order_are_refused(point: str) -> None:
    initiator, responder = pair()
    message = initiator.write_message(empty)
    responder.read_message(bytes.fromhex(point) + message[32:])
    with pytest.raises(ProtocolViolation, match="low order"):
        responder.write_message(empty)
    with pytest.raises(ProtocolViolation, match="low order"):
        initiator.read_message(bytes.fromhex(point) + bytes(48 + 16))


@pytest.fixture(params=[AESGCM_SUITE, CHACHAPOLY_SUITE], ids=lambda suite: suite.name)
def suite(request: pytest.FixtureRequest) -> CipherSuite:
    return request.param  # type: ignore[no-any-return]


KEY = bytes(range(32))


def test_both_ways_to_encrypt_are_one(suite: CipherSuite) -> None:
    first, second, receiver = (CipherState(suite, KEY) for _ in range(3))
    for size in (0, 1, 100, 65_519):
        plain = bytes(size)
        wire = bytearray(size + 16)
        first.encrypt_into(memoryview(plain), memoryview(wire))
        assert second.encrypt(plain) == wire
        opened = bytearray(b"?" * size)
        receiver.decrypt_into(memoryview(wire), memoryview(opened))
        assert opened == plain


def test_no_nonce_is_used_twice(suite: CipherSuite) -> None:
    sender = CipherState(suite, KEY)
    assert len({sender.encrypt(b"same") for _ in range(1000)}) == 1000
    assert len({suite.nonce(counter) for counter in (0, 1, 255, 256, 2**32, MAX_NONCE)}) == 6
    assert all(len(suite.nonce(counter)) == 12 for counter in (0, MAX_NONCE))


def test_a_message_is_good_once_and_in_its_place(suite: CipherSuite) -> None:
    sender = CipherState(suite, KEY)
    wire = [sender.encrypt(b"message") for _ in range(3)]
    for order in ([0, 0], [1], [0, 2], [2]):
        receiver = CipherState(suite, KEY)
        for number in order[:-1]:
            receiver.decrypt(wire[number])
        with pytest.raises(TamperedMessage):
            receiver.decrypt(wire[order[-1]])


def test_tampering_is_found_either_way(suite: CipherSuite) -> None:
    wire = CipherState(suite, KEY).encrypt(b"message")
    for position in range(len(wire)):
        changed = bytearray(wire)
        changed[position] ^= 0x80
        with pytest.raises(TamperedMessage, match="not authentic"):
            CipherState(suite, KEY).decrypt(bytes(changed))
        with pytest.raises(TamperedMessage):
            CipherState(suite, KEY).decrypt_into(memoryview(changed), memoryview(bytearray(7)))


def test_counters_end_before_the_nonce_of_rekeying(suite: CipherSuite) -> None:
    sender = CipherState(suite, KEY, nonce=MAX_NONCE)
    receiver = CipherState(suite, KEY, nonce=MAX_NONCE)
    assert receiver.decrypt(sender.encrypt(b"last")) == b"last"
    for _ in range(2):
        with pytest.raises(InvalidStateError, match="as many messages"):
            sender.encrypt(b"one more")
        with pytest.raises(InvalidStateError):
            sender.encrypt_into(memoryview(b""), memoryview(bytearray(16)))
        with pytest.raises(ProtocolViolation, match="more messages"):
            receiver.decrypt(bytes(20))
        with pytest.raises(ProtocolViolation):
            receiver.decrypt_into(memoryview(bytes(20)), memoryview(bytearray(4)))


def test_rekeying_as_specified(suite: CipherSuite) -> None:
    cipher = CipherState(suite, KEY, nonce=5)
    cipher.rekey()
    new_key = suite.new(KEY).encrypt(suite.nonce(2**64 - 1), bytes(32), None)[:32]
    assert cipher.encrypt(b"message") == suite.new(new_key).encrypt(suite.nonce(5), b"message", None)


def test_both_sides_rekey_at_the_same_message(suite: CipherSuite) -> None:
    sender, receiver = (CipherState(suite, KEY, rekey_bytes=1000) for _ in range(2))
    without = CipherState(suite, KEY)
    differing = []
    for number in range(30):
        plain = bytes([number]) * 84  # 100 bytes of ciphertext
        wire = bytearray(100)
        if number % 2:
            wire[:] = sender.encrypt(plain)
        else:
            sender.encrypt_into(memoryview(plain), memoryview(wire))
        if without.encrypt(plain) != wire:
            differing.append(number)
        if number % 3:
            assert receiver.decrypt(bytes(wire)) == plain
        else:
            opened = bytearray(84)
            receiver.decrypt_into(memoryview(wire), memoryview(opened))
            assert opened == plain
    assert differing == list(range(10, 30))
