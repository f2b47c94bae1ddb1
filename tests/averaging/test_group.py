"""Members' signed infos and what a group must satisfy."""

from __future__ import annotations

import msgspec
import pytest

from shoal.averaging.group import (
    MAX_GATHER_BYTES,
    MAX_MEMBER_AGE,
    MEMBER_DOMAIN,
    SCHEMA_HASH_BYTES,
    MemberInfo,
    PeerMode,
    SignedMemberInfo,
    automatic_key,
    bits_of_key,
    group_key,
    sign_member,
    terms_in,
    verify_group,
    verify_member,
)
from shoal.averaging.matchmaking.messages import GroupMember
from shoal.errors import InvalidValueError, ProtocolViolation
from shoal.p2p.identity import Identity

NOW = 5000.0
LEADER, FIRST, SECOND, STRANGER = (Identity.generate(bytes([number]) * 32) for number in range(4))
GROUP_ID = b"g" * 16


def info(identity: Identity, **changes: object) -> MemberInfo:
    values = {
        "peer_id": identity.peer_id.to_bytes(),
        "leader": LEADER.peer_id.to_bytes(),
        "key": "swarm.0b",
        "schema_hash": b"s" * SCHEMA_HASH_BYTES,
        "mode": PeerMode.FULL,
        "bandwidth": 1.5,
        "addresses": ("/ip4/10.0.0.1/tcp/4000",),
        "gather": b"data",
        "start_time": NOW + 5,
        "signed_at": NOW,
        "nonce": bytes(16),
    }
    return MemberInfo(**{**values, **changes})


def signed(identity: Identity, **changes: object) -> SignedMemberInfo:
    return sign_member(identity, info(identity, **changes))


def begin(*members: SignedMemberInfo, own: SignedMemberInfo | None = None, group_id: bytes = GROUP_ID):
    own = members[1] if own is None else own
    return verify_group(group_id, members, leader=LEADER.peer_id, own=own, now=NOW)


def test_a_member_travels_without_what_its_receiver_knows():
    own, other = signed(FIRST), signed(SECOND)
    terms = terms_in(own)
    message = GroupMember.without(terms, other)
    assert len(message.member.info) == len(other.info) - len(terms)
    assert message.whole(terms) == other
    elsewhere = terms_in(signed(FIRST, key="elsewhere"))
    assert GroupMember.without(elsewhere, other) == GroupMember(other)  # other terms: nothing to leave out
    assert GroupMember(other).whole(elsewhere) == other


@pytest.mark.parametrize("cut", [-1, 1 << 40, 3])
def test_a_cut_at_a_wrong_place_is_no_signed_member(cut: int):
    own, other = signed(FIRST), signed(SECOND)
    message = msgspec.structs.replace(GroupMember.without(terms_in(own), other), cut=cut)
    with pytest.raises(ProtocolViolation):
        verify_member(message.whole(terms_in(own)), now=NOW)


def test_group_keys():
    assert group_key("swarm") == "swarm.0b"
    assert group_key("swarm", "0110") == "swarm.0b0110"
    with pytest.raises(InvalidValueError, match=r"bits must be .*, got '012'"):
        group_key("swarm", "012")
    with pytest.raises(InvalidValueError, match="prefix must be 1 to 256 characters, got ''"):
        group_key("")


def test_automatic_bits_have_keys_of_their_own_and_without_bits_there_is_one():
    assert automatic_key("swarm", "") == group_key("swarm")
    assert automatic_key("swarm", "0110") != group_key("swarm", "0110")


PREFIXES = ["Qwen2.5-0.5B", "a", "a.0b", "a.0b1", "a.0b1.0b", "a.auto", "a.auto1", "a.0bx", ".", ".0b"]


def test_prefixes_with_dots_have_keys_of_their_own():
    keys = [group_key(prefix, bits) for prefix in PREFIXES for bits in ("", "0", "1", "01")]
    keys += [automatic_key(prefix, bits) for prefix in PREFIXES for bits in ("0", "1", "01")]
    assert len(set(keys)) == len(keys)


@pytest.mark.parametrize("prefix", PREFIXES)
def test_the_bits_of_a_key_come_back_whatever_the_prefix(prefix):
    assert [bits_of_key(group_key(prefix, bits)) for bits in ("", "0", "01")] == ["", "0", "01"]
    assert bits_of_key(automatic_key(prefix, "01")) == ""
    assert bits_of_key(group_key("swarm", "0110")) == "0110"
    assert bits_of_key(automatic_key("swarm", "0110")) == bits_of_key(group_key("swarm")) == ""
    with pytest.raises(InvalidValueError, match="prefix must be 1 to 256 characters, got ''"):
        automatic_key("", "0")


def test_an_info_survives_its_way():
    assert verify_member(signed(FIRST), now=NOW) == info(FIRST)


def test_members_agree_on_the_order_whatever_the_leader_sends_first():
    members = [signed(LEADER), signed(FIRST), signed(SECOND)]
    group = begin(*members)
    assert group == begin(members[2], members[0], members[1], own=members[1])
    assert group.leader == LEADER.peer_id
    assert group.peer_ids[0] == LEADER.peer_id
    assert group.peer_ids[1:] == tuple(sorted([FIRST.peer_id, SECOND.peer_id]))
    assert len(group) == 3
    assert group.key == "swarm.0b"


def test_a_forged_or_changed_info_is_noticed():
    genuine = signed(FIRST)
    changed = msgspec.msgpack.encode(info(FIRST, gather=b"more"))
    other_domain = SignedMemberInfo(genuine.info, FIRST.sign(b"something else", genuine.info))
    by_stranger = SignedMemberInfo(genuine.info, STRANGER.sign(MEMBER_DOMAIN, genuine.info))
    for forged in (SignedMemberInfo(changed, genuine.signature), other_domain, by_stranger):
        with pytest.raises(ProtocolViolation, match="wrong signature"):
            verify_member(forged, now=NOW)


@pytest.mark.parametrize("age", [MAX_MEMBER_AGE + 1, -7200.0])
def test_an_info_must_be_fresh(age):
    with pytest.raises(ProtocolViolation, match="not fresh"):
        verify_member(signed(FIRST, signed_at=NOW - age), now=NOW)


@pytest.mark.parametrize(
    "changes",
    [
        {"schema_hash": b"short"},
        {"nonce": b"short"},
        {"bandwidth": -1.0},
        {"bandwidth": float("nan")},
        {"start_time": float("inf")},
        {"weight": -1.0},
        {"weight": float("nan")},
        {"gather": bytes(MAX_GATHER_BYTES + 1)},
        {"addresses": ("a",) * 33},
        {"addresses": ("a" * 301,)},
        {"key": "k" * 401},
    ],
)
def test_limits_hold_for_oneself_and_for_others(changes):
    with pytest.raises(InvalidValueError):
        signed(FIRST, **changes)
    raw = msgspec.msgpack.encode(info(FIRST, **changes))
    with pytest.raises(ProtocolViolation):
        verify_member(SignedMemberInfo(raw, FIRST.sign(MEMBER_DOMAIN, raw)), now=NOW)


@pytest.mark.parametrize("raw", [b"", b"\xc1", msgspec.msgpack.encode({"peer_id": b"x"}), b"\x81" * 1000])
def test_bytes_that_are_no_info(raw):
    with pytest.raises(ProtocolViolation, match="cannot be read"):
        verify_member(SignedMemberInfo(raw, bytes(64)), now=NOW)


def test_a_leader_that_breaks_the_rules_is_found_out():
    leader, own, other = signed(LEADER), signed(FIRST), signed(SECOND)
    cases = [
        ([leader, other], "does not include this member"),
        ([leader, signed(FIRST, gather=b"replaced")], "does not include this member"),
        ([own, other], "is not a member of its own group"),
        ([leader, own, other, other], "occurs twice"),
        ([leader, own, signed(FIRST, gather=b"again")], "occurs twice"),
        ([leader, own, signed(SECOND, key="swarm.0b1")], "group key"),
        ([leader, own, signed(SECOND, schema_hash=b"t" * SCHEMA_HASH_BYTES)], "another schema"),
        ([leader, own, signed(SECOND, leader=STRANGER.peer_id.to_bytes())], "has not asked"),
        ([signed(LEADER, mode=PeerMode.CLIENT), own], "never leads"),
        ([leader, own, signed(SECOND, signed_at=NOW + 10 * MAX_MEMBER_AGE)], "not fresh"),
    ]
    for members, reason in cases:
        with pytest.raises(ProtocolViolation, match=reason):
            begin(*members, own=own)
    with pytest.raises(ProtocolViolation, match="group id"):
        begin(leader, own, group_id=b"short")
    assert len(begin(leader, own, other)) == 3


def test_members_may_have_waited_for_the_last_one_for_long():
    members = [signed(peer, signed_at=NOW - 10 * MAX_MEMBER_AGE) for peer in (LEADER, FIRST, SECOND)]
    assert len(begin(*members)) == 3
