"""Checks on entries of the DHT: which peer may write them, and what they may hold.

Each node asks its validators before it stores an entry, and again when it gets one. Validators see keys, sub-keys and
values as serialized bytes, and run on bytes from strangers. hivemind calls an entry with its key a *record*, and the
names here do so too: ``DHTRecord``, ``RecordValidatorBase``.
"""

from __future__ import annotations

import re
import secrets
import struct
from abc import ABC, abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass, replace

from shoal.errors import InvalidTypeError, InvalidValueError
from shoal.p2p.identity import SIGNATURE_BYTES, Identity, PeerID, verify
from shoal.utils.serializer import MSGPackSerializer
from shoal.utils.text import printable

__all__ = [
    "CompositeValidator",
    "DHTRecord",
    "ProtectedKeyValidator",
    "RecordValidatorBase",
    "SignatureValidator",
    "protected_key",
]


@dataclass(frozen=True, slots=True)
class DHTRecord:
    """One entry with its key, as validators see it: serialized bytes."""

    key: bytes
    subkey: bytes | None
    """None for a plain entry."""
    value: bytes
    expiration_time: float


class RecordValidatorBase(ABC):
    """One check on entries. Several are combined by :class:`CompositeValidator`.

    A validator may wrap values: :meth:`sign_value` adds to a value that this node stores what
    :meth:`validate` will look for in it elsewhere, and :meth:`strip_value` takes it off again.
    """

    @abstractmethod
    def validate(self, record: DHTRecord) -> bool:
        """Whether the entry may be stored, and believed."""

    def explain(self, record: DHTRecord) -> str | None:
        """None if the entry is valid, or the reason why not, for logs; tells more where a subclass defines
        it.
        """
        return None if self.validate(record) else f"{type(self).__name__} refused it"

    def sign_value(self, record: DHTRecord) -> bytes:
        """The value with what this validator adds to it."""
        return record.value

    def strip_value(self, record: DHTRecord) -> bytes:
        """The value of a valid entry without what :meth:`sign_value` added."""
        return record.value

    @property
    def priority(self) -> int:
        """Values are signed in ascending order of priority, and checked and stripped in descending order."""
        return 0

    def merge_with(self, other: RecordValidatorBase) -> bool:
        """Take over the duties of ``other`` if possible: True, and ``other`` is not used any more."""
        return False


class CompositeValidator(RecordValidatorBase):
    """All of several validators, in the order of their priorities."""

    def __init__(self, validators: Iterable[RecordValidatorBase] = ()) -> None:
        self._validators: list[RecordValidatorBase] = []
        self.extend(validators)

    def extend(self, validators: Iterable[RecordValidatorBase]) -> None:
        """Add validators; one that an existing one can take over is merged into it."""
        for validator in validators:
            if not isinstance(validator, RecordValidatorBase):
                raise InvalidTypeError(
                    f"record_validators must hold instances of RecordValidatorBase, got {validator!r}"
                )
            if not any(existing.merge_with(validator) for existing in self._validators):
                self._validators.append(validator)
        self._validators.sort(key=lambda validator: validator.priority)

    def validate(self, record: DHTRecord) -> bool:
        return self.explain(record) is None

    def explain(self, record: DHTRecord) -> str | None:
        """The first reason against the entry; one line, whatever of the entry a validator quotes in it."""
        for validator in reversed(self._validators):
            try:
                reason = validator.explain(record)
                if reason is not None:
                    return printable(reason)
                record = replace(record, value=validator.strip_value(record))
            except Exception as error:  # noqa: BLE001 - users' validators run on bytes from strangers
                return printable(f"{type(validator).__name__} raised {type(error).__name__}: {error}")
        return None

    def sign_value(self, record: DHTRecord) -> bytes:
        for validator in self._validators:
            record = replace(record, value=validator.sign_value(record))
        return record.value

    def strip_value(self, record: DHTRecord) -> bytes:
        for validator in reversed(self._validators):
            record = replace(record, value=validator.strip_value(record))
        return record.value


def _message_to_sign(record: DHTRecord) -> bytes:
    """All that a signature vouches for, framed so that no two entries give the same bytes."""
    parts = (record.key, record.subkey or b"", record.value, struct.pack(">d", record.expiration_time))
    return b"".join(len(part).to_bytes(4, "big") + part for part in parts)


# ---- entries that belong to the holder of a key
# ----------------------------------------------------------------


class SignatureValidator(RecordValidatorBase):
    """Entries that only the holder of an Ed25519 key can write.

    An entry is owned if its key or sub-key contains an owner's marker, such as :attr:`local_public_key`; it
    is then valid only with that owner's signature over key, sub-key, value and expiration. Other entries are
    left alone.

    >>> validator = SignatureValidator()
    >>> dht.add_validators([validator])
    >>> dht.store("loss", 0.5, get_dht_time() + 60, subkey=b"peer 1" + validator.local_public_key)

    ``seed`` (32 bytes) is the secret key; without it a new one is made. A DHT needs one validator of this
    type, with the key by which this node signs.
    """

    _MARKER = re.compile(rb"\[owner:ed25519:([0-9a-f]{64})\]")
    _DOMAIN = b"shoal/dht/owned-record/1"

    def __init__(self, seed: bytes | None = None) -> None:
        self._seed = secrets.token_bytes(32) if seed is None else seed
        self._identity = Identity.generate(self._seed)

    @property
    def local_public_key(self) -> bytes:
        """The marker to put into keys or sub-keys (bytes or text) that only this key can write."""
        return b"[owner:ed25519:" + self._identity.peer_id.public_key.hex().encode() + b"]"

    @property
    def priority(self) -> int:
        return 10

    def validate(self, record: DHTRecord) -> bool:
        return self.explain(record) is None

    def explain(self, record: DHTRecord) -> str | None:
        owners = self._owners(record)
        if not owners:
            return None
        if len(owners) > 1:
            return f"it names {len(owners)} different owners"
        if len(record.value) < SIGNATURE_BYTES:
            return "its owner's signature is missing"
        value, signature = record.value[:-SIGNATURE_BYTES], record.value[-SIGNATURE_BYTES:]
        owner = PeerID.from_public_key(bytes.fromhex(owners[0].decode()))
        if not verify(owner, self._DOMAIN, _message_to_sign(replace(record, value=value)), signature):
            return "its owner's signature does not match"
        return None

    def sign_value(self, record: DHTRecord) -> bytes:
        """Signs what this validator's key owns; an entry of another owner stays unsigned, and will be
        refused.
        """
        if self._owners(record) != [self._identity.peer_id.public_key.hex().encode()]:
            return record.value
        return record.value + self._identity.sign(self._DOMAIN, _message_to_sign(record))

    def strip_value(self, record: DHTRecord) -> bytes:
        return record.value[:-SIGNATURE_BYTES] if self._owners(record) else record.value

    def merge_with(self, other: RecordValidatorBase) -> bool:
        # Two of these would both demand the last bytes of the value. The first one's key goes on signing.
        return isinstance(other, SignatureValidator)

    def _owners(self, record: DHTRecord) -> list[bytes]:
        found = self._MARKER.findall(record.key) + self._MARKER.findall(record.subkey or b"")
        return sorted(set(found))

    def __reduce__(self) -> tuple[type[SignatureValidator], tuple[bytes]]:
        return (type(self), (self._seed,))


# ---- entries that belong to the peer that stores them
# ----------------------------------------------------------

_PROTECTED_PREFIX = b"\0shoal/protected/"


def protected_key(name: str) -> bytes:
    """A key under which every peer can write one sub-key: the bytes of its own PeerID, signed by its
    identity.
    """
    return _PROTECTED_PREFIX + name.encode()


def is_protected(serialized_key: bytes) -> bool:
    """Whether a serialized key was made by :func:`protected_key`."""
    if serialized_key[:1] not in (b"\xc4", b"\xc5", b"\xc6"):  # MessagePack's byte strings
        return False
    header = 1 + (1 << (serialized_key[0] - 0xC4))
    return serialized_key.startswith(_PROTECTED_PREFIX, header)


class ProtectedKeyValidator(RecordValidatorBase):
    """The rule of :func:`protected_key`; every node applies it, outermost of all."""

    _DOMAIN = b"shoal/dht/protected-record/1"

    def __init__(self, identity: Identity) -> None:
        self._identity = identity
        self._own_subkey = MSGPackSerializer.dumps(identity.peer_id.to_bytes())

    @property
    def priority(self) -> int:
        return 1_000_000

    def validate(self, record: DHTRecord) -> bool:
        return self.explain(record) is None

    def explain(self, record: DHTRecord) -> str | None:
        if not is_protected(record.key):
            return None
        if record.subkey is None:
            return "an entry under a protected key needs a sub-key"
        try:
            raw = MSGPackSerializer.loads(record.subkey)
            owner = PeerID.from_bytes(raw) if isinstance(raw, bytes) else None
        except InvalidValueError:
            owner = None
        if owner is None or MSGPackSerializer.dumps(owner.to_bytes()) != record.subkey:
            return "its sub-key under a protected key is not the bytes of a PeerID"
        value, signature = record.value[:-SIGNATURE_BYTES], record.value[-SIGNATURE_BYTES:]
        if not verify(owner, self._DOMAIN, _message_to_sign(replace(record, value=value)), signature):
            return f"the signature of {owner} under a protected key is missing or does not match"
        return None

    def sign_value(self, record: DHTRecord) -> bytes:
        if not is_protected(record.key) or record.subkey != self._own_subkey:
            return record.value
        return record.value + self._identity.sign(self._DOMAIN, _message_to_sign(record))

    def strip_value(self, record: DHTRecord) -> bytes:
        return record.value[:-SIGNATURE_BYTES] if is_protected(record.key) else record.value

    def merge_with(self, other: RecordValidatorBase) -> bool:
        return isinstance(other, ProtectedKeyValidator)
