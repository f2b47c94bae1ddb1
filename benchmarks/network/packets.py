"""Packets as a TUN device with ``IFF_VNET_HDR`` hands them over: a header on offloads, then IPv4. Pure.

A sender's kernel hands many TCP segments over as one packet and leaves it to the device to cut it (TSO). Links lose
single segments, so :func:`keep` cuts a packet into those that remain.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass

OFFLOADS = struct.Struct("<BBHHHH")
"""virtio_net_hdr: flags, kind of bundle, length of headers, segment size, where checksums begin and stand."""
FRAME = 38
"""Bytes that Ethernet adds to a segment: header, check sum, preamble and gap."""
IPV4 = 4
TCP = 6
FIN_AND_PUSH, WINDOW_REDUCED = 0x09, 0x80


@dataclass(frozen=True)
class Segments:
    """How a packet would go over a wire."""

    count: int
    wire_bytes: int


def is_ipv4(packet: bytes) -> bool:
    return len(packet) >= OFFLOADS.size + 20 and packet[OFFLOADS.size] >> 4 == IPV4


def destination(packet: bytes) -> bytes:
    """The address of an IPv4 packet, four bytes."""
    return packet[OFFLOADS.size + 16 : OFFLOADS.size + 20]


def segments(packet: bytes) -> Segments:
    """Into how many segments the packet is cut, and the bytes that these take on an Ethernet wire."""
    _, bundle, _, size, checksum_start, _ = OFFLOADS.unpack_from(packet)
    length = len(packet) - OFFLOADS.size
    if not bundle:
        return Segments(1, length + FRAME)
    headers = _headers(packet, checksum_start)
    count = max(1, -(-(length - headers) // size))
    return Segments(count, length + (count - 1) * headers + count * FRAME)


def keep(packet: bytes, runs: Sequence[tuple[int, int]]) -> list[bytes]:
    """New packets of these runs of the packet's segments, each from the first to before the last.

    :param packet: IPv4 and TCP, if it has more than one segment
    """
    count = segments(packet).count
    if list(runs) == [(0, count)]:
        return [packet]
    if count == 1:
        return []
    return [_run(packet, first, last, count) for first, last in runs]


def _run(packet: bytes, first: int, last: int, count: int) -> bytes:
    flags, bundle, _, size, checksum_start, checksum_offset = OFFLOADS.unpack_from(packet)
    headers = _headers(packet, checksum_start)
    whole = packet[OFFLOADS.size :]
    body = whole[headers + first * size : headers + last * size]
    head = bytearray(whole[:headers])
    _adapt_ip(head, len(body), first)
    _adapt_tcp(head, checksum_start, first * size, is_first=first == 0, is_last=last == count)
    _adapt_checksum(head, checksum_start, checksum_offset, len(whole), headers + len(body))
    is_bundle = last - first > 1
    offloads = OFFLOADS.pack(
        flags,
        bundle if is_bundle else 0,
        headers if is_bundle else 0,
        size if is_bundle else 0,
        checksum_start,
        checksum_offset,
    )
    return offloads + bytes(head) + body


def _headers(packet: bytes, tcp_at: int) -> int:
    """The length of the IP and TCP headers."""
    return int(tcp_at + 4 * (packet[OFFLOADS.size + tcp_at + 12] >> 4))


def _adapt_ip(head: bytearray, body: int, first: int) -> None:
    """Total length, identification (which the kernel counts up in a bundle) and the header's checksum."""
    (identification,) = struct.unpack_from("!H", head, 4)
    struct.pack_into("!HH", head, 2, len(head) + body, (identification + first) & 0xFFFF)
    length = 4 * (head[0] & 15)
    struct.pack_into("!H", head, 10, 0)
    struct.pack_into("!H", head, 10, ~_fold(sum(struct.unpack_from(f"!{length // 2}H", head))) & 0xFFFF)


def _adapt_tcp(head: bytearray, tcp_at: int, skipped: int, *, is_first: bool, is_last: bool) -> None:
    """The sequence number, and the flags that only the first or the last segment of a bundle carries."""
    (sequence,) = struct.unpack_from("!I", head, tcp_at + 4)
    struct.pack_into("!I", head, tcp_at + 4, (sequence + skipped) & 0xFFFFFFFF)
    if not is_last:
        head[tcp_at + 13] &= ~FIN_AND_PUSH & 0xFF
    if not is_first:
        head[tcp_at + 13] &= ~WINDOW_REDUCED & 0xFF


def _adapt_checksum(head: bytearray, tcp_at: int, offset: int, was: int, now: int) -> None:
    """TCP's checksum, which is that of the pseudo header only: the receiver's kernel takes the rest as right."""
    (checksum,) = struct.unpack_from("!H", head, tcp_at + offset)
    struct.pack_into(
        "!H", head, tcp_at + offset, _fold(checksum + (now - tcp_at) + (~(was - tcp_at) & 0xFFFF))
    )


def _fold(total: int) -> int:
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return total
