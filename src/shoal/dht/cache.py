"""What this node got from others, checked and decoded: for cached answers, and so that polling a key is cheap.

Answers are believed within the limits of this node's own storage: a node that serves a key cannot make others keep more
of it, or for longer, than the nodes that store it would.

For each key it is kept which changes of which node are known already, so that an answer needs to carry, and this node
needs to verify and decode, only what is new.
"""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Callable, Iterable
from typing import Any

from shoal.dht.marks import mark_of, split_marks
from shoal.dht.storage import PLAIN, Entry, Record, StorageLimits
from shoal.dht.types import ValueWithExpiration
from shoal.dht.validation import CompositeValidator, DHTRecord
from shoal.errors import InvalidValueError
from shoal.p2p.identity import PeerID
from shoal.utils.serializer import MSGPackSerializer
from shoal.utils.text import printable

logger = logging.getLogger(__name__)

MAX_CACHED_BYTES = 16 * 1024 * 1024
SEEN_MARKS = 2
"""Of so many entries for a sub-key, the latest to come, it is known that they have been here."""
SPARE_MARKS = 64
"""Marks of entries that are gone are kept up to so many more than twice the entries."""


class KnownRecord:
    """All that is known of one key, from whichever nodes."""

    def __init__(self, key: bytes) -> None:
        self.record = Record(key)
        self.fetched_at = float("-inf")
        """When nodes were last asked for it (the loop's time)."""
        self._sequences: dict[PeerID, int] = {}
        self._decoded: dict[bytes, tuple[Entry, Any, ValueWithExpiration]] = {}
        self._changes = 0
        self._marks: dict[bytes, tuple[bytes, ...]] = {}
        """Of the latest two entries for each sub-key, also of those that were refused: a node may be behind."""

    def known_of(self, peer: PeerID) -> int:
        """Up to which change of its record this peer's entries are known."""
        return self._sequences.get(peer, 0)

    def merge(
        self,
        source: PeerID,
        entries: Iterable[tuple[bytes, Entry]],
        sequence: int,
        check: Callable[[DHTRecord], tuple[Any, ValueWithExpiration] | None],
    ) -> None:
        """Take in what one node answered; ``check`` decodes an entry, or refuses it by None."""
        for subkey, entry in entries:
            held = self._decoded.get(subkey)
            if held is not None and held[0] == entry:
                continue
            self._note_mark(subkey, entry)
            if self.record.accepts(subkey, entry) is not None:
                continue
            decoded = check(DHTRecord(self.record.key, subkey or None, entry.value, entry.expiration))
            if decoded is None:
                continue
            self._changes += 1
            self.record.put(subkey, entry, self._changes)
            self._decoded[subkey] = (entry, *decoded)
        self.note_known(source, sequence)

    def note_known(self, source: PeerID, sequence: int) -> None:
        """The entries of this node are known up to this change."""
        self._sequences.pop(source, None)
        self._sequences[source] = sequence
        if len(self._sequences) > 64:
            del self._sequences[next(iter(self._sequences))]

    def lacking(self, marks: bytes) -> list[bytes]:
        """Those of these marks whose entries have never been here."""
        named = split_marks(marks)
        if not named:
            return []
        seen = {mark for some in self._marks.values() for mark in some}
        return [mark for mark in named if mark not in seen]

    def _note_mark(self, subkey: bytes, entry: Entry) -> None:
        mark = mark_of(subkey, entry.value, entry.expiration)
        before = self._marks.pop(subkey, ())
        if mark not in before:
            before = (*before[1 - SEEN_MARKS :], mark)
        self._marks[subkey] = before
        if len(self._marks) > 2 * len(self.record.entries) + SPARE_MARKS:
            self._marks = {
                subkey: some for subkey, some in self._marks.items() if subkey in self.record.entries
            }

    def shrink(self, max_subkeys: int, max_size: int) -> None:
        """Forget entries, those that expire first before the others, until the record is within its limits."""
        record = self.record
        if len(record.entries) <= max_subkeys and record.size <= max_size:
            return
        for subkey in sorted(record.entries, key=lambda subkey: (record.entries[subkey].expiration, subkey)):
            if len(record.entries) <= max_subkeys and record.size <= max_size:
                return
            record.remove(subkey)
            self._decoded.pop(subkey, None)

    def value(self, now: float) -> ValueWithExpiration | None:
        """The record as users see it, or None if nothing of it is valid any more."""
        self.record.remove_expired(now)
        entries = self.record.entries
        if len(self._decoded) != len(entries):
            self._decoded = {subkey: self._decoded[subkey] for subkey in entries}
        if not entries:
            return None
        if self.record.is_plain:
            return self._decoded[PLAIN][2]
        return ValueWithExpiration(
            {subkey: value for _, subkey, value in self._decoded.values()}, self.record.expiration
        )


class RecordCache:
    """The records known, least recently used first; bounded in number and bytes."""

    def __init__(
        self,
        max_records: int,
        validator: CompositeValidator,
        limits: StorageLimits,
        clock: Callable[[], float],
    ) -> None:
        self._max_records = max(max_records, 1)
        self._validator = validator
        self._limits = limits
        self._clock = clock
        self._records: OrderedDict[int, KnownRecord] = OrderedDict()
        self._sizes: dict[int, int] = {}
        self._size = 0

    def get(self, identifier: int) -> KnownRecord | None:
        """What is known of a key, if it is kept."""
        known = self._records.get(identifier)
        if known is not None:
            self._records.move_to_end(identifier)
        return known

    def open(self, identifier: int, key: bytes) -> KnownRecord:
        """What is known of a key, to be merged into."""
        known = self.get(identifier)
        if known is None:
            known = self._records[identifier] = KnownRecord(key)
            self._make_room()
        return known

    def merge(
        self,
        identifier: int,
        known: KnownRecord,
        source: PeerID,
        entries: Iterable[tuple[bytes, Entry]],
        sequence: int,
    ) -> None:
        """:meth:`KnownRecord.merge`, with the validators' check, within the limits of storage and cache."""
        known.merge(source, entries, sequence, self._check)
        known.shrink(self._limits.max_subkeys, self._limits.max_record_size)
        if self._records.get(identifier) is not known:
            return  # forgotten meanwhile; who holds it may go on using it
        size = known.record.size + len(known.record.key) + 200
        self._size += size - self._sizes.get(identifier, 0)
        self._sizes[identifier] = size
        self._make_room()

    def clear(self) -> None:
        """Forget everything: validators have changed."""
        self._records.clear()
        self._sizes.clear()
        self._size = 0

    def _make_room(self) -> None:
        while len(self._records) > 1 and (
            len(self._records) > self._max_records or self._size > MAX_CACHED_BYTES
        ):
            oldest, _ = self._records.popitem(last=False)
            self._size -= self._sizes.pop(oldest, 0)

    def _check(self, record: DHTRecord) -> tuple[Any, ValueWithExpiration] | None:
        entry, now = Entry(record.value, record.expiration_time), self._clock()
        if entry.expiration <= now:
            return None  # on its way here, or by another clock
        reason = self._limits.explain(record.key, record.subkey or PLAIN, entry, now)
        reason = reason or self._validator.explain(record)
        if reason is None:
            try:
                subkey = None if record.subkey is None else MSGPackSerializer.loads(record.subkey)
                value = MSGPackSerializer.loads(self._validator.strip_value(record))
                hash(subkey)
            except (InvalidValueError, TypeError) as error:
                reason = printable(str(error))
            else:
                return subkey, ValueWithExpiration(value, record.expiration_time)
        logger.warning("an entry that was found is ignored: %s", reason)
        return None
