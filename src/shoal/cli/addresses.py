"""Addresses as they are given on the command line."""

from __future__ import annotations

import ipaddress

from shoal.errors import InvalidValueError
from shoal.p2p.multiaddr import Multiaddr

MAX_PORT = 65535


def listen_address(host: str, port: int) -> Multiaddr:
    """Where to listen: on ``port`` (0: any free one) of the network interface with the IP address ``host``.

    :raises InvalidValueError: ``host`` is no IP address, or ``port`` is out of range
    """
    try:
        version = ipaddress.ip_address(host).version
    except ValueError:
        raise InvalidValueError(
            f"--host must be an IP address, got {host}: 127.0.0.1 for this machine, 0.0.0.0 for every interface"
        ) from None
    if not 0 <= port <= MAX_PORT:
        raise InvalidValueError(f"--port must be 0 (any free port) to {MAX_PORT}, got {port}")
    return Multiaddr(f"ip{version}", host, port)


def complete_address(option: str, text: str) -> Multiaddr:
    """An address that says who is expected there.

    :raises InvalidValueError: it is malformed or does not end in a PeerID
    """
    try:
        address = Multiaddr.parse(text)
    except InvalidValueError as error:
        raise InvalidValueError(f"{option}: {error}") from None
    if address.peer_id is None:
        raise InvalidValueError(f"{option} must end in /p2p/PEERID, got {text}")
    return address
