"""The DHT's calls and the messages that they carry. msgspec checks every limit stated here while decoding.

Requests for nodes near an id say in ``known`` which nodes the caller has heard of (8 bytes of each id), so
that in a settled DHT the answers carry no contacts at all.
"""

from __future__ import annotations

from typing import Annotated

from msgspec import Meta, field

from shoal.dht.ids import ID_BYTES
from shoal.dht.marks import MARK_BYTES
from shoal.p2p.rpc import Method
from shoal.utils.structs import CompactStruct

MAX_CONTACTS = 64
MAX_ENTRIES = 8192
MAX_KNOWN_BYTES = 64 * 8

IdBytes = Annotated[bytes, Meta(min_length=ID_BYTES, max_length=ID_BYTES)]
PeerBytes = Annotated[bytes, Meta(max_length=64)]
Address = Annotated[str, Meta(max_length=300)]
KnownNodes = Annotated[bytes, Meta(max_length=MAX_KNOWN_BYTES)]
KeyBytes = Annotated[bytes, Meta(min_length=1, max_length=4096)]
SubkeyBytes = Annotated[bytes, Meta(max_length=4096)]
Reason = Annotated[str, Meta(max_length=500)]
Marks = Annotated[bytes, Meta(max_length=MAX_ENTRIES * MARK_BYTES)]


class Contact(CompactStruct, frozen=True):
    """A peer and where it can be dialed."""

    peer: PeerBytes
    addresses: Annotated[list[Address], Meta(max_length=16)]


Contacts = Annotated[list[Contact], Meta(max_length=MAX_CONTACTS)]


class StoredEntry(CompactStruct, frozen=True):
    """One entry of a record; an empty ``subkey`` for a plain one."""

    subkey: SubkeyBytes
    value: bytes
    expiration: float


class FindRequest(CompactStruct, frozen=True):
    """Which nodes are nearest to ``target``, and what is stored there?"""

    target: IdBytes
    listening: bool
    """Whether the caller is a node that others may call and put into their tables."""
    known: KnownNodes = b""
    count: Annotated[int, Meta(ge=0, le=MAX_CONTACTS)] = 0
    """How many nodes at most are wanted."""
    want_record: bool = False
    after: int = 0
    """Only entries that were put after this change (of an earlier answer of the same node)."""
    marks_only: bool = False
    """Name the entries by their marks, since another node is asked for them: most often it has the same."""
    wanted: Marks = b""
    """Only the entries with these marks, if there are any here."""


class FindResponse(CompactStruct, frozen=True):
    """The nearest nodes that are not ``known`` to the caller, and the record's new entries."""

    nodes: Contacts = field(default_factory=list)
    entries: Annotated[list[StoredEntry], Meta(max_length=MAX_ENTRIES)] = field(default_factory=list)
    sequence: int = 0
    """The latest change of the record: the next request's ``after``. 0 where there is no record."""
    marks: Marks = b""
    """Of the new entries, where only these were asked for."""


class StoreRequest(CompactStruct, frozen=True):
    """Keep these entries of one key."""

    key: KeyBytes
    listening: bool
    entries: Annotated[list[StoredEntry], Meta(min_length=1, max_length=MAX_ENTRIES)]
    known: KnownNodes = b""
    count: Annotated[int, Meta(ge=0, le=MAX_CONTACTS)] = 0


class StoreResponse(CompactStruct, frozen=True):
    """For each entry the reason why it was refused, or "" if it was accepted; nodes as in
    :class:`FindResponse`.
    """

    refused: Annotated[list[Reason], Meta(max_length=MAX_ENTRIES)]
    nodes: Contacts = field(default_factory=list)


FIND = Method("dht.find", FindRequest, FindResponse)
STORE = Method("dht.store", StoreRequest, StoreResponse)
