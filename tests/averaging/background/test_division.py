"""How a group's members divide the vector, and what they owe to routes that one of them could not find."""

from __future__ import annotations

import pytest
import torch

from shoal.averaging.background.division import Division
from shoal.averaging.group import SCHEMA_HASH_BYTES, GroupInfo, MemberInfo, PeerMode, order_members
from shoal.averaging.partition import Layout
from shoal.compression.base import NoCompression
from shoal.p2p.identity import Identity

PEERS = sorted(Identity.generate(bytes([number]) * 32).peer_id for number in range(4))
LAYOUT = Layout.from_tensors([torch.zeros(1200)], [NoCompression()])
DIVISION = Division(LAYOUT, part_size_bytes=64, min_vector_size=0)


def member(
    number: int, *lost: int, mode: PeerMode = PeerMode.FULL, bandwidth: float | None = None
) -> MemberInfo:
    return MemberInfo(
        PEERS[number].to_bytes(),
        PEERS[0].to_bytes(),
        "swarm.0b",
        b"s" * SCHEMA_HASH_BYTES,
        mode,
        bandwidth,
        (),
        b"",
        100.0,
        100.0,
        bytes(16),
        lost=tuple(PEERS[other].to_bytes() for other in lost),
    )


def owned(*members: MemberInfo) -> list[int]:
    group = GroupInfo(b"g" * 16, "swarm.0b", order_members(PEERS[0], members))
    return [span.count for span in DIVISION.among(group).spans]


def test_members_that_can_reach_each_other_share_alike():
    assert owned(*map(member, range(4))) == [300] * 4


def test_two_that_cannot_reach_each_other_own_nothing():
    assert owned(member(0), member(1, 2), member(2), member(3)) == [600, 0, 0, 600]


def test_a_peer_that_names_many_loses_its_own_share_only():
    assert owned(member(0), member(1, 2, 3), member(2), member(3)) == [400, 0, 400, 400]


def test_a_follower_that_named_its_leader_has_reached_it():
    assert owned(member(0), member(1, 0), member(2)) == [400] * 3


def test_a_client_takes_from_no_owner_that_it_cannot_reach():
    client = member(1, 2, mode=PeerMode.CLIENT)
    assert owned(member(0), client, member(2), member(3)) == [600, 0, 0, 600]


def test_a_leader_without_bandwidth_owns_all_if_nobody_else_may():
    leader = member(0, bandwidth=0.0)
    assert owned(leader, member(1, 2, bandwidth=5.0), member(2, bandwidth=5.0)) == [1200, 0, 0]


@pytest.mark.parametrize("lost", [(), (1,)])
def test_all_members_divide_alike_in_whatever_order_they_heard_of_each_other(lost: tuple[int, ...]):
    members = [member(0), member(1), member(2, *lost), member(3)]
    assert owned(*members) == owned(*reversed(members))
