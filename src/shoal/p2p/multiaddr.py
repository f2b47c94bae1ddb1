"""Addresses of peers: ``/ip4|ip6|dns|dns4|dns6/HOST/tcp/PORT[/p2p/PEERID]``, parsed and printed.

Pure: resolves no names and opens no sockets.
"""

from __future__ import annotations

import functools
import ipaddress
import re
from dataclasses import dataclass, replace
from typing import overload

from shoal.errors import InvalidTypeError, InvalidValueError
from shoal.p2p.identity import PeerID

PROTOCOLS = ("ip4", "ip6", "dns", "dns4", "dns6")
"""Names of ``dns`` lead to IPv4 and IPv6 addresses, the others to those of one family; resolved at each dial."""
FORM = "/ip4|ip6|dns|dns4|dns6/HOST/tcp/PORT[/p2p/PEERID]"
# The longest host name has 253 characters; around it is room for the rest.
MAX_TEXT_CHARACTERS = 400
_DNS_LABEL = re.compile(r"[a-z0-9_]([a-z0-9_-]{0,61}[a-z0-9_])?")


_OTHER_PROTOCOLS = {
    "p2p-circuit": "Shoal has no relays",
    "dnsaddr": "Shoal reads no TXT records: give the addresses that they hold",
    "unix": "Shoal has no sockets of files",
} | dict.fromkeys(
    (
        "udp", "quic", "quic-v1", "ws", "wss", "tls", "noise", "http", "https", "webtransport", "webrtc",
        "webrtc-direct", "p2p-webrtc-star", "p2p-webrtc-direct", "p2p-websocket-star", "p2p-stardust", "certhash",
        "sni", "utp", "udt", "sctp", "dccp", "onion", "onion3", "garlic32", "garlic64", "memory",
    ),
    "Shoal speaks its own protocol over TCP alone",
)  # fmt: skip
"""Pieces of multiaddrs of libp2p that Shoal cannot use, with the reason."""


class UnsupportedAddress(InvalidValueError):
    """A multiaddr that makes sense, but not to Shoal."""


@functools.total_ordering
@dataclass(frozen=True, init=False)
class Multiaddr:
    """Where a peer listens and, if ``peer_id`` is given, who is expected there.

    Made by ``Multiaddr(text)`` or ``Multiaddr(protocol, host, port, peer_id)``.

    Validated where it is made, with :class:`InvalidValueError`; hosts are kept in their canonical form
    (compressed IPv6, lower-case names), so that equal addresses compare equal. Ordered by protocol, host,
    port and PeerID.
    """

    protocol: str
    host: str
    port: int
    peer_id: str | None = None

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
            given = Multiaddr.parse(text)
            protocol, host, port, peer_id = given.protocol, given.host, given.port, given.peer_id
        if protocol not in PROTOCOLS:
            raise InvalidValueError(f"protocol: {protocol!r} is not one of {', '.join(PROTOCOLS)}")
        if type(port) is not int:  # a bool is none
            raise InvalidTypeError(f"port: must be an int, not {type(port).__name__}")
        if not 0 <= port <= 65535:
            raise InvalidValueError(f"port: {port} is not between 0 and 65535")
        if peer_id is not None:
            PeerID.from_base58(peer_id)
        values = {
            "protocol": protocol,
            "host": _canonical_host(protocol, host),
            "port": port,
            "peer_id": peer_id,
        }
        for name, value in values.items():
            object.__setattr__(self, name, value)

    @classmethod
    def parse(cls, text: str | Multiaddr) -> Multiaddr:
        """The address printed as ``text``; :class:`InvalidValueError` shows the piece that is wrong."""
        if isinstance(text, Multiaddr):
            return text
        if not isinstance(text, str):
            raise InvalidTypeError(f"address: must be a str or Multiaddr, not {type(text).__name__}")
        if len(text) > MAX_TEXT_CHARACTERS:
            raise InvalidValueError(
                f"address: {text[:60]!r}... has {len(text)} characters; "
                f"at most {MAX_TEXT_CHARACTERS} are allowed"
            )
        try:
            return cls._parse_pieces(text.split("/"))
        except InvalidValueError as error:
            for piece in reversed(text.split("/")):
                if piece in _OTHER_PROTOCOLS:
                    reason = f"{piece!r} cannot be used, {_OTHER_PROTOCOLS[piece]}"
                    raise UnsupportedAddress(f"address {text!r}: {reason}") from None
            raise InvalidValueError(f"address {text!r}: {error}; the form is {FORM}") from None

    @classmethod
    def _parse_pieces(cls, pieces: list[str]) -> Multiaddr:
        if pieces[0]:
            raise InvalidValueError(f"it begins with {pieces[0]!r}, not with '/'")
        if len(pieces) > 3 and pieces[3] != "tcp":
            raise InvalidValueError(f"the transport is {pieces[3]!r}, only 'tcp' is supported")
        if len(pieces) > 5 and pieces[5] != "p2p":
            raise InvalidValueError(f"{pieces[5]!r} follows the port, where only 'p2p' may")
        if len(pieces) not in (5, 7):
            raise InvalidValueError(f"it has {len(pieces) - 1} pieces, not 4 or 6")
        if not (pieces[4].isascii() and pieces[4].isdigit() and len(pieces[4]) <= 5):
            raise InvalidValueError(f"port: {pieces[4]!r} is not a number between 0 and 65535")
        return cls(pieces[1], pieces[2], int(pieces[4]), pieces[6] if len(pieces) == 7 else None)

    def with_peer_id(self, peer_id: PeerID) -> Multiaddr:
        """This address with ``/p2p/PEERID``."""
        return replace(self, peer_id=peer_id.to_base58())

    def without_peer_id(self) -> Multiaddr:
        """This address without ``/p2p/PEERID``."""
        return self if self.peer_id is None else replace(self, peer_id=None)

    def with_port(self, port: int) -> Multiaddr:
        """This address with another port."""
        return replace(self, port=port)

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
        return (self.protocol, self.host, self.port, self.peer_id or "")

    def __lt__(self, other: object) -> bool:
        return self._sort_key() < other._sort_key() if isinstance(other, Multiaddr) else NotImplemented

    def __repr__(self) -> str:
        return f"<Multiaddr {self}>"

    def __str__(self) -> str:
        text = f"/{self.protocol}/{self.host}/tcp/{self.port}"
        return text if self.peer_id is None else f"{text}/p2p/{self.peer_id}"


def _canonical_host(protocol: str, host: str | None) -> str:
    """The one spelling of ``host`` that is kept; :class:`InvalidValueError` if ``protocol`` has no such."""
    if not isinstance(host, str):
        raise InvalidTypeError(f"host: must be a str, not {type(host).__name__}")
    if protocol in ("ip4", "ip6"):
        return _canonical_ip(protocol, host)
    name = host.lower()
    labels = name.split(".")
    if len(name) > 253 or not all(_DNS_LABEL.fullmatch(label) for label in labels):
        raise InvalidValueError(f"host: {host!r} is not a host name")
    if labels[-1].isdigit():
        raise InvalidValueError(f"host: {host!r} is not a host name; IP addresses go with /ip4 or /ip6")
    return name


def _canonical_ip(protocol: str, host: str) -> str:
    try:
        if protocol == "ip4":
            return str(ipaddress.IPv4Address(host))
        address = ipaddress.IPv6Address(host)
    except ValueError:
        version = "IPv4" if protocol == "ip4" else "IPv6"
        raise InvalidValueError(f"host: {host!r} is not an {version} address") from None
    if address.scope_id is not None:
        raise InvalidValueError(f"host: {host!r} has a zone, which means nothing to other machines")
    return str(address)
