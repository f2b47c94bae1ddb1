"""Records that a node keeps. Pure: ``now`` is an argument.

A *record* is all that lies under one key. It holds *entries*: a single plain one, or a dictionary of them by sub-key.
An entry is a *value* and the time at which it expires. The plain entry has the sub-key ``b""`` (no serialized sub-key
is empty).

Of two entries for the same place the one that expires later wins; if they expire at the same moment, the one whose
value is greater as bytes, so that all replicas agree. A plain entry and a dictionary displace each other by the same
rule, the dictionary counting as its latest entry.

Each change gets the next number of one sequence. A reader that polls a record says up to which number it knows it
already, and is given only what changed since (:meth:`Record.changes_since`).
"""

from __future__ import annotations

import heapq
from collections.abc import Iterator
from dataclasses import dataclass

from shoal.dht.ids import key_id
from shoal.dht.marks import mark_of
from shoal.utils import figures

PLAIN = b""
"""The sub-key of a plain entry."""
NO_TIME_AT_ALL = 365 * 86400.0
"""Seconds: what expired so long ago was given as a duration, most likely."""


@dataclass(frozen=True, slots=True)
class Entry:
    """One value, and when it expires (seconds since the epoch): what is stored, signed, checked and replaced as one."""

    value: bytes
    expiration: float

    def beats(self, other: Entry) -> bool:
        """Whether this entry replaces the other one at the same place."""
        return (self.expiration, self.value) > (other.expiration, other.value)


class Record:
    """All that is known of one key: the entries by serialized sub-key, or one entry at :data:`PLAIN`."""

    __slots__ = ("_changed_at", "_marks", "entries", "key", "sequence", "size")

    def __init__(self, key: bytes) -> None:
        self.key = key
        self.entries: dict[bytes, Entry] = {}
        self.size = 0
        """Bytes of keys and values held."""
        self.sequence = 0
        """The number of the latest change."""
        self._changed_at: dict[bytes, int] = {}
        self._marks: dict[bytes, bytes] = {}
        """Of those entries for which it was asked."""

    @property
    def is_plain(self) -> bool:
        """Whether the record is one entry without a sub-key."""
        return PLAIN in self.entries

    @property
    def expiration(self) -> float:
        """When the last entry expires; minus infinity if there is none."""
        return max((entry.expiration for entry in self.entries.values()), default=float("-inf"))

    def accepts(self, subkey: bytes, entry: Entry) -> str | None:
        """None if the entry may be put there, or the reason why what is there stays."""
        if bool(subkey) == self.is_plain and self.entries:
            if entry.expiration <= self.expiration:
                kind = "a plain value" if self.is_plain else "a dictionary"
                return f"the key holds {kind} that expires {_later(self.expiration, entry)}"
            return None
        current = self.entries.get(subkey)
        if current is None or current == entry or entry.beats(current):
            return None
        return f"the key holds a value that expires {_later(current.expiration, entry)}"

    def put(self, subkey: bytes, entry: Entry, sequence: int) -> None:
        """Put an entry that :meth:`accepts` accepts; ``sequence`` is the number of this change."""
        if bool(subkey) == self.is_plain and self.entries:
            self.clear()
        if self.entries.get(subkey) == entry:
            return  # storing again what is there already is no change
        self.remove(subkey)
        self.entries[subkey] = entry
        self._changed_at[subkey] = sequence
        self.size += len(subkey) + len(entry.value)
        self.sequence = sequence

    def merge(self, subkey: bytes, entry: Entry, sequence: int) -> bool:
        """:meth:`put` if :meth:`accepts`; returns whether it did."""
        if self.accepts(subkey, entry) is not None:
            return False
        self.put(subkey, entry, sequence)
        return True

    def remove(self, subkey: bytes) -> None:
        """Forget the entry, if there is one."""
        entry = self.entries.pop(subkey, None)
        if entry is not None:
            del self._changed_at[subkey]
            self._marks.pop(subkey, None)
            self.size -= len(subkey) + len(entry.value)

    def clear(self) -> None:
        """Forget all entries."""
        self.entries.clear()
        self._changed_at.clear()
        self._marks.clear()
        self.size = 0

    def remove_expired(self, now: float) -> None:
        """Forget the entries that have expired."""
        for subkey in [subkey for subkey, entry in self.entries.items() if entry.expiration <= now]:
            self.remove(subkey)

    def mark(self, subkey: bytes) -> bytes:
        """The mark of the entry there."""
        mark = self._marks.get(subkey)
        if mark is None:
            entry = self.entries[subkey]
            mark = self._marks[subkey] = mark_of(subkey, entry.value, entry.expiration)
        return mark

    def changes_since(self, sequence: int) -> list[tuple[bytes, Entry]]:
        """The entries put after change ``sequence``; all, if that number is of another life of the node."""
        if sequence == self.sequence:
            return []
        if not 0 < sequence < self.sequence:
            return list(self.entries.items())
        return [(subkey, self.entries[subkey]) for subkey, at in self._changed_at.items() if at > sequence]


@dataclass(frozen=True, slots=True)
class StorageLimits:
    """Bounds on memory; sizes in bytes of serialized keys, sub-keys and values."""

    max_key_size: int = 1024
    max_value_size: int = 128 * 1024
    max_record_size: int = 512 * 1024
    max_subkeys: int = 4096
    max_records: int = 100_000
    max_total_size: int = 64 * 1024 * 1024
    max_expiration: float = 3600.0
    """How far ahead of now an entry may expire, in seconds."""
    clock_skew: float = 60.0
    """By how much further ahead it may lie because the writer's clock differs from ours."""

    def explain(self, key: bytes, subkey: bytes, entry: Entry, now: float) -> str | None:
        """Why an entry is not allowed by itself, whatever else is held; None if it is."""
        if not entry.expiration > now:  # NaN too
            return _explain_expired(entry.expiration, now)
        ahead = entry.expiration - now
        if ahead > self.max_expiration + self.clock_skew:
            allowed = figures.duration(self.max_expiration)
            return f"it expires in {figures.duration(ahead)}, and at most {allowed} are allowed"
        if len(key) > self.max_key_size or len(subkey) > self.max_key_size:
            return f"its key or sub-key is longer than {self.max_key_size} bytes"
        if len(entry.value) > self.max_value_size:
            return (
                f"its value has {len(entry.value):,} bytes, and at most {self.max_value_size:,} are allowed"
            )
        return None


def _later(expiration: float, entry: Entry) -> str:
    later = expiration - entry.expiration
    return f"{figures.duration(later)} later than this one" if later > 0 else "at the same time as this one"


def _explain_expired(expiration: float, now: float) -> str:
    if now - expiration < NO_TIME_AT_ALL:
        return f"it expired {figures.duration(now - expiration)} ago"
    return f"its expiration_time must be a time, as get_dht_time() + 60, got {figures.number(expiration)}"


ENTRY_OVERHEAD = 200
"""Bytes of memory that an entry takes besides its contents, roughly: many tiny entries count too."""


class Storage:
    """Records by the id of their key, within limits: where it is full, what expires first goes first.

    ``first_sequence`` should be random and large, so that the numbers of two lives of a node do not meet.
    """

    def __init__(self, limits: StorageLimits, first_sequence: int = 1) -> None:
        self.limits = limits
        self._records: dict[int, Record] = {}
        self._sequence = first_sequence
        self._count = 0
        self._size = 0
        # (expiration, key id, sub-key) of every entry, and of entries that are gone or were replaced since
        self._by_expiration: list[tuple[float, int, bytes]] = []

    def __len__(self) -> int:
        """The number of keys."""
        return len(self._records)

    @property
    def total_size(self) -> int:
        """Bytes held, overhead included."""
        return self._size

    def records(self) -> Iterator[tuple[int, Record]]:
        """All records with the ids of their keys, as they are now."""
        return iter(list(self._records.items()))

    def get(self, identifier: int, now: float) -> Record | None:
        """The record with its unexpired entries, or None. It is the storage's own: do not change it."""
        self.remove_expired(now)
        return self._records.get(identifier)

    def store(self, key: bytes, subkey: bytes, value: bytes, expiration: float, now: float) -> str | None:
        """Keep an entry. Returns None if it was accepted, or why not.

        Storing what is held already is accepted and changes nothing.
        """
        self.remove_expired(now)
        identifier = key_id(key)
        record = self._records.get(identifier)
        entry = Entry(value, expiration)
        reason = self.limits.explain(key, subkey, entry, now)
        if reason is None and record is not None:
            reason = record.accepts(subkey, entry) or self._make_room_in(record, identifier, subkey, entry)
        if reason is not None:
            return reason
        record = self._records.get(identifier)  # making room may have emptied it
        if record is None:
            record = self._records[identifier] = Record(key)
            self._size += len(key)
        if record.entries.get(subkey) == entry:
            return None
        self._put(record, identifier, subkey, entry)
        self._make_room()
        if self._entry_at(identifier, subkey) != entry:
            return "the node's storage is full of entries that expire later"
        return None

    def remove_expired(self, now: float) -> None:
        """Forget what has expired."""
        queue = self._by_expiration
        while queue and queue[0][0] <= now:
            self._remove_if_current(*heapq.heappop(queue))

    def _make_room_in(self, record: Record, identifier: int, subkey: bytes, entry: Entry) -> str | None:
        """Forget entries of a full record that expire before this one; the reason if that is not enough."""
        if bool(subkey) == record.is_plain:
            return None  # the whole record will be replaced
        current = record.entries.get(subkey)
        count = len(record.entries) + (current is None)
        size = record.size + len(subkey) + len(entry.value)
        if current is not None:
            size -= len(subkey) + len(current.value)
        if count <= self.limits.max_subkeys and size <= self.limits.max_record_size:
            return None
        others = {other: old for other, old in record.entries.items() if other != subkey}
        doomed = []
        for other, old in sorted(others.items(), key=lambda item: (item[1].expiration, item[0])):
            if count <= self.limits.max_subkeys and size <= self.limits.max_record_size:
                break
            if old.expiration >= entry.expiration:
                return "its key is full of entries that expire later"
            doomed.append(other)
            count -= 1
            size -= len(other) + len(old.value)
        for other in doomed:
            self._remove(identifier, other)
        return None

    def _make_room(self) -> None:
        queue, limits = self._by_expiration, self.limits
        while queue and (len(self._records) > limits.max_records or self._size > limits.max_total_size):
            self._remove_if_current(*heapq.heappop(queue))
        if len(queue) > 2 * self._count + 1000:  # mostly entries that were replaced
            self._by_expiration = [
                (entry.expiration, identifier, subkey)
                for identifier, record in self._records.items()
                for subkey, entry in record.entries.items()
            ]
            heapq.heapify(self._by_expiration)

    def _put(self, record: Record, identifier: int, subkey: bytes, entry: Entry) -> None:
        before = _footprint(record)
        self._count -= len(record.entries)
        self._sequence += 1
        record.put(subkey, entry, self._sequence)
        self._count += len(record.entries)
        self._size += _footprint(record) - before
        heapq.heappush(self._by_expiration, (entry.expiration, identifier, subkey))

    def _remove_if_current(self, expiration: float, identifier: int, subkey: bytes) -> None:
        entry = self._entry_at(identifier, subkey)
        if entry is not None and entry.expiration == expiration:
            self._remove(identifier, subkey)

    def _remove(self, identifier: int, subkey: bytes) -> None:
        record = self._records[identifier]
        before = _footprint(record)
        record.remove(subkey)
        self._count -= 1
        self._size += _footprint(record) - before
        if not record.entries:
            del self._records[identifier]
            self._size -= len(record.key)

    def _entry_at(self, identifier: int, subkey: bytes) -> Entry | None:
        record = self._records.get(identifier)
        return record.entries.get(subkey) if record is not None else None


def _footprint(record: Record) -> int:
    return record.size + ENTRY_OVERHEAD * len(record.entries)
