"""Finds tensors whose memory must not be written: torch takes read-only memory, and keeps no note of it.

Two kinds of evidence. The *pages* of a file that was mapped for reading cannot be written: a write kills the process.
The *owner* of memory that torch borrowed, a frozen numpy array or a ``bytes`` object, calls it constant, though its
pages can be written. torch keeps the owner alive with a reference in the storage's C++ part, which Python cannot
follow; so the words of that part are read, through ``/proc/self/mem``, where a wrong address is an error and no
crash. Nothing is dereferenced and no owner is touched: what is looked for is an address whose words are those of
an array or ``bytes`` object that holds the tensor's memory.

Without ``/proc`` (macOS), or in a CPython without the global lock (its objects begin with other words), nothing is
found, and nothing is refused.
"""

from __future__ import annotations

import contextlib
import os
import struct
import sys
import sysconfig
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from functools import cached_property
from typing import Any

import numpy as np
import torch

from shoal.averaging.trainer.tensor_checks import extent

WORD = 8
STORAGE_WORDS = 12
"""Of a c10::StorageImpl: its address of the memory, the deleter, and the deleter's context are among them."""
OBJECT_WORDS = 12
"""As much as is read of whatever the context leads to: an array's flags are its ninth word."""
DEPTH = 4
"""Context, DLPack's struct, a memoryview, and the object behind it."""
MOST_READS = 100
"""Of one tensor: enough for what torch, numpy and DLPack put between a storage and its owner."""

MOST_BYTES = 1 << 40
"""Of one ``bytes`` object. A list or table of objects that has the type ``bytes`` in it would pass for one otherwise:
an address in place of its size, which is larger, seems to reach every tensor."""

_HEADER = object.__basicsize__
_BYTES_DATA = bytes.__basicsize__ - 1
_ARRAY_DATA = _HEADER
_ARRAY_FLAGS = _HEADER + 6 * WORD
_WRITEABLE = 0x0400
"""NPY_ARRAY_WRITEABLE."""

_MAPPED = "its memory is mapped for reading only (a file that was opened so: np.memmap(mode='r'), mmap)"
_FROZEN = "it is the memory of a numpy array that is not writeable (array.flags.writeable is False)"
_CONSTANT = "it is the memory of a bytes object, which is constant"


def first_read_only(tensors: Sequence[torch.Tensor]) -> tuple[int, str] | None:
    """The index of the first tensor whose memory is known to be read-only, and why, for people; None: of none.

    Only tensors of the CPU are looked at.
    """
    with _ProcessMemory() as memory:
        for index, tensor in enumerate(tensors):
            if tensor.device.type != "cpu" or tensor.numel() == 0 or tensor.layout != torch.strided:
                continue
            reason = memory.read_only_reason(tensor)
            if reason is not None:
                return index, reason
    return None


class _ProcessMemory:
    """What is known of this process's memory; made anew for each look at it."""

    def __enter__(self) -> _ProcessMemory:
        return self

    def __exit__(self, *_: object) -> None:
        descriptor = self.__dict__.pop("_descriptor", None)
        if descriptor is not None:
            os.close(descriptor)

    def read_only_reason(self, tensor: torch.Tensor) -> str | None:
        """Why the memory of a dense tensor on the CPU must not be written; None: nothing speaks against it."""
        storage = tensor.untyped_storage()
        context = _context_of(storage, self)
        if context == storage.data_ptr():
            return None  # torch's own allocator
        start = tensor.data_ptr()
        if self._is_write_protected(start, start + extent(tensor) * tensor.itemsize):
            return _MAPPED
        return None if context is None else self._owners_reason(context, storage.data_ptr())

    def words(self, address: int, count: int) -> tuple[int, ...]:
        """So many words from ``address``; none if they cannot be read."""
        if self._descriptor is None or address % WORD or not 0 < address < 1 << 62:
            return ()
        try:
            raw = os.pread(self._descriptor, count * WORD, address)
        except OSError:
            return ()
        return struct.unpack(f"={len(raw) // WORD}Q", raw[: len(raw) // WORD * WORD])

    @cached_property
    def _descriptor(self) -> int | None:
        if sys.platform != "linux" or sysconfig.get_config_var("Py_GIL_DISABLED"):
            return None
        try:
            return os.open("/proc/self/mem", os.O_RDONLY | os.O_CLOEXEC)
        except OSError:
            return None

    @cached_property
    def _protected(self) -> list[tuple[int, int]]:
        """Where pages are that may not be written, in order: their first address, and the first one behind."""
        return list(_protected_ranges())

    @cached_property
    def _array_types(self) -> set[int]:
        return {id(kind) for kind in _with_subclasses(np.ndarray)}

    def _is_write_protected(self, start: int, end: int) -> bool:
        index = bisect_right(self._protected, (start, sys.maxsize)) - 1
        around = self._protected[max(0, index) : index + 2]
        return any(first < end and start < behind for first, behind in around)

    def _owners_reason(self, context: int, address: int) -> str | None:
        """What the objects to which ``context`` leads say of the memory at ``address``; the nearest first."""
        level, seen, reads = [context], {context}, 0
        for _ in range(DEPTH):
            following = []
            for place in level:
                reads += 1
                if reads > MOST_READS:
                    return None
                words = self.words(place, OBJECT_WORDS)
                if not words:
                    continue
                if _is_array(words, self._array_types, address):
                    return None if words[_ARRAY_FLAGS // WORD] & _WRITEABLE else _FROZEN
                if _is_bytes(words, place, address):
                    return _CONSTANT
                following += [
                    word for word in words if word not in seen and word % WORD == 0 and word > 1 << 12
                ]
                seen.update(words)
            level = following
        return None


def _context_of(storage: torch.UntypedStorage, memory: _ProcessMemory) -> int | None:
    """What a storage gives back when it ends: its own memory if torch allocated that, or what leads to the owner."""
    address = storage.data_ptr()
    words = memory.words(storage._cdata, STORAGE_WORDS)
    if address not in words:
        return None
    place = words.index(address)  # of the data pointer; behind it its deleter, and the context
    return words[place + 2] if place + 2 < len(words) else None


def _is_array(words: Sequence[int], kinds: set[int], address: int) -> bool:
    if len(words) < OBJECT_WORDS or words[_HEADER // WORD - 1] not in kinds:
        return False
    return words[_ARRAY_DATA // WORD] == address


def _is_bytes(words: Sequence[int], place: int, address: int) -> bool:
    if len(words) < OBJECT_WORDS or words[_HEADER // WORD - 1] != id(bytes):
        return False
    first, size = place + _BYTES_DATA, words[_HEADER // WORD]
    return size < MOST_BYTES and first <= address < first + size


def _with_subclasses(kind: type[Any]) -> Iterator[type[Any]]:
    yield kind
    for subclass in kind.__subclasses__():
        yield from _with_subclasses(subclass)


def _protected_ranges() -> Iterator[tuple[int, int]]:
    with contextlib.suppress(OSError), open("/proc/self/maps") as file:
        for line in file:
            addresses, rights, *_ = line.split(maxsplit=2)
            if "w" not in rights:
                start, end = addresses.split("-")
                yield int(start, 16), int(end, 16)
