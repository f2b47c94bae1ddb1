"""What the kernel knows of a TCP connection, and what it is told of one; Linux only, nothing elsewhere."""

from __future__ import annotations

import socket
import struct
import sys
from typing import Any, NamedTuple

_TCP_INFO = 11
_TCP_CONGESTION = 13
_TCP_NOTSENT_LOWAT = 25
_SO_MAX_PACING_RATE = 47
_HIGHEST_PACE = 2**32 - 2
"""Bytes a second, in 32 bits, which older kernels read, too. One more would mean: without pacing."""
_RETRANSMITS = 2
"""Its place among the first eight bytes: time-outs in a row. The back-off beside it counts questions to a peer that has
closed its window, too, which answers them.
"""
_RTO, _MSS, _LAST_ACK, _RTT, _SSTHRESH, _CWND, _TOTAL_RETRANS = 0, 2, 12, 15, 17, 18, 23
"""Places among the 32-bit numbers behind them."""
_UNKNOWN = 2**32 - 1
_WORDS = struct.Struct("=8x24I")
_LATER = struct.Struct("=4Q2I4IQ")
"""Pacing rates, bytes, segments, then the smallest round-trip time and the segments with data."""


class TcpInfo(NamedTuple):
    """Of one connection since it was made; times in seconds, 0 until measured."""

    rtt: float
    min_rtt: float
    segments_sent: int
    """Those with data."""
    retransmitted: int
    """Segments."""
    delivered: int
    """Bytes that the peer's machine has confirmed."""
    window: int = 0
    """Bytes that it may have on the way."""
    threshold: int = 0
    """Bytes up to which the window doubles with each round trip."""
    timeout: float = 0.0
    """After so long without an answer it sends again; longer after each time-out."""
    timeouts: int = 0
    """How many there were in a row."""
    silence: float = 0.0
    """How long ago the peer's machine last confirmed anything."""


def read(transport: Any) -> TcpInfo | None:
    """What the kernel knows now; None if it does not tell."""
    sock = _socket_of(transport)
    if sock is None:
        return None
    try:
        raw = sock.getsockopt(socket.IPPROTO_TCP, _TCP_INFO, 256)
    except OSError:
        return None
    if len(raw) < _WORDS.size + _LATER.size:
        return None
    words = _WORDS.unpack_from(raw)
    later = _LATER.unpack_from(raw, _WORDS.size)
    return TcpInfo(
        rtt=words[_RTT] / 1e6,
        min_rtt=0.0 if later[7] == _UNKNOWN else later[7] / 1e6,
        segments_sent=later[9],
        retransmitted=words[_TOTAL_RETRANS],
        delivered=later[2],
        window=words[_CWND] * words[_MSS],
        threshold=words[_SSTHRESH] * words[_MSS],
        timeout=words[_RTO] / 1e6,
        timeouts=raw[_RETRANSMITS],
        silence=words[_LAST_ACK] / 1e3,
    )


def congestion_control(transport: Any) -> str:
    """The algorithm's name; empty if the kernel does not tell."""
    sock = _socket_of(transport)
    if sock is None:
        return ""
    try:
        name: bytes = sock.getsockopt(socket.IPPROTO_TCP, _TCP_CONGESTION, 16)
    except OSError:
        return ""
    return name.split(b"\0")[0].decode()


def choose_congestion_control(transport: Any, name: str) -> None:
    """Use this algorithm if the kernel has it, and lets this process choose."""
    if name and name != congestion_control(transport):
        _set(transport, _TCP_CONGESTION, name.encode())


def keep_little_unsent(transport: Any, nbytes: int) -> None:
    """Let the kernel hold no more than this of what it could not send yet."""
    _set(transport, _TCP_NOTSENT_LOWAT, nbytes)


def enable_pacing(transport: Any) -> None:
    """From now on send what the window allows piece by piece, in at most a round-trip time. Congestion controls that do
    not pace themselves send it in bursts else.
    """
    pace = _HIGHEST_PACE.to_bytes(4, sys.byteorder)
    _set(transport, _SO_MAX_PACING_RATE, pace, level=socket.SOL_SOCKET)


def _set(transport: Any, option: int, value: int | bytes, *, level: int = socket.IPPROTO_TCP) -> None:
    sock = _socket_of(transport)
    if sock is not None:
        try:
            sock.setsockopt(level, option, value)
        except OSError:
            return  # not allowed, or not there: it stays as it is


def _socket_of(transport: Any) -> Any:
    return transport.get_extra_info("socket") if sys.platform == "linux" and transport is not None else None
