"""The network interfaces of this machine, as ``getifaddrs(3)`` of the C library tells them."""

from __future__ import annotations

import ctypes
import ipaddress
import socket
import sys
from collections.abc import Iterator

from shoal.p2p.reach.vantage import Interface

_IFF_UP = 0x1
_HAS_LENGTH_BYTE = sys.platform not in ("linux", "android")
"""BSD, and so macOS, has a byte for the length of an address before its family."""


class _Ifaddrs(ctypes.Structure):
    pass


_Ifaddrs._fields_ = [
    ("next", ctypes.POINTER(_Ifaddrs)),
    ("name", ctypes.c_char_p),
    ("flags", ctypes.c_uint),
    ("address", ctypes.c_void_p),
    ("netmask", ctypes.c_void_p),
    ("destination", ctypes.c_void_p),
    ("data", ctypes.c_void_p),
]


def list_interfaces() -> list[Interface]:
    """Every IP address of the interfaces that are up, in the system's order.

    :raises OSError: the system does not tell, as in some sandboxes
    """
    library = ctypes.CDLL(None, use_errno=True)
    library.getifaddrs.argtypes = [ctypes.POINTER(ctypes.POINTER(_Ifaddrs))]
    library.freeifaddrs.argtypes = [ctypes.POINTER(_Ifaddrs)]
    library.freeifaddrs.restype = None
    first = ctypes.POINTER(_Ifaddrs)()
    if library.getifaddrs(ctypes.byref(first)):
        raise OSError(ctypes.get_errno(), "getifaddrs failed")
    try:
        return list(_walk(first))
    finally:
        library.freeifaddrs(first)


def default_route_ips() -> list[str]:
    """The addresses under which this machine's packets leave it by its default routes. Nothing is sent."""
    ips = []
    for family, elsewhere in ((socket.AF_INET, "192.0.2.1"), (socket.AF_INET6, "2001:db8::1")):
        try:
            with socket.socket(family, socket.SOCK_DGRAM) as probe:
                probe.connect((elsewhere, 9))
                ips.append(str(probe.getsockname()[0]).partition("%")[0])
        except OSError:
            continue  # no route, or no such family
    return ips


def _walk(entry: ctypes._Pointer[_Ifaddrs]) -> Iterator[Interface]:
    while bool(entry):  # a null pointer is false
        one = entry.contents
        if one.address and one.flags & _IFF_UP:
            ip = _ip_at(one.address)
            if ip is not None:
                mask = _mask_at(one.netmask, ip)
                yield Interface(one.name.decode(errors="replace"), ip, mask.bit_count())
        entry = one.next


def _ip_at(address: int) -> str | None:
    """The IP address in a ``sockaddr``; None for one of another family."""
    family = ctypes.string_at(address, 2)
    number = family[1] if _HAS_LENGTH_BYTE else int.from_bytes(family, sys.byteorder)
    if number == socket.AF_INET:
        return socket.inet_ntop(socket.AF_INET, ctypes.string_at(address + 4, 4))
    if number == socket.AF_INET6:
        packed = bytearray(ctypes.string_at(address + 8, 16))
        if packed[0] == 0xFE and packed[1] & 0xC0 == 0x80 and _HAS_LENGTH_BYTE:
            packed[2:4] = b"\0\0"  # where BSD keeps the zone of a link-local address
        return str(ipaddress.IPv6Address(bytes(packed)))
    return None


def _mask_at(netmask: int | None, ip: str) -> int:
    """The bits of a netmask. BSD leaves the family of a netmask empty, so that the address decides."""
    size, offset = (16, 8) if ":" in ip else (4, 4)
    if netmask is None:
        return (1 << 8 * size) - 1
    return int.from_bytes(ctypes.string_at(netmask + offset, size))
