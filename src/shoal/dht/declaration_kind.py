"""One kind of thing that peers declare of themselves in the DHT: how it is written, and how it is read. Pure.

Each peer declares under a protected key (see :func:`.protected_key`), whose sub-keys are the PeerIDs of the peers that
wrote there. Every node checks that an entry is signed by the peer of its sub-key. What is signed may still be nonsense:
``decode`` checks that.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from shoal.dht.types import ValueWithExpiration
from shoal.errors import InvalidValueError
from shoal.p2p.identity import PeerID

logger = logging.getLogger(__name__)

T = TypeVar("T")


@dataclass(frozen=True)
class DeclarationKind(Generic[T]):
    """See the module.

    :param name: of one, for the log
    :param encode: makes a declaration into a value of the DHT
    :param decode: makes a value into a declaration; raises InvalidValueError if it is none
    :param withdrawn: takes the place of a declaration that is withdrawn, until that would have expired. Readers take a
        peer that declares this for one that declares nothing. None: such declarations are not withdrawn
    """

    name: str
    encode: Callable[[T], Any]
    decode: Callable[[Any], T]
    withdrawn: T | None = None

    def all_in(self, record: ValueWithExpiration | None) -> tuple[tuple[PeerID, T], ...]:
        """Each peer of a record with its declaration, ordered as in the record; unreadable ones are left out."""
        declared = []
        for subkey, entry in _entries(record).items():
            try:
                peer, declaration = PeerID.from_bytes(subkey), self._decode(entry.value)
            except (InvalidValueError, TypeError) as error:
                logger.debug("an unreadable declaration of %s is left out: %s", self.name, error)
            else:
                if declaration is not None:
                    declared.append((peer, declaration))
        return tuple(declared)

    def of(self, peer: PeerID, record: ValueWithExpiration | None) -> T | None:
        """What one peer declares in a record; None if it does not.

        :raises InvalidValueError: its declaration is unreadable
        """
        entry = _entries(record).get(peer.to_bytes())
        return None if entry is None else self._decode(entry.value)

    def _decode(self, value: Any) -> T | None:
        declaration = self.decode(value)
        return None if declaration == self.withdrawn else declaration


def _entries(record: ValueWithExpiration | None) -> dict[Any, ValueWithExpiration]:
    """The entries of a dictionary, by sub-key. A plain value was written by no peer of Shoal."""
    return record.value if record is not None and isinstance(record.value, dict) else {}
