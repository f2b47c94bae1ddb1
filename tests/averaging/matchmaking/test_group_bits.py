"""Group bits: a full grid reaches the exact average, whatever the group ids deal."""

from __future__ import annotations

import random
from collections import Counter, defaultdict
from dataclasses import replace
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shoal.averaging.group import (
    MAX_GRID_ROUND,
    SCHEMA_HASH_BYTES,
    GroupInfo,
    MemberInfo,
    PeerMode,
    group_key,
    order_members,
)
from shoal.averaging.matchmaking.group_bits import (
    LONELY_BELOW,
    MAX_CATCH_UP,
    MAX_DEPTH,
    SPLIT_ABOVE,
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
            schema_hash=bytes(SCHEMA_HASH_BYTES),
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


def test_without_bits_a_small_swarm_stays_under_one_key():
    bits = GroupBits(PEERS[0])
    bits.round_committed(group(PEERS[:2], bytes(16)), 2)
    assert bits.bits == ""
    assert not bits.are_given


@pytest.mark.parametrize("bits", ["2", "0 1", "x", "0" * 65])
def test_bits_are_bits(bits):
    with pytest.raises(InvalidValueError, match="group_bits must be at most 64"):
        GroupBits(PEERS[0], bits)


# ---- where no bits are given


def settled(count: int, start: list[int], rounds: int = 20) -> tuple[list[int], int]:
    """The depths of ``count`` peers that begin at ``start`` depths, and how many were alone in the last round.

    Each sees who is under its key, and counts the neighbouring depths, as :class:`.census.Census` does.
    """
    rng = random.Random(count)
    peers = [Identity.generate(number.to_bytes(32, "little")).peer_id for number in range(count)]
    bits = [GroupBits(peer) for peer in peers]
    for one, depth in zip(bits, start, strict=True):
        one.depth = depth
    lonely = 0
    for _ in range(rounds):
        populations = Counter(one.bits for one in bits)
        lonely = sum(populations[one.bits] == 1 for one in bits)
        for one in bits:
            own = populations[one.bits]
            depths = one.depths_to_count(own)
            others = {depth: populations[one.bits_at(depth)] - (depth == one.depth) for depth in depths}
            one.counted(own, others)
        order = rng.sample(range(count), count)
        for first in range(0, count - 1, 2):
            pair = [order[first], order[first + 1]]
            formed = group([peers[number] for number in pair], rng.randbytes(16))
            for number in pair:
                bits[number].round_committed(formed, 2)
    return [one.depth for one in bits], lonely


@pytest.mark.parametrize(("count", "depth"), [(40, 0), (128, 0), (300, 2), (1000, 3)])
@pytest.mark.parametrize("start", ["together", "scattered", "deep"])
def test_all_peers_come_to_one_depth_that_holds_neither_too_many_nor_too_few(count, depth, start):
    rng = random.Random(start)
    begin = {
        "together": [0] * count,
        "scattered": [rng.randrange(MAX_DEPTH + 1) for _ in range(count)],
        "deep": [MAX_DEPTH] * count,
    }[start]
    depths, lonely = settled(count, begin)
    assert len(set(depths)) == 1, Counter(depths)
    assert abs(depths[0] - depth) <= 1
    assert LONELY_BELOW < count / 2 ** depths[0] <= SPLIT_ABOVE
    assert lonely == 0


def test_a_few_that_were_left_behind_follow_the_others():
    depths, _ = settled(400, [2] * 390 + [0] * 5 + [5] * 5)
    assert set(depths) == {2}


def test_who_finds_too_few_looks_where_all_meet_who_do_and_then_at_home_again():
    bits = GroupBits(PEERS[0])
    assert not bits.found_too_few(1)
    bits.depth = 3
    assert bits.bits == bits.bits_at(3)
    assert bits.found_too_few(60)
    assert bits.bits == ""
    assert bits.found_too_few(1)
    assert bits.bits == bits.bits_at(3)
    assert bits.found_too_few(1)  # alone at home: there are fewer peers than this depth is for
    assert bits.depth == 2
    bits.search_ended()
    assert bits.bits == bits.bits_at(2)


def test_who_was_given_the_bits_that_others_have_by_their_number_is_under_another_key():
    bits = GroupBits(PEERS[0])
    bits.depth = 3
    given = GroupBits(PEERS[1], bits.bits)
    assert given.bits == bits.bits
    assert (
        given.key("swarm") == group_key("swarm", given.bits) != bits.key("swarm") == bits.key_at("swarm", 3)
    )
    bits.found_too_few(60)
    given.set("")
    assert bits.key("swarm") == given.key("swarm") == group_key("swarm")


def test_bits_that_are_given_while_a_round_of_all_runs_are_not_taken_for_those_of_its_key():
    bits = GroupBits(PEERS[0])
    bits.depth = 2
    begun = replace(group(PEERS[:2], bytes(16)), key=bits.key("swarm"))
    bits.set(bits.bits)
    before = bits.bits
    bits.round_committed(begun, 2)
    assert (bits.bits, bits.grid_round) == (before, 0)


def test_given_bits_do_not_follow_the_number_of_peers():
    bits = GroupBits(PEERS[0], "01")
    bits.counted(1000, {1: 1000})
    assert not bits.explored({5: 1000})
    assert not bits.found_too_few(1)
    assert bits.bits == "01"
