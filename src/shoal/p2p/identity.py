"""Who a peer is: its Ed25519 key pair, the PeerID that names it, and the file that keeps the key.

A PeerID is formed as libp2p forms it for Ed25519 keys: the public key as a libp2p ``PublicKey`` protobuf,
wrapped in an identity multihash; as text, base58 with Bitcoin's alphabet ("12D3KooW..."). The key file holds
the libp2p ``PrivateKey`` protobuf, which contains the public key too, so that damage is noticed.

Touches the file system in :meth:`Identity.load_or_create` only.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import stat
from functools import lru_cache
from pathlib import Path

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from shoal.errors import InvalidTypeError, InvalidValueError

_KEY_BYTES = 32
SIGNATURE_BYTES = 64
# identity multihash of 36 bytes: PublicKey { Type: 1 = Ed25519, Data: 32 bytes }
_PEER_ID_PREFIX = bytes.fromhex("002408011220")
PEER_ID_BYTES = len(_PEER_ID_PREFIX) + _KEY_BYTES
# PrivateKey { Type: 1 = Ed25519, Data: 64 bytes = seed, public key }
_KEY_FILE_PREFIX = bytes.fromhex("08011240")
_KEY_FILE_BYTES = len(_KEY_FILE_PREFIX) + 2 * _KEY_BYTES

_BASE58_ALPHABET = "123456789ABCDEFGHJKLMNPQRSTUVWXYZabcdefghijkmnopqrstuvwxyz"
_BASE58_VALUES = {digit: value for value, digit in enumerate(_BASE58_ALPHABET)}
# The prefix fixes the size of the number, so every PeerID has this many digits.
_PEER_ID_DIGITS = 52


_REMEMBERED = 4096
"""Results of pure functions that are kept, of each kind: peers meet the same peers and signatures again and again."""
_REMEMBERED_BYTES = 2048
"""Longer messages are not kept."""


@lru_cache(_REMEMBERED)
def _base58_encode(raw: bytes) -> str:
    """Base58 of ``raw``; each leading zero byte becomes one leading "1"."""
    number = int.from_bytes(raw, "big")
    digits: list[str] = []
    while number:
        number, value = divmod(number, 58)
        digits.append(_BASE58_ALPHABET[value])
    zeros = len(raw) - len(raw.lstrip(b"\0"))
    return "1" * zeros + "".join(reversed(digits))


def _base58_decode(text: str) -> bytes:
    """Reverse of :func:`_base58_encode`; :class:`InvalidValueError` names a character outside the alphabet.

    Takes time quadratic in the length of ``text``: callers check it first.
    """
    number = 0
    for digit in text:
        value = _BASE58_VALUES.get(digit)
        if value is None:
            raise InvalidValueError(f"{digit!r} is not a base58 character")
        number = number * 58 + value
    zeros = len(text) - len(text.lstrip("1"))
    return bytes(zeros) + number.to_bytes((number.bit_length() + 7) // 8, "big")


class PeerID:
    """The name of a peer: its public key in libp2p's form. Immutable, hashable, ordered by its bytes."""

    __slots__ = ("_hash", "_raw", "_text")

    _raw: bytes
    _hash: int
    _text: str | None

    def __init__(self, raw: bytes) -> None:
        """As :meth:`from_bytes`, which reads better."""
        if not isinstance(raw, bytes):
            raise InvalidTypeError(f"raw must be bytes, got {type(raw).__name__}")
        if len(raw) != PEER_ID_BYTES or not raw.startswith(_PEER_ID_PREFIX):
            shown = raw[:PEER_ID_BYTES].hex() + ("..." if len(raw) > PEER_ID_BYTES else "")
            raise InvalidValueError(
                f"raw must be the {PEER_ID_BYTES} bytes of an Ed25519 PeerID, got {len(raw)} bytes {shown}"
            )
        object.__setattr__(self, "_raw", raw)
        object.__setattr__(self, "_hash", hash(raw))
        object.__setattr__(self, "_text", None)

    @classmethod
    def from_public_key(cls, raw: bytes) -> PeerID:
        """The PeerID of a raw 32-byte Ed25519 public key; :class:`InvalidValueError` at any other length."""
        if len(raw) != _KEY_BYTES:
            raise InvalidValueError(
                f"raw must be an Ed25519 public key of {_KEY_BYTES} bytes, got {len(raw)}"
            )
        return cls(_PEER_ID_PREFIX + bytes(raw))

    @classmethod
    def from_base58(cls, text: str) -> PeerID:
        """The PeerID printed as ``text``; :class:`InvalidValueError` if it is not an Ed25519 PeerID."""
        if not isinstance(text, str):
            raise InvalidTypeError(f"text must be a str, got {type(text).__name__}")
        if len(text) != _PEER_ID_DIGITS:
            raise InvalidValueError(
                f"text must be an Ed25519 PeerID of {_PEER_ID_DIGITS} characters, got {len(text)}: {text[:80]!r}"
            )
        try:
            return cls(_base58_decode(text))
        except InvalidValueError as error:
            raise InvalidValueError(f"text must be an Ed25519 PeerID, got {text!r}: {error}") from None

    @classmethod
    def from_bytes(cls, raw: bytes) -> PeerID:
        """The PeerID of these 38 multihash bytes; :class:`InvalidValueError` if they are none."""
        return cls(bytes(raw)) if cls is not PeerID else _peer_id(bytes(raw))

    def to_bytes(self) -> bytes:
        """The 38 multihash bytes."""
        return self._raw

    def to_base58(self) -> str:
        """The text form, "12D3KooW..."."""
        if self._text is None:
            object.__setattr__(self, "_text", _base58_encode(self._raw))
            assert self._text is not None
        return self._text

    @property
    def public_key(self) -> bytes:
        """The raw 32-byte Ed25519 public key."""
        return self._raw[len(_PEER_ID_PREFIX) :]

    def __setattr__(self, name: str, value: object) -> None:
        raise AttributeError(f"a PeerID cannot be changed: {name}")

    def __delattr__(self, name: str) -> None:
        raise AttributeError(f"a PeerID cannot be changed: {name}")

    def __reduce__(self) -> tuple[type[PeerID], tuple[bytes]]:
        return (PeerID, (self._raw,))

    def __str__(self) -> str:
        return self.to_base58()

    def __repr__(self) -> str:
        return f"<PeerID {self.to_base58()}>"

    def __hash__(self) -> int:
        return self._hash

    def __eq__(self, other: object) -> bool:
        return self._raw == other._raw if isinstance(other, PeerID) else NotImplemented

    def __lt__(self, other: object) -> bool:
        return self._raw < other._raw if isinstance(other, PeerID) else NotImplemented

    def __le__(self, other: object) -> bool:
        return self._raw <= other._raw if isinstance(other, PeerID) else NotImplemented

    def __gt__(self, other: object) -> bool:
        return self._raw > other._raw if isinstance(other, PeerID) else NotImplemented

    def __ge__(self, other: object) -> bool:
        return self._raw >= other._raw if isinstance(other, PeerID) else NotImplemented


def _signed_bytes(domain: bytes, message: bytes) -> bytes:
    """What is really signed: no two pairs of (domain, message) give the same bytes."""
    if not 1 <= len(domain) <= 255:
        raise InvalidValueError(f"domain: {domain!r} must have 1 to 255 bytes")
    return b"shoal-signature\0" + bytes((len(domain),)) + domain + message


class Identity:
    """An Ed25519 key pair. The private key leaves this object into its key file only."""

    __slots__ = ("_key", "peer_id")

    peer_id: PeerID

    def __init__(self, key: Ed25519PrivateKey) -> None:
        self._key = key
        self.peer_id = PeerID.from_public_key(key.public_key().public_bytes_raw())

    @classmethod
    def generate(cls, seed: bytes | None = None) -> Identity:
        """A new identity, random unless a 32-byte ``seed`` decides it (tests, simulations)."""
        if seed is None:
            return cls(Ed25519PrivateKey.generate())
        if len(seed) != _KEY_BYTES:
            raise InvalidValueError(f"seed must be {_KEY_BYTES} bytes, got {len(seed)}")
        return cls(Ed25519PrivateKey.from_private_bytes(seed))

    @classmethod
    def load_or_create(cls, path: str | os.PathLike[str]) -> Identity:
        """The identity kept in the file ``path``, which is made with a new key and mode 0600 if missing.

        Of several processes that create it at once one wins, and all get its key; at no moment can another
        user read it. :class:`InvalidValueError` for a file that is another user's, that others can read, that is
        damaged or no regular file, or in a directory that does not exist; :class:`OSError` from the file system as it
        comes.
        """
        path = Path(path)
        try:
            return cls._load(path)
        except FileNotFoundError:
            if not path.parent.is_dir():
                raise InvalidValueError(
                    f"identity_path: {path} cannot be created: no directory {path.parent}"
                ) from None
        try:
            _create_key_file(path, cls.generate())
        except OSError as error:  # it speaks of the private file beside it
            raise type(error)(
                error.errno, f"the key cannot be written: {error.strerror}", str(path)
            ) from None
        return cls._load(path)

    @classmethod
    def _load(cls, path: Path) -> Identity:
        # O_NONBLOCK: opening a named pipe must not wait for its writer.
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        try:
            # The descriptor is checked, not the path, so that both speak of the same file.
            status = os.fstat(descriptor)
            mode = status.st_mode
            if not stat.S_ISREG(mode):
                raise InvalidValueError(f"identity_path: {path} is not a regular file")
            if mode & 0o077:
                raise InvalidValueError(
                    f"identity_path: {path} is no safe place for a private key: others may read or change it "
                    f"(mode {stat.S_IMODE(mode):04o}); make it yours alone: chmod 600 {path}"
                )
            if (
                status.st_uid != os.geteuid()
            ):  # root can read it all the same, and would speak in that user's name
                raise InvalidValueError(
                    f"identity_path: {path} belongs to another user (uid {status.st_uid}, not {os.geteuid()}); give a "
                    f"file of your own, or take it over: chown {os.geteuid()} {path}"
                )
            content = os.read(descriptor, _KEY_FILE_BYTES + 1)
        finally:
            os.close(descriptor)
        return cls._parse(path, content)

    @classmethod
    def _parse(cls, path: Path, content: bytes) -> Identity:
        hint = "restore it from a copy, or remove it to get a new identity"
        if len(content) != _KEY_FILE_BYTES or not content.startswith(_KEY_FILE_PREFIX):
            raise InvalidValueError(f"identity_path: {path} is not an Ed25519 key file or is damaged; {hint}")
        seed, public_key = content[-2 * _KEY_BYTES : -_KEY_BYTES], content[-_KEY_BYTES:]
        identity = cls.generate(seed)
        if identity.peer_id.public_key != public_key:
            raise InvalidValueError(
                f"identity_path: {path} is damaged: its private and public key do not match; {hint}"
            )
        return identity

    def _to_file_bytes(self) -> bytes:
        return _KEY_FILE_PREFIX + self._key.private_bytes_raw() + self.peer_id.public_key

    def sign(self, domain: bytes, message: bytes) -> bytes:
        """The 64-byte signature of ``message`` for the use named by ``domain`` (1 to 255 bytes).

        Each use of identities has a domain of its own, so that no signature passes for another use.
        """
        return self._key.sign(_signed_bytes(domain, message))

    def __repr__(self) -> str:
        return f"<Identity {self.peer_id}>"


def verify(peer_id: PeerID, domain: bytes, message: bytes, signature: bytes) -> bool:
    """Whether ``signature`` is ``peer_id``'s, made by :meth:`Identity.sign` for this domain and message."""
    signed = _signed_bytes(domain, message)
    # The same record comes from each node that stores it: looking at its signature once is enough.
    check = _is_signed if len(signed) <= _REMEMBERED_BYTES else _is_signed.__wrapped__
    return check(peer_id.public_key, bytes(signature), signed)


@lru_cache(_REMEMBERED)
def _is_signed(public_key: bytes, signature: bytes, signed: bytes) -> bool:
    try:
        Ed25519PublicKey.from_public_bytes(public_key).verify(signature, signed)
    except InvalidSignature:
        return False
    return True


@lru_cache(_REMEMBERED)
def _peer_id(raw: bytes) -> PeerID:
    return PeerID(raw)


def _create_key_file(path: Path, identity: Identity) -> None:
    """Write ``identity`` to ``path`` unless a file is there already.

    The key is written to a private file beside it, which is then linked to its name: that fails if the name
    is taken, and shows no half-written file to anybody.
    """
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    try:
        with os.fdopen(descriptor, "wb") as file:
            os.fchmod(descriptor, 0o600)  # whatever the umask took away
            file.write(identity._to_file_bytes())
            file.flush()
            os.fsync(descriptor)
        with contextlib.suppress(FileExistsError):  # somebody else was first: theirs counts
            os.link(temporary, path)
    finally:
        os.unlink(temporary)
