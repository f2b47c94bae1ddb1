"""How much a serialized value may cost to decode: bounded before it is decoded. Pure.

A byte of MessagePack can be an empty list, which takes 56 bytes and the garbage collector's time. And tuples can be
made so that all of them have one hash, with which a dictionary takes quadratic time. Half a megabyte of either,
gathered once, held up every member of a group for seconds.
"""

from __future__ import annotations

from shoal.errors import InvalidValueError

MAX_ELEMENTS = 1_000_000
"""Values in one serialized value, at all depths."""
MAX_CONTAINERS = 65_536
"""Of these, lists, tuples, dictionaries and instances of registered classes."""
MAX_TUPLE_KEYS = 4096
"""Of these, tuples and instances that are keys of dictionaries."""

TUPLE_CODE = 0x40

_OF_CONTAINERS = bytes([*range(0x80, 0xA0), *range(0xC7, 0xCA), *range(0xD4, 0xD9), *range(0xDC, 0xE0)])
"""The first bytes of containers and extensions; other values may hold them, too."""
_FIXED = {0xCA: 4, 0xCB: 8, 0xCC: 1, 0xCD: 2, 0xCE: 4, 0xCF: 8, 0xD0: 1, 0xD1: 2, 0xD2: 4, 0xD3: 8}
"""How many bytes follow the first one, for numbers."""
_SIZED = {0xC4: 1, 0xC5: 2, 0xC6: 4, 0xD9: 1, 0xDA: 2, 0xDB: 4}
"""In how many bytes the length of a text or of bytes follows."""
_EXTENSIONS = {0xC7: 1, 0xC8: 2, 0xC9: 4, 0xD4: 0, 0xD5: 0, 0xD6: 0, 0xD7: 0, 0xD8: 0}
"""In how many bytes the length of an extension follows; 0: it is known."""


def check_budget(data: bytes | bytearray | memoryview, what: str) -> None:
    """:class:`InvalidValueError` if this value would take too much to decode; ``what`` begins its message.

    Malformed bytes may pass: the decoder stops at the same place.
    """
    raw = bytes(data)
    # Mostly true, and a matter of microseconds.
    if len(raw) <= MAX_ELEMENTS and len(raw) - len(raw.translate(None, _OF_CONTAINERS)) <= MAX_TUPLE_KEYS:
        return
    elements, containers, tuple_keys = _count(raw)
    limits = (
        (elements, MAX_ELEMENTS, "elements"),
        (containers, MAX_CONTAINERS, "lists, tuples and dictionaries"),
        (tuple_keys, MAX_TUPLE_KEYS, "tuples as keys of dictionaries"),
    )
    for count, limit, name in limits:
        if count > limit:
            raise InvalidValueError(f"{what}: more than {limit:,} {name}")


def _count(raw: bytes) -> tuple[int, int, int]:
    """Elements, containers, and extensions that are keys; counting ends soon after a limit."""
    elements = containers = tuple_keys = 0
    at, end = 0, len(raw)
    left, is_map = 1, False  # values that follow in the innermost container; keys of a map are at even ones
    outer: list[tuple[int, bool]] = []
    while at < end:
        while not left:
            if not outer:
                return elements, containers, tuple_keys
            left, is_map = outer.pop()
        is_key = is_map and not left & 1
        left -= 1
        first = raw[at]
        at += 1
        elements += 1
        if elements > MAX_ELEMENTS:
            break
        if first < 0x80 or first >= 0xE0 or 0xC0 <= first <= 0xC3:  # small numbers, None, True, False
            continue
        if 0xA0 <= first < 0xC0:  # a short text
            at += first & 0x1F
        elif first in _FIXED:
            at += _FIXED[first]
        elif first in _SIZED:
            size = _SIZED[first]
            at += size + int.from_bytes(raw[at : at + size])
        else:
            size, inside, next_is_map, is_wrapper = _open(raw, first, at)
            containers += not is_wrapper
            tuple_keys += is_key
            if containers > MAX_CONTAINERS or tuple_keys > MAX_TUPLE_KEYS:
                break
            at += size
            if inside:
                outer.append((left, is_map))
                left, is_map = inside, next_is_map
    return elements, containers, tuple_keys


def _open(raw: bytes, first: int, at: int) -> tuple[int, int, bool, bool]:
    """Of a container: bytes to skip, how many values it holds, whether it is a map, or a tuple around a list."""
    if first < 0xA0:
        is_map = first < 0x90
        return 0, (first & 0x0F) << is_map, is_map, False
    if first >= 0xDC:
        size, is_map = (2 if first in (0xDC, 0xDE) else 4), first >= 0xDE
        return size, int.from_bytes(raw[at : at + size]) << is_map, is_map, False
    size = _EXTENSIONS[first]
    length = int.from_bytes(raw[at : at + size]) if size else 1 << (first - 0xD4)
    if raw[at + size : at + size + 1] == bytes([TUPLE_CODE]):
        return size + 1, 1, False, True  # the tuple's items are serialized as one list inside
    return size + 1 + length, 0, False, False
