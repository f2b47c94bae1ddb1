"""Group bits: a full grid reaches the exact average, whatever the group ids deal."""

from __future__ import annotations

import random
from collections import defaultdict
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shoal.averaging.group import (
    MAX_GRID_ROUND,
    GroupInfo,
    MemberInfo,
    PeerMode,
    group_key,
    order_members,
)
from shoal.averaging.matchmaking.group_bits import (
    MAX_CATCH_UP,
    GroupBits,
    deal_digits,
)
from shoal.errors import InvalidValueError
from shoal.p2p.identity import Identity, PeerID

PEERS = [Identity.generate(number.to_bytes(32, "big")).peer_id for number in range(81)]


def group(
    peers: list[PeerID], group_id: bytes, rounds: list[int] | None = None, *, bits: str = ""
) -> GroupInfo:
    key = group_key("swarm", bits)
    infos = [
        MemberInfo(
            peer_id=peer.to_bytes(),
            leader=peers[0].to_bytes(),
            key=key,
            schema_hash=bytes(32),
            mode=PeerMode.FULL,
            bandwidth=None,
            addresses=(),
            gather=b"",
            start_time=0.0,
            signed_at=0.0,
            nonce=bytes(16),
            grid_round=rounds[index] if rounds else 0,
        )
        for index, peer in enumerate(peers)
    ]
    return GroupInfo(group_id, key, order_members(peers[0], infos))


@pytest.mark.parametrize(
    ("base", "dimensions"), [(2, 1), (2, 3), (2, 5), (3, 2), (3, 4), (4, 2), (4, 3), (5, 2), (8, 2)]
)
@pytest.mark.parametrize("seed", range(5))
def test_a_full_grid_holds_the_exact_average_after_as_many_rounds_as_it_has_dimensions(
    base, dimensions, seed
):
    rng = random.Random(seed)
    width = (base - 1).bit_length()
    count = base**dimensions
    keys = [
        "".join(format(number // base**level % base, f"0{width}b") for level in range(dimensions - 1))
        for number in range(count)
    ]
    rng.shuffle(keys)
    bits = {peer: GroupBits(peer, key) for peer, key in zip(PEERS[:count], keys, strict=True)}
    values = {peer: Fraction(rng.randrange(1000)) for peer in bits}
    mean = sum(values.values()) / count
    for number in range(dimensions):
        assert (len(set(values.values())) == 1) == (number == dimensions)
        buckets = defaultdict(list)
        for peer in bits:
            buckets[bits[peer].bits].append(peer)
        for key, members in buckets.items():
            assert len(members) == base
            rng.shuffle(members)
            formed = group(members, rng.randbytes(16), bits=key)
            average = sum(values[peer] for peer in members) / base
            for peer in members:
                values[peer] = average
                bits[peer].round_committed(formed, base)
    assert set(values.values()) == {mean}


@given(st.integers(1, 70), st.data(), st.binary(min_size=16, max_size=16))
def test_every_member_is_dealt_another_digit(base, data, group_id):
    size = data.draw(st.integers(1, base))
    digits = deal_digits(group_id, size, base)
    assert len(set(digits)) == len(digits) == size
    assert all(0 <= digit < base for digit in digits)


def test_the_digits_of_small_groups_reach_every_key():
    dealt = {deal_digits(random.Random(seed).randbytes(16), 2, 8)[0] for seed in range(200)}
    assert dealt == set(range(8))


def test_without_a_target_size_the_size_of_the_group_counts():
    members = PEERS[:5]
    bits = [GroupBits(peer, "000") for peer in members]
    for one in bits:
        one.round_committed(group(members, bytes(16), bits="000"), None)
    assert {one.bits for one in bits} == {format(digit, "03b") for digit in range(5)}


def test_a_peer_that_comes_late_counts_the_rounds_of_its_group_from_then_on():
    first, second = PEERS[:2]
    bits = GroupBits(first, "0")
    bits.round_committed(group([first, second], bytes(16), [0, 7], bits="0"), 2)
    assert bits.grid_round == 8
    bits.set("1")
    assert bits.grid_round == 0


def test_a_group_larger_than_ones_own_target_deals_every_member_another_digit():
    members = PEERS[:5]
    for seed in range(20):
        formed = group(members, random.Random(seed).randbytes(16), bits="000")
        bits = [GroupBits(peer, "000") for peer in members]
        for one, target in zip(bits, (2, 1, 5, None, 3), strict=True):
            one.round_committed(formed, target)
        assert len({one.bits for one in bits}) == 5


def test_bits_that_are_given_while_a_round_runs_are_those_of_the_next_group():
    formed = group(PEERS[:2], bytes(16), bits="00")
    bits = GroupBits(PEERS[0], "00")
    bits.set("10")
    bits.round_committed(formed, 2)
    assert (bits.bits, bits.grid_round) == ("10", 0)


def test_a_member_that_lies_about_its_rounds_does_not_take_the_others_to_the_end_of_the_numbers():
    bits = GroupBits(PEERS[0], "0")
    for number in range(1, 4):
        formed = group(PEERS[:2], bytes(16), [bits.grid_round, MAX_GRID_ROUND], bits=bits.bits)
        bits.round_committed(formed, 2)
        assert bits.grid_round == number * (MAX_CATCH_UP + 1)
    bits.round_committed(group(PEERS[:2], bytes(16), [MAX_GRID_ROUND] * 2, bits=bits.bits), 2)
    assert bits.grid_round == MAX_GRID_ROUND  # what a peer may say of itself


@pytest.mark.parametrize("bits", ["2", "0 1", "x", "0" * 65])
def test_bits_are_bits(bits):
    with pytest.raises(InvalidValueError, match="group_bits must be at most 64"):
        GroupBits(PEERS[0], bits)
