"""What a group is: its key in the DHT, what each member says of itself, and the checks that make members
agree.

Pure: no I/O, no clock, no randomness; ``now`` is an argument. A member describes itself in a
:class:`MemberInfo` and signs it with its identity key, so nobody vouches for somebody else: the leader only
passes on what each member signed. The info names the leader that it was given to, so that it cannot be
replayed to form a group under another leader.
"""

from __future__ import annotations

import enum
import math
from collections.abc import Sequence
from dataclasses import dataclass

import msgspec

from shoal.averaging.grid import NO_GRID, Grid, grid_problem
from shoal.averaging.lineage import NO_LINEAGE, Lineage, lineage_problem
from shoal.errors import InvalidValueError, ProtocolViolation
from shoal.p2p.identity import Identity, PeerID, verify
from shoal.utils import figures
from shoal.utils.structs import AgreedStruct

MEMBER_DOMAIN = b"shoal.averaging.member.v3"
SCHEMA_HASH_BYTES = 16
"""128 bits of SHA-256: nobody finds another agreement with the hash of a given one."""
NONCE_BYTES = 16
GROUP_ID_BYTES = 16
MAX_GATHER_BYTES = 512 * 1024
"""One member's own data; below the transport's limit of a message with room for the rest of the info."""
MAX_GROUP_GATHER_BYTES = 64 * 1024 * 1024
"""All members' data together, as much as a member accepts from a leader."""
MAX_WEIGHT = 1e300
"""So that the sum of all weights is finite."""
MAX_GROUP_SIZE = 4096
MAX_ADDRESSES = 32
MAX_ADDRESS_CHARS = 300
MAX_GRID_ROUND = 1 << 48
MAX_SEEN = 1 << 20
"""Peers that a leader may say it has seen under one key."""
MAX_LOST = 8
"""Peers that a member may say it could not reach."""
MAX_MEMBER_AGE = 3600.0
"""Seconds: a member signs its info when it asks. The leader may keep it for as long as it collects followers."""
CLOCK_SKEW = 60.0
"""Seconds by which another peer's clock may be ahead of ours."""


class PeerMode(enum.StrEnum):
    """What a peer does in a group; wire values."""

    FULL = "full"
    """Contributes tensors, can be dialed, may lead."""
    CLIENT = "client"
    """Contributes tensors, cannot be dialed, never leads and reduces nothing for others."""
    AUXILIARY = "auxiliary"
    """Contributes nothing but helps with the reduction, may lead, and counts in the group's size."""

    NODE = "full"
    """The same member as FULL, by the name that users of hivemind know."""
    AUX = "auxiliary"
    """The same member as AUXILIARY."""

    @property
    def can_lead(self) -> bool:
        return self is not PeerMode.CLIENT

    @property
    def contributes(self) -> bool:
        """Whether it has tensors to average: a group needs one such member."""
        return self is not PeerMode.AUXILIARY


AveragingMode = PeerMode
"""The name that users of hivemind know."""


class MemberInfo(AgreedStruct, frozen=True):
    """What one member says of itself to one leader."""

    peer_id: bytes
    leader: bytes
    """The peer that is asked to lead; the leader itself in its own info."""
    key: str
    schema_hash: bytes
    mode: PeerMode
    bandwidth: float | None
    addresses: tuple[str, ...]
    gather: bytes
    start_time: float
    """DHT time at which the member wanted to start when its search began: its place in the order."""
    signed_at: float
    """DHT time of the member when it signed this."""
    nonce: bytes
    """Fresh for every request."""
    weight: float = 1.0
    """Of its tensors in the average: here, so that every owner counts the member alike."""
    grid_round: int = 0
    """Rounds that it has been through with the bits that it was given; see :mod:`.matchmaking.group_bits`."""
    lineage: Lineage = NO_LINEAGE
    """With whom it has mixed lately; see :mod:`.lineage`."""
    grid: Grid = NO_GRID
    """What it knows of the grid of a large swarm; see :mod:`.matchmaking.seats`."""
    lost: tuple[bytes, ...] = ()
    """Ids of peers that it could not reach lately; see :mod:`.matchmaking.apart`."""


class SignedMemberInfo(AgreedStruct, frozen=True):
    """An encoded :class:`MemberInfo` and its member's signature over exactly these bytes."""

    info: bytes
    signature: bytes


@dataclass(frozen=True)
class GroupInfo:
    """A group that was agreed on; equal at all members.

    ``members`` are in the agreed order: the leader first, then by peer id.
    """

    group_id: bytes
    key: str
    members: tuple[MemberInfo, ...]
    seen: int = 0
    """How many peers its leader has seen look for a group under the key, members of others included."""
    before: int = 0
    """How many of these are in groups that come before this one in the plan of all that were dealt to the key."""

    @property
    def leader(self) -> PeerID:
        """The first member."""
        return PeerID.from_bytes(self.members[0].peer_id)

    @property
    def peer_ids(self) -> tuple[PeerID, ...]:
        """All members, in the order that all of them know."""
        return tuple(PeerID.from_bytes(member.peer_id) for member in self.members)

    def __len__(self) -> int:
        return len(self.members)


_encoder = msgspec.msgpack.Encoder()
_decoder = msgspec.msgpack.Decoder(MemberInfo)


def group_key(prefix: str, bits: str = "") -> str:
    """The name under which the peers of ``prefix`` whose group bits are ``bits`` declare themselves.

    The prefix may have dots: what follows the last one says what kind of key it is, so that no two pairs of prefix
    and bits have one key, nor one that :func:`automatic_key` makes.
    """
    if not prefix or len(prefix) > 256:
        raise InvalidValueError(f"prefix must be 1 to 256 characters, got {prefix!r}")
    if any(bit not in "01" for bit in bits) or len(bits) > 64:
        raise InvalidValueError(f"bits must be at most 64 characters '0' and '1', got {bits!r}")
    return f"{prefix}.0b{bits}"


def automatic_key(prefix: str, bits: str) -> str:
    """As :func:`group_key`, for peers that were given no bits and use ``bits`` because they are many.

    Another name, so that they never meet those to whom these very bits were given, nor count them as their own.
    """
    without_bits = group_key(prefix)  # checks the prefix, too
    return f"{prefix}.auto{bits}" if bits else without_bits


def seat_key(prefix: str, groups: int, number: int) -> str:
    """As :func:`group_key`, for group ``number`` of the so many ``groups`` that a large swarm makes in each round.

    A third kind of name, for the same reason.
    """
    group_key(prefix)  # checks the prefix
    return f"{prefix}.grid{groups}-{number}"


def seat_of_key(key: str) -> int | None:
    """The number in what :func:`seat_key` has made; None in other keys."""
    _, _, last = key.rpartition(".")
    return int(last.rpartition("-")[2]) if last.startswith("grid") and "-" in last else None


def bits_of_key(key: str) -> str:
    """The bits in what :func:`group_key` has made; none in other keys."""
    _, _, last = key.rpartition(".")
    return last.removeprefix("0b") if last.startswith("0b") else ""


def sign_member(identity: Identity, info: MemberInfo) -> SignedMemberInfo:
    """Encode and sign ``info``; its limits are checked here, so that the mistake shows where it was made.

    :raises InvalidValueError: a field is outside what other peers accept
    """
    problem = _field_problem(info)
    if problem:
        raise InvalidValueError(problem)
    encoded = _encoder.encode(info)
    return SignedMemberInfo(encoded, identity.sign(MEMBER_DOMAIN, encoded))


def verify_member(signed: SignedMemberInfo, *, now: float, max_age: float = MAX_MEMBER_AGE) -> MemberInfo:
    """Decode one member's info; it is well-formed, fresh, and signed by the peer that it names.

    :param max_age: seconds since it was signed
    :raises ProtocolViolation: naming what is wrong
    """
    try:
        info = _decoder.decode(signed.info)
        peer_id = PeerID.from_bytes(info.peer_id)
        PeerID.from_bytes(info.leader)
    except (msgspec.DecodeError, InvalidValueError) as e:
        raise ProtocolViolation(f"member info cannot be read: {e}") from e
    problem = _field_problem(info)
    if problem:
        raise ProtocolViolation(f"member info of {peer_id}: {problem}")
    if not now - max_age <= info.signed_at <= now + CLOCK_SKEW:
        side = "ahead" if info.signed_at > now else "ago"
        raise ProtocolViolation(
            f"member info of {peer_id} was signed {figures.duration(abs(info.signed_at - now))} {side} by this peer's "
            "clock: it is not fresh, or one of the two clocks is wrong"
        )
    if not verify(peer_id, MEMBER_DOMAIN, signed.info, signed.signature):
        raise ProtocolViolation(f"member info of {peer_id}: wrong signature")
    return info


def terms_of(info: MemberInfo) -> bytes:
    """What the infos of all members of a group have alike, as it stands there, side by side: leader, key and hash."""
    return b"".join(map(_encoder.encode, (info.leader, info.key, info.schema_hash)))


def terms_in(signed: SignedMemberInfo) -> bytes:
    """As :func:`terms_of`, of an info that this peer has signed, or verified."""
    return terms_of(_decoder.decode(signed.info))


def order_members(leader: PeerID, infos: Sequence[MemberInfo]) -> tuple[MemberInfo, ...]:
    """The order on which all members agree: the leader first, the others by peer id."""
    first = leader.to_bytes()
    return tuple(sorted(infos, key=lambda info: (info.peer_id != first, info.peer_id)))


def verify_group(
    group_id: bytes,
    members: Sequence[SignedMemberInfo],
    *,
    leader: PeerID,
    own: SignedMemberInfo,
    now: float,
    seen: int = 0,
    before: int = 0,
) -> GroupInfo:
    """Check what a leader sent when it began a group, as seen by the member that had sent it ``own``.

    :raises ProtocolViolation: a signature, key, schema or leader is wrong, a member signed in the future or occurs
        twice, the leader is missing or not allowed to lead, or this member is not included exactly as it sent itself
    """
    if len(group_id) != GROUP_ID_BYTES:
        raise ProtocolViolation(f"group id of {len(group_id)} bytes instead of {GROUP_ID_BYTES}")
    if not 1 <= len(members) <= MAX_GROUP_SIZE:
        raise ProtocolViolation(f"a group of {len(members)} members; 1 to {MAX_GROUP_SIZE} are allowed")
    if not 0 <= seen <= MAX_SEEN:
        raise ProtocolViolation(f"the leader has seen {seen} peers; 0 to {MAX_SEEN} are allowed")
    if not 0 <= before <= seen:
        raise ProtocolViolation(
            f"the leader has seen {before} peers in groups before its own, of {seen} in all"
        )
    if own not in members:
        raise ProtocolViolation("the leader does not include this member as it sent itself")
    mine = _decoder.decode(own.info)
    # Each was fresh when its member joined the leader; since then they may have waited for long.
    infos = [verify_member(signed, now=now, max_age=math.inf) for signed in members]
    _check_agreement(infos, mine, leader)
    return GroupInfo(group_id, mine.key, order_members(leader, infos), seen, before)


def _check_agreement(infos: Sequence[MemberInfo], mine: MemberInfo, leader: PeerID) -> None:
    seen: set[bytes] = set()
    for info in infos:
        peer_id = PeerID.from_bytes(info.peer_id)
        if info.peer_id in seen:
            raise ProtocolViolation(f"member {peer_id} occurs twice in the group")
        seen.add(info.peer_id)
        if info.key != mine.key:
            raise ProtocolViolation(f"member {peer_id} belongs to group key {info.key!r}, not {mine.key!r}")
        if info.schema_hash != mine.schema_hash:
            raise ProtocolViolation(f"member {peer_id} averages tensors of another schema")
        if info.leader != leader.to_bytes():
            raise ProtocolViolation(f"member {peer_id} has not asked {leader} to lead it")
        if peer_id == leader and not info.mode.can_lead:
            raise ProtocolViolation(f"leader {leader} is in mode {info.mode}, which never leads")
    if leader.to_bytes() not in seen:
        raise ProtocolViolation(f"leader {leader} is not a member of its own group")


def _field_problem(info: MemberInfo) -> str | None:
    """What is wrong with the fields of ``info``, if anything: one check for our own infos and those of others."""
    bandwidth = info.bandwidth
    checks = (
        (len(info.schema_hash) == SCHEMA_HASH_BYTES, f"schema_hash must be {SCHEMA_HASH_BYTES} bytes"),
        (len(info.nonce) == NONCE_BYTES, f"nonce must be {NONCE_BYTES} bytes"),
        (
            len(info.gather) <= MAX_GATHER_BYTES,
            f"gather of {len(info.gather)} bytes; limit {MAX_GATHER_BYTES}",
        ),
        (len(info.key) <= 400, "key is too long"),
        (len(info.addresses) <= MAX_ADDRESSES, f"more than {MAX_ADDRESSES} addresses"),
        (all(len(address) <= MAX_ADDRESS_CHARS for address in info.addresses), "an address is too long"),
        (bandwidth is None or (math.isfinite(bandwidth) and bandwidth >= 0), f"bandwidth={bandwidth}"),
        (math.isfinite(info.weight) and info.weight >= 0, f"weight={info.weight}"),
        (len(info.lost) <= MAX_LOST, f"more than {MAX_LOST} lost peers"),
        (0 <= info.grid_round <= MAX_GRID_ROUND, f"grid_round={info.grid_round}"),
        (math.isfinite(info.start_time) and math.isfinite(info.signed_at), "a time is not finite"),
    )
    problem = next((problem for holds, problem in checks if not holds), None)
    return problem or lineage_problem(info.lineage) or grid_problem(info.grid)
