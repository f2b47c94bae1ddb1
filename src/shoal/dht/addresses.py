"""The lists of addresses that a user gives to :class:`~shoal.dht.dht.DHT`: what can be used is, the rest is said.

Lists come from hivemind's documents, from environment variables and from chats. So they hold transports that Shoal does
not have, blanks, line ends, and several addresses in one text.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterable

from shoal.errors import InvalidTypeError, InvalidValueError
from shoal.p2p.config import MAX_ANNOUNCED
from shoal.p2p.multiaddr import FORM, Multiaddr

_BETWEEN = re.compile(r"[\s,;]+")


def parse_addresses(name: str, addresses: object, *, depth: int = 1) -> tuple[Multiaddr, ...]:
    """Addresses given as text or Multiaddr, each once; a text may hold several, with commas or blanks between them.

    Addresses of transports that Shoal does not have are left out, with a warning for each.

    :param depth: how many calls away the caller is from the function that the user called
    :raises InvalidValueError: one of them is malformed, or none of them can be used
    :raises InvalidTypeError: it is no list
    """
    if addresses is None:
        return ()
    items = [addresses] if isinstance(addresses, str) or _is_multiaddr(addresses) else addresses
    if not isinstance(items, Iterable) or isinstance(items, bytes | bytearray | dict):
        raise InvalidTypeError(f"{name} must be a list of addresses, got {addresses!r}")
    given = list(items)
    parsed: dict[Multiaddr, None] = {}
    unsupported: dict[str, None] = {}
    for item in given:
        for address in _split(name, item):
            try:
                made = Multiaddr.parse(address)
            except InvalidValueError as error:
                raise InvalidValueError(f"{name}: {error}") from None
            if made.unspoken:
                unsupported[f"address '{address}': {made.unspoken}"] = None
            else:
                parsed[made] = None
    if given and not parsed:
        useless = "".join(f"\n  {reason}" for reason in unsupported)
        raise InvalidValueError(
            f"{name}: none of these addresses can be used:{useless}\nGive {FORM}"
            if unsupported
            else f"{name}: {_nothing_in(name, addresses)}"
        )
    for reason in unsupported:
        warnings.warn(f"{name}: {reason}: left out", UserWarning, stacklevel=depth + 2)
    return tuple(parsed)


def parse_listen_addresses(addresses: object) -> tuple[Multiaddr, ...]:
    """``host_maddrs``; an identity in them would be meaningless, and is most likely somebody else's."""
    parsed = parse_addresses("host_maddrs", addresses, depth=2)
    for address in parsed:
        if address.peer_id is not None:
            raise InvalidValueError(
                f"host_maddrs must hold addresses alone, without /p2p, got {address}, which names a peer"
            )
    if not parsed:
        raise InvalidValueError(
            "host_maddrs must hold an address, got none: for a node that does not listen use client_mode=True"
        )
    return parsed


def parse_announced_addresses(addresses: object) -> tuple[Multiaddr, ...]:
    """``announce_maddrs``: others have to be able to dial them."""
    parsed = parse_addresses("announce_maddrs", addresses, depth=2)
    if len(parsed) > MAX_ANNOUNCED:
        raise InvalidValueError(
            f"announce_maddrs must be at most {MAX_ANNOUNCED} addresses, got {len(parsed)}"
        )
    for address in parsed:
        if address.port == 0 or address.is_unspecified:
            raise InvalidValueError(
                f"announce_maddrs must hold real hosts and ports, got {address}, which nobody can dial"
            )
    return parsed


def _split(name: str, item: object) -> list[str | Multiaddr]:
    if isinstance(item, Multiaddr):
        return [item]
    if _is_multiaddr(item):
        return [str(item)]
    if not isinstance(item, str):
        raise InvalidTypeError(f"{name} must hold addresses as str or Multiaddr, got {item!r}")
    return [text for text in _BETWEEN.split(item) if text]


def _is_multiaddr(item: object) -> bool:
    """Whether it is an address of Shoal, or of the package ``multiaddr`` that hivemind uses."""
    return isinstance(item, Multiaddr) or type(item).__module__.partition(".")[0] == "multiaddr"


def _nothing_in(name: str, addresses: object) -> str:
    advice = ", or None to begin a new DHT" if name == "initial_peers" else ""
    return f"{addresses!r} holds no address; give a list of addresses{advice}"
