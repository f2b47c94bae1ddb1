"""Messages by which peers join a group, and what a peer declares of itself in the DHT.

One stream per request: the follower sends a :class:`JoinRequest`, the leader answers once; if it accepted,
the stream stays open until the leader dismisses the follower or the follower has heard that the group begins, or until
either side goes away. A follower that goes away before it has finished its side is not in the group.
"""

from __future__ import annotations

import enum
import functools
import hashlib
import math
import struct
from collections.abc import Iterable

import msgspec

from shoal.averaging.grid import MAX_ROUND
from shoal.averaging.group import (
    MAX_ADDRESSES,
    MAX_GRID_ROUND,
    MAX_GROUP_SIZE,
    MAX_LOST,
    SCHEMA_HASH_BYTES,
    PeerMode,
    SignedMemberInfo,
)
from shoal.averaging.lineage import NO_LINEAGE, Lineage, lineage_problem
from shoal.errors import InvalidValueError, ProtocolViolation
from shoal.p2p.identity import PeerID
from shoal.p2p.rpc import Method
from shoal.utils.structs import AgreedStruct, CompactStruct, Message

SEARCH_MARK_BYTES = 6
MARKS_REMEMBERED = 8192


class RejectReason(enum.StrEnum):
    """Why a peer does not lead the one that asks it; wire values."""

    FULL = "full"
    BEGUN = "begun"
    OTHER_SCHEMA = "other_schema"
    OTHER_KEY = "other_key"
    NOT_LOOKING = "not_looking"
    CANNOT_LEAD = "cannot_lead"
    WRONG_ORDER = "wrong_order"
    OTHER_ROUND = "other_round"

    @property
    def words(self) -> str:
        """For people."""
        return _WORDS[self]


class DismissReason(enum.StrEnum):
    """Why a leader lets a follower go before the group begins; wire values."""

    JOINED_ANOTHER = "joined_another"
    BETTER_CUT = "better_cut"
    REPLACED = "replaced"
    SEARCH_ENDED = "search_ended"

    @property
    def words(self) -> str:
        """For people."""
        return _WORDS[self]


_WORDS: dict[RejectReason | DismissReason, str] = {
    RejectReason.FULL: "its group is full",
    RejectReason.BEGUN: "its group has begun",
    RejectReason.OTHER_SCHEMA: "it averages something else",
    RejectReason.OTHER_KEY: "it looks for a group elsewhere",
    RejectReason.NOT_LOOKING: "it looks for no group",
    RejectReason.CANNOT_LEAD: "it cannot lead a group",
    RejectReason.WRONG_ORDER: "it comes later in the order",
    RejectReason.OTHER_ROUND: "it is in another round of the grid",
    DismissReason.JOINED_ANOTHER: "it joined another leader",
    DismissReason.BETTER_CUT: "this peer is needed in another group",
    DismissReason.REPLACED: "this peer asked it again",
    DismissReason.SEARCH_ENDED: "its search ended",
}


class SearchId(CompactStruct, frozen=True, order=True):
    """One search of one peer: a later search of that peer starts later."""

    peer_id: bytes
    start_time: float


def search_marks(searches: Iterable[SearchId]) -> bytes:
    """One after the other: what stands for a search where it only is to be recognised."""
    return b"".join(search_mark(search.peer_id, search.start_time) for search in searches)


@functools.lru_cache(maxsize=MARKS_REMEMBERED)
def search_mark(peer_id: bytes, start_time: float) -> bytes:
    """Of one search. Another one may have the same by ill will, and is planned without for a moment then."""
    head = struct.pack(">d", start_time)
    return hashlib.blake2b(head + peer_id, digest_size=SEARCH_MARK_BYTES).digest()


class JoinRequest(Message, frozen=True):
    """The first message of the stream; ``prefix`` finds the averager among those that share the connection."""

    prefix: str
    member: SignedMemberInfo


class Accepted(Message, frozen=True):
    """The asker is a follower now; the group begins when it is full or in ``begins_in`` seconds."""

    begins_in: float


class Postponed(Message, frozen=True):
    """To followers: there are too few members, the group begins in ``begins_in`` seconds at the latest."""

    begins_in: float


class Redirect(Message, frozen=True):
    """Ask ``leader`` instead: it leads the peer that was asked, or the asker's place is in its group."""

    leader: bytes
    addresses: tuple[str, ...]


class Rejected(Message, frozen=True):
    """``members``: the group that is full or has begun, for the asker to leave all of it out of its plans."""

    reason: RejectReason
    members: tuple[SearchId, ...] = ()


Answer = Accepted | Redirect | Rejected
"""The first word of a leader to a request."""


class Dismissed(Message, frozen=True):
    """No longer a follower. ``leader``: whom to ask next, if the sender knows; ``members``: as in :class:`Rejected`."""

    reason: DismissReason
    leader: bytes | None = None
    addresses: tuple[str, ...] = ()
    members: tuple[SearchId, ...] = ()


class Begin(Message, frozen=True):
    """The group begins; ``size`` messages :class:`GroupMember` follow, one for each member, the receiver included."""

    group_id: bytes
    size: int
    seen: int = 0
    """As in :class:`~shoal.averaging.group.GroupInfo`, like the next one."""
    before: int = 0


class GroupMember(Message, frozen=True):
    """One member of a group that begins: a message of its own, so that a group's size is not bound by a message's."""

    member: SignedMemberInfo
    cut: int = 0
    """Where its info lacks the terms (:func:`~shoal.averaging.group.terms_of`), which the receiver knows; 0: nowhere.
    Put back, they are what the member has signed.
    """

    @classmethod
    def without(cls, terms: bytes, signed: SignedMemberInfo) -> GroupMember:
        """The message for a member that has signed these terms."""
        cut = signed.info.find(terms)
        if cut <= 0:
            return cls(signed)
        shorter = signed.info[:cut] + signed.info[cut + len(terms) :]
        return cls(SignedMemberInfo(shorter, signed.signature), cut)

    def whole(self, terms: bytes) -> SignedMemberInfo:
        """The member as it has signed itself, if these are its terms."""
        if not 0 < self.cut <= len(self.member.info):
            return self.member
        info = self.member.info[: self.cut] + terms + self.member.info[self.cut :]
        return SignedMemberInfo(info, self.member.signature)


LeaderMessage = Accepted | Postponed | Redirect | Rejected | Dismissed | Begin | GroupMember

JOIN: Method[JoinRequest, LeaderMessage] = Method(
    name="averaging.join",
    request=JoinRequest,
    response=LeaderMessage,  # type: ignore[arg-type]  # a union is a valid message type, but no type[...]
)


MAX_DECLARED_MEMBERS = 64
"""Of a large group a record names so many: the members' records lie under one key, whose size the DHT limits."""


class DeclaredState(enum.StrEnum):
    """Whether a peer that declared itself can still be planned with; stored values."""

    LOOKING = "looking"
    TAKEN = "taken"


class Declaration(AgreedStruct, frozen=True):
    """A peer under its group key; stored with the peer's id as sub-key, so that the DHT checks its signature."""

    start_time: float
    """Its place in the order: the time at which it wanted to start when its search began; never changes in a search.
    Of one that is over: what its later ones come after, see :meth:`.LocalPeer.after_search`."""
    state: DeclaredState
    schema_hash: bytes
    mode: PeerMode
    addresses: tuple[str, ...]
    group: bytes = b""
    """If taken: the marks of the searches in its group. The leader and a few more name all of them, the others their
    own. One record that is seen takes all that it names out of a plan at once."""
    grid_round: int = 0
    """As in :class:`~shoal.averaging.group.MemberInfo`, like the next two."""
    lineage: Lineage = NO_LINEAGE
    lost: tuple[bytes, ...] = ()
    swarm_round: int = 0
    """In which round of the automatic grid it is; see :mod:`.seats`."""


_encoder = msgspec.msgpack.Encoder()
_decoder = msgspec.msgpack.Decoder(Declaration)


def encode_declaration(declaration: Declaration) -> bytes:
    return _encoder.encode(declaration)


def decode_declaration(raw: object) -> Declaration:
    """:raises InvalidValueError: ``raw`` is no declaration; records come from strangers"""
    if not isinstance(raw, bytes):
        raise InvalidValueError(f"a declaration is bytes, not {type(raw).__name__}")
    try:
        declaration = _decoder.decode(raw)
    except msgspec.DecodeError as e:
        raise InvalidValueError(f"not a declaration: {e}") from e
    if not (
        math.isfinite(declaration.start_time)
        and len(declaration.schema_hash) == SCHEMA_HASH_BYTES
        and len(declaration.addresses) <= MAX_ADDRESSES
        and 0 <= declaration.grid_round <= MAX_GRID_ROUND
        and len(declaration.lost) <= MAX_LOST
        and 0 <= declaration.swarm_round <= MAX_ROUND
    ):
        raise InvalidValueError("a declaration with a field out of bounds")
    members, rest = divmod(len(declaration.group), SEARCH_MARK_BYTES)
    if members > MAX_DECLARED_MEMBERS or rest:
        raise InvalidValueError(f"a declaration of a group of {members} members and {rest} bytes")
    problem = lineage_problem(declaration.lineage)
    if problem:
        raise InvalidValueError(f"a declaration with a {problem}")
    return declaration


def check_searches(members: tuple[SearchId, ...]) -> None:
    """:raises ProtocolViolation: they cannot be the members of a group"""
    if len(members) > MAX_GROUP_SIZE:
        raise ProtocolViolation(f"a group of {len(members)} members; at most {MAX_GROUP_SIZE} are allowed")
    for member in members:
        peer_id_of(member.peer_id)
        if not math.isfinite(member.start_time):
            raise ProtocolViolation(f"a member with start time {member.start_time}")


def peer_id_of(raw: bytes) -> PeerID:
    """:raises ProtocolViolation: a message names a peer by bytes that are no peer id"""
    try:
        return PeerID.from_bytes(raw)
    except InvalidValueError as e:
        raise ProtocolViolation(f"not a peer id: {e}") from e
