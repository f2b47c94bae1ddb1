"""Addresses of peers: lists of components, parsed and printed. Pure: resolves no names and opens no sockets.

Shoal dials ``/ip4|ip6|dns|dns4|dns6/HOST/tcp/PORT[/p2p/PEERID]``. Other addresses of libp2p (relays, QUIC, WebSocket)
are kept, printed and passed on as they are: whether one can be dialed is a question to it, :attr:`Multiaddr.unspoken`.
"""

from __future__ import annotations

import functools
import ipaddress
import re
from dataclasses import dataclass
from typing import overload

from shoal.errors import InvalidTypeError, InvalidValueError
from shoal.p2p.identity import PeerID

PROTOCOLS = ("ip4", "ip6", "dns", "dns4", "dns6")
"""Names of ``dns`` lead to IPv4 and IPv6 addresses, the others to those of one family; resolved at each dial."""
FORM = "/ip4|ip6|dns|dns4|dns6/HOST/tcp/PORT[/p2p/PEERID]"
# The longest host name has 253 characters; around it is room for the rest.
MAX_TEXT_CHARACTERS = 400
_DNS_LABEL = re.compile(r"[a-z0-9_]([a-z0-9_-]{0,61}[a-z0-9_])?")


_TCP_ALONE = "Shoal speaks its own protocol over TCP alone"
_UNSPOKEN = {
    "p2p-circuit": "Shoal has no relays",
    "dnsaddr": "Shoal reads no TXT records: give the addresses that they hold",
    "unix": "Shoal has no sockets of files",
} | dict.fromkeys(
    (
        "udp", "quic", "quic-v1", "ws", "wss", "tls", "noise", "http", "https", "webtransport", "webrtc",
        "webrtc-direct", "p2p-webrtc-star", "p2p-webrtc-direct", "p2p-websocket-star", "p2p-stardust", "certhash",
        "sni", "utp", "udt", "sctp", "dccp", "onion", "onion3", "garlic32", "garlic64", "memory",
    ),
    _TCP_ALONE,
)  # fmt: skip
"""Components of libp2p's addresses that Shoal cannot use, with the reason."""
_SPOKEN = (*PROTOCOLS, "tcp", "p2p")
_WITH_VALUE = frozenset((
    *_SPOKEN, "dnsaddr", "unix", "udp", "certhash", "sni", "sctp", "dccp", "onion", "onion3", "garlic32", "garlic64",
    "memory",
))  # fmt: skip
_VALUE = re.compile(r"[!-.0-~]+")
_FOREIGN_PEER = re.compile(r"[A-Za-z0-9]{1,128}")

Component = tuple[str, str | None]
"""A protocol with its value; None for a protocol that has none."""


@functools.total_ordering
@dataclass(frozen=True, init=False)
class Multiaddr:
    """Where a peer listens and, if ``peer_id`` is given, who is expected there.

    Made by ``Multiaddr(text)`` or ``Multiaddr(protocol, host, port, peer_id)``.

    Validated where it is made, with :class:`InvalidValueError`; hosts are kept in their canonical form
    (compressed IPv6, lower-case names), so that equal addresses compare equal. Ordered by protocol, host,
    port and PeerID.
    """

    components: tuple[Component, ...]

    @overload
    def __init__(self, protocol: str | Multiaddr) -> None: ...
    @overload
    def __init__(self, protocol: str, host: str, port: int, peer_id: str | None = None) -> None: ...

    def __init__(
        self,
        protocol: str | Multiaddr,
        host: str | None = None,
        port: int | None = None,
        peer_id: str | None = None,
    ) -> None:
        if host is None and port is None and peer_id is None:
            text = protocol.strip() if isinstance(protocol, str) else protocol
            components = Multiaddr.parse(text).components
        else:
            components = _direct(protocol, host, port, peer_id)
        object.__setattr__(self, "components", components)

    @classmethod
    def _of(cls, components: tuple[Component, ...]) -> Multiaddr:
        made = object.__new__(cls)
        object.__setattr__(made, "components", components)
        return made

    @classmethod
    def parse(cls, text: str | Multiaddr) -> Multiaddr:
        """The address printed as ``text``; :class:`InvalidValueError` shows the piece that is wrong."""
        if isinstance(text, Multiaddr):
            return text
        if not isinstance(text, str):
            raise InvalidTypeError(f"address must be a str or Multiaddr, got {text!r}")
        if len(text) > MAX_TEXT_CHARACTERS:
            raise InvalidValueError(
                f"address must be at most {MAX_TEXT_CHARACTERS} characters, got {len(text)}: {text[:60]!r}..."
            )
        pieces = text.split("/")
        try:
            return cls._of(_parse_direct(pieces))
        except InvalidValueError as error:
            components = _parse_unspoken(pieces)
            if components is not None:
                return cls._of(components)
            raise InvalidValueError(f"address must be of the form {FORM}, got {text!r}: {error}") from None

    @property
    def protocol(self) -> str:
        """The first component's protocol, of an address that Shoal speaks one of :data:`PROTOCOLS`."""
        return self.components[0][0]

    @property
    def host(self) -> str:
        """The IP address or name; empty if the address does not begin with one."""
        return self.components[0][1] or ""

    @property
    def port(self) -> int:
        """The port of TCP or UDP; 0 also if there is none."""
        protocol, value = self.components[1] if len(self.components) > 1 else ("", None)
        return int(value) if protocol in ("tcp", "udp") and value is not None else 0

    @property
    def peer_id(self) -> str | None:
        """The peer that is expected there, if the address names one at its end."""
        protocol, value = self.components[-1]
        return value if protocol == "p2p" else None

    @property
    def unspoken(self) -> str:
        """Why Shoal cannot dial such an address; empty if it can."""
        for protocol, _ in reversed(self.components):
            if protocol in _UNSPOKEN:
                return f"{protocol!r} cannot be used, {_UNSPOKEN[protocol]}"
        return ""

    def has(self, protocol: str) -> bool:
        """Whether one of its components is of this protocol."""
        return any(one == protocol for one, _ in self.components)

    def with_peer_id(self, peer_id: PeerID) -> Multiaddr:
        """This address with ``/p2p/PEERID``."""
        return self._of((*self.without_peer_id().components, ("p2p", peer_id.to_base58())))

    def without_peer_id(self) -> Multiaddr:
        """This address without ``/p2p/PEERID``."""
        return self if self.peer_id is None else self._of(self.components[:-1])

    def with_port(self, port: int) -> Multiaddr:
        """This address with another port."""
        return Multiaddr(self.protocol, self.host, port, self.peer_id)

    @property
    def is_loopback(self) -> bool:
        """Whether it leads to the machine that uses it: a loopback IP address, or the name ``localhost``."""
        address = self._ip_address()
        return self.host == "localhost" if address is None else address.is_loopback

    @property
    def is_unspecified(self) -> bool:
        """Whether it is "all interfaces" (0.0.0.0, ::): can be listened on, not dialed or announced."""
        address = self._ip_address()
        return address is not None and address.is_unspecified

    def _ip_address(self) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
        if self.protocol == "ip4":
            return ipaddress.IPv4Address(self.host)
        if self.protocol == "ip6":
            address = ipaddress.IPv6Address(self.host)
            return address.ipv4_mapped or address
        return None

    def _sort_key(self) -> tuple[str, str, int, str]:
        return (self.protocol, self.host, self.port, "" if self.unspoken else self.peer_id or "")

    def __lt__(self, other: object) -> bool:
        if not isinstance(other, Multiaddr):
            return NotImplemented
        return (*self._sort_key(), str(self)) < (*other._sort_key(), str(other))

    def __repr__(self) -> str:
        return f"<Multiaddr {self}>"

    def __str__(self) -> str:
        return "".join(
            f"/{protocol}" if value is None else f"/{protocol}/{value}" for protocol, value in self.components
        )


def _direct(protocol: object, host: object, port: object, peer_id: str | None) -> tuple[Component, ...]:
    """The components of an address that Shoal dials."""
    if protocol not in PROTOCOLS:
        raise InvalidValueError(f"protocol must be one of {', '.join(PROTOCOLS)}, got {protocol!r}")
    if type(port) is not int:  # a bool is none
        raise InvalidTypeError(f"port must be an int, got {port!r}")
    if not 0 <= port <= 65535:
        raise InvalidValueError(f"port must be 0 to 65535, got {port}")
    place = ((str(protocol), _canonical_host(str(protocol), host)), ("tcp", str(port)))
    if peer_id is None:
        return place
    PeerID.from_base58(peer_id)
    return (*place, ("p2p", peer_id))


def _parse_direct(pieces: list[str]) -> tuple[Component, ...]:
    if pieces[0]:
        raise InvalidValueError(f"it begins with {pieces[0]!r}, not with '/'")
    if len(pieces) > 3 and pieces[3] != "tcp":
        raise InvalidValueError(f"the transport must be 'tcp', got {pieces[3]!r}")
    if len(pieces) > 5 and pieces[5] != "p2p":
        raise InvalidValueError(f"{pieces[5]!r} follows the port, where only 'p2p' may")
    if len(pieces) not in (5, 7):
        raise InvalidValueError(f"it has {len(pieces) - 1} pieces, not 4 or 6")
    return _direct(pieces[1], pieces[2], _port(pieces[4]), pieces[6] if len(pieces) == 7 else None)


def _parse_unspoken(pieces: list[str]) -> tuple[Component, ...] | None:
    """The components of an address that Shoal does not speak; None if it is none at all."""
    if pieces[0]:
        return None
    components: list[Component] = []
    left = iter(pieces[1:])
    for protocol in left:
        if protocol == "unix":
            components.append((protocol, "/".join(left)))
        elif protocol in _WITH_VALUE:
            components.append((protocol, next(left, "")))
        elif protocol in _UNSPOKEN:
            components.append((protocol, None))
        else:
            return None
    if all(protocol in _SPOKEN for protocol, _ in components):
        return None
    try:
        return tuple((protocol, _canonical_value(protocol, value)) for protocol, value in components)
    except InvalidValueError:
        return None


def _canonical_value(protocol: str, value: str | None) -> str | None:
    if value is None:
        return None
    if protocol in PROTOCOLS:
        return _canonical_host(protocol, value)
    if protocol in ("tcp", "udp"):
        port = _port(value)
        if port <= 65535:
            return str(port)
    elif protocol == "p2p":  # a relay's may be of a kind that Shoal does not have
        if _FOREIGN_PEER.fullmatch(value):
            return value
    elif all(_VALUE.fullmatch(piece) for piece in (value.split("/") if protocol == "unix" else [value])):
        return value
    raise InvalidValueError(f"{protocol}: {value!r} is no value of it")


def _port(text: str) -> int:
    if not (text.isascii() and text.isdigit() and len(text) <= 5):
        raise InvalidValueError(f"port must be a number from 0 to 65535, got {text!r}")
    return int(text)


def _canonical_host(protocol: str, host: object) -> str:
    """The one spelling of ``host`` that is kept; :class:`InvalidValueError` if ``protocol`` has no such."""
    if not isinstance(host, str):
        raise InvalidTypeError(f"host must be a str, got {host!r}")
    if protocol in ("ip4", "ip6"):
        return _canonical_ip(protocol, host)
    name = host.lower()
    labels = name.split(".")
    if len(name) > 253 or not all(_DNS_LABEL.fullmatch(label) for label in labels):
        raise InvalidValueError(f"host must be a host name, got {host!r}")
    if labels[-1].isdigit():
        raise InvalidValueError(f"host must be a host name, got {host!r}: IP addresses go with /ip4 or /ip6")
    return name


def _canonical_ip(protocol: str, host: str) -> str:
    try:
        if protocol == "ip4":
            return str(ipaddress.IPv4Address(host))
        address = ipaddress.IPv6Address(host)
    except ValueError:
        version = "IPv4" if protocol == "ip4" else "IPv6"
        raise InvalidValueError(f"host must be an {version} address, got {host!r}") from None
    if address.scope_id is not None:
        raise InvalidValueError(
            f"host must have no zone, which means nothing to other machines, got {host!r}"
        )
    return str(address)
