"""Emulated links: bundles of TCP segments are cut as a device would cut them, and pass at a rate, with loss."""

from __future__ import annotations

import random
import struct

import pytest

from benchmarks.network.packets import OFFLOADS, destination, is_ipv4, keep, segments
from benchmarks.network.shaping import Direction

SIZE, IP, TCP = 1448, 20, 32
HEADERS = IP + TCP
FIN, PUSH, ACK, REDUCED = 0x01, 0x08, 0x10, 0x80
SEQUENCE = 2**32 - 1000


def tcp_packet(body: int, flags: int = ACK | PUSH) -> bytes:
    """A packet as the kernel hands it over: checksums of TCP left to the device."""
    ip = struct.pack("!BBHHHBBH4s4s", 0x45, 0, HEADERS + body, 7, 0, 64, 6, 0, b"\x0a\0\0\1", b"\x0a\0\0\2")
    pseudo = pseudo_sum(TCP + body)
    tcp = struct.pack("!HHIIBBHHH", 1000, 2000, SEQUENCE, 5, (TCP // 4) << 4, flags, 500, pseudo, 0) + bytes(
        12
    )
    is_bundle = body > SIZE
    offloads = OFFLOADS.pack(
        1, 1 if is_bundle else 0, HEADERS if is_bundle else 0, SIZE if is_bundle else 0, IP, 16
    )
    return offloads + ip + tcp + bytes(number % 251 for number in range(body))


def fold(total: int) -> int:
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return total


def pseudo_sum(length: int) -> int:
    return fold(0x0A00 + 1 + 0x0A00 + 2 + 6 + length)


def fields(packet: bytes) -> dict[str, int]:
    ip = packet[OFFLOADS.size :]
    total, number = struct.unpack_from("!HH", ip, 2)
    (sequence,) = struct.unpack_from("!I", ip, IP + 4)
    (checksum,) = struct.unpack_from("!H", ip, IP + 16)
    return {
        "total": total,
        "number": number,
        "sequence": sequence,
        "flags": ip[IP + 13],
        "checksum": checksum,
    }


def body_of(packet: bytes) -> bytes:
    return packet[OFFLOADS.size + HEADERS :]


def test_a_bundle_counts_the_headers_of_every_segment():
    one = segments(tcp_packet(3 * SIZE + 1))
    assert one.count == 4
    assert one.wire_bytes == 3 * SIZE + 1 + 4 * (HEADERS + 38)
    assert segments(tcp_packet(100)).count == 1


def test_addresses_are_found_behind_the_header_of_offloads():
    assert is_ipv4(tcp_packet(10))
    assert destination(tcp_packet(10)) == b"\x0a\0\0\2"
    assert not is_ipv4(OFFLOADS.pack(0, 0, 0, 0, 0, 0) + b"\x60" + bytes(40))


def test_a_packet_that_loses_nothing_is_the_same_one():
    packet = tcp_packet(3 * SIZE)
    assert keep(packet, [(0, 3)]) == [packet]
    assert keep(tcp_packet(5), []) == []


@pytest.mark.parametrize("lost", range(5))
def test_what_remains_has_the_bytes_of_its_segments(lost: int):
    packet = tcp_packet(4 * SIZE + 10)
    runs = [(first, last) for first, last in ((0, lost), (lost + 1, 5)) if first < last]
    kept = keep(packet, runs)
    whole = body_of(packet)
    assert [body_of(one) for one in kept] == [whole[first * SIZE : last * SIZE] for first, last in runs]
    for one, (first, _) in zip(kept, runs, strict=True):
        found = fields(one)
        assert found["total"] == HEADERS + len(body_of(one))
        assert found["number"] == 7 + first
        assert found["sequence"] == (SEQUENCE + first * SIZE) % 2**32
        assert found["checksum"] == pseudo_sum(TCP + len(body_of(one)))
        assert fold(sum(struct.unpack_from("!10H", one, OFFLOADS.size))) == 0xFFFF


def test_flags_stay_with_the_segment_that_carries_them():
    first, last = keep(tcp_packet(3 * SIZE, ACK | PUSH | FIN | REDUCED), [(0, 1), (2, 3)])
    assert fields(first)["flags"] == ACK | REDUCED
    assert fields(last)["flags"] == ACK | PUSH | FIN


def test_a_single_segment_is_no_bundle_any_more():
    (single,) = keep(tcp_packet(3 * SIZE), [(1, 2)])
    flags, bundle, headers, size, start, offset = OFFLOADS.unpack_from(single)
    assert (flags, bundle, headers, size, start, offset) == (1, 0, 0, 0, IP, 16)


# one direction of a link

PACKET = tcp_packet(10 * SIZE)
WIRE = segments(PACKET).wire_bytes


def direction(rate: float = 1e6, loss: float = 0.0) -> Direction:
    return Direction(rate, loss, random.Random(1))


def test_packets_leave_one_after_the_other_at_the_rate():
    link = direction()
    ((first, _),) = link.pass_on(PACKET, 5.0)
    ((second, _),) = link.pass_on(PACKET, 5.0)
    assert first == pytest.approx(5.0 + WIRE / 1e6)
    assert second == pytest.approx(5.0 + 2 * WIRE / 1e6)


def test_an_idle_link_sends_at_once():
    link = direction()
    link.pass_on(PACKET, 5.0)
    ((left, _),) = link.pass_on(PACKET, 9.0)
    assert left == pytest.approx(9.0 + WIRE / 1e6)


def test_a_full_queue_drops_the_segments_that_do_not_fit():
    link = direction()
    sent = [part for _ in range(20) for _, part in link.pass_on(PACKET, 0.0)]
    assert sum(segments(part).wire_bytes for part in sent) <= 96_000
    assert link.carried + link.overflowed == 200
    assert link.overflowed > 100


def test_as_many_segments_get_lost_as_the_link_loses():
    link = direction(rate=1e12, loss=0.02)
    carried = sum(segments(part).count for _ in range(5000) for _, part in link.pass_on(PACKET, 0.0))
    assert carried == link.carried == 50_000 - link.lost
    assert link.lost / 50_000 == pytest.approx(0.02, rel=0.15)


def test_the_same_seed_loses_the_same_segments():
    one, other = direction(loss=0.1), direction(loss=0.1)
    assert [one.pass_on(PACKET, now) for now in range(50)] == [
        other.pass_on(PACKET, now) for now in range(50)
    ]
