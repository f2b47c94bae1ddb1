"""The four forms of what peers send each other, as bases of :class:`msgspec.Struct` classes. Pure.

All are frozen. What a peer sent is decoded in one pass that checks types and bounds; afterwards nobody changes it.
Subclasses repeat ``frozen=True``, since type checkers do not know that msgspec inherits it.
"""

from __future__ import annotations

import msgspec


class CompactStruct(msgspec.Struct, frozen=True, array_like=True):
    """An array of its fields, without names: for what is sent often, or many times in one message.

    It grows at its end. An older peer ignores fields that it does not know, so a new field has a default for peers that
    do not send it yet.
    """


class AgreedStruct(CompactStruct, frozen=True, forbid_unknown_fields=True):
    """As a :class:`CompactStruct`, for what a peer declares or signs, and others act on alike, many times in a round.

    A field that the receiver does not know is an error, as in a :class:`NamedStruct`.
    """


class NamedStruct(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A map of its fields by name: for what a peer declares, signs, or agrees on with others.

    A field that the receiver does not know is an error. Ignored, it would let two peers act on one text by different
    rules. A new field is a new version of the message.
    """


class Message(NamedStruct, frozen=True, tag=True, forbid_unknown_fields=True):
    """One of several messages that a stream may carry next, told apart by the name of its class, which is sent."""
