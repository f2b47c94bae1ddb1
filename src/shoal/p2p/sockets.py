"""What a transport's socket tells: addresses, and how much of what was written the peer's machine has not taken."""

from __future__ import annotations

import asyncio
import fcntl
import ipaddress
import struct
import sys
import termios
from typing import Any


def unsent_bytes(transport: asyncio.Transport) -> int:
    """What the peer's machine has not taken yet: in the transport's buffer, and in the kernel's where it tells."""
    count = transport.get_write_buffer_size()
    sock = transport.get_extra_info("socket")
    if sock is not None and sys.platform == "linux":
        try:
            (queued,) = struct.unpack("i", fcntl.ioctl(sock.fileno(), termios.TIOCOUTQ, bytes(4)))
        except OSError:  # the socket is being closed
            return count
        count += queued
    return count


def origin_of(ip: str | None, own: str | None) -> str | None:
    """What one party is likely to hold all of: an IPv4 address, or the /64 of an IPv6 address.

    None for a process of this machine, which has the address ``own`` on that connection.
    """
    if ip is None or ip == own:
        return None
    address = ipaddress.ip_address(ip)
    if address.is_loopback:
        return None
    if isinstance(address, ipaddress.IPv6Address):
        return str(ipaddress.IPv6Network((int(address) >> 64 << 64, 64)))
    return ip


def ip_of(name: Any) -> str | None:
    """The IP address in a socket's name, in canonical form."""
    if not isinstance(name, tuple) or not name:
        return None
    try:
        address = ipaddress.ip_address(str(name[0]).partition("%")[0])
    except ValueError:
        return None
    if isinstance(address, ipaddress.IPv6Address) and address.ipv4_mapped is not None:
        return str(address.ipv4_mapped)
    return str(address)
