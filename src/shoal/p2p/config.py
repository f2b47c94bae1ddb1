"""The settings of a :class:`~shoal.p2p.host.Host`, in one frozen dataclass that is validated where it is made."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

from shoal.errors import InvalidValueError
from shoal.p2p.multiaddr import Multiaddr
from shoal.utils.checks import Count, Number, Text
from shoal.utils.options import check_options

KIB = 1024
MIB = 1024 * KIB

MAX_ANNOUNCED = 16
"""Addresses of a peer that others accept. Part of the wire protocol."""

INITIAL_WINDOW = 256 * KIB
"""The credit that each side of every stream starts with, in bytes. Part of the wire protocol: both sides know it."""

MAX_MESSAGE = 1 * MIB
"""The longest body of a message. Part of the wire protocol."""

_ONE_MESSAGE = "one message may have as many"

MAX_AGENT = 64
"""Characters of the program's name that peers accept. Part of the wire protocol."""

MAX_STRIPES = 255
"""Lanes for pieces to one peer. Part of the wire protocol."""

LANES_BESIDE_BULK = 2
"""Control connections to one peer: both sides may have dialed at once."""


def _check_agent(name: str, text: str) -> None:
    if len(text) > MAX_AGENT:
        raise InvalidValueError(f"{name} must be {AGENT.allowed}, got {text!r}")


AGENT = Text(f"at most {MAX_AGENT} characters", _check_agent)

CONGESTION_CONTROL = "bbr"
MAX_LANES = 64


def _check_congestion_control(name: str, text: str) -> None:
    if len(text) > 15 or not text.isascii() or not (text.isprintable() or not text):
        raise InvalidValueError(f"{name} must be {CongestionControl.allowed}, got {text!r}")


CongestionControl = Text("the name of an algorithm of the system, or empty", _check_congestion_control)

Seconds = Annotated[float, Number(minimum=0, unit="s")]
Limit = Annotated[int, Count(1)]
Rate = Annotated[float | None, Number(above=0, unit="bytes/s")]


@dataclass(frozen=True)
class HostConfig:
    """Times are in seconds, sizes in bytes."""

    client_mode: bool = False
    """Never listens and announces nothing; is called over the connections that it opens."""
    announce: Sequence[Multiaddr] = ()
    """What other peers are told instead of the addresses that the host listens on; at most 16."""
    agent: Annotated[str, AGENT] = "shoal"
    """Free text that names the program to other peers, at most 64 characters."""

    dial_timeout: Seconds = 10.0
    """For one address: connecting, handshake and HELLO."""
    dial_stagger: Seconds = 0.25
    """How long one address is tried before the next is tried beside it."""
    handshake_timeout: Seconds = 10.0
    """How long an incoming connection may take to prove who it is."""
    close_timeout: Seconds = 1.0
    """How long a closing connection may take to hand over what it still has to send."""

    bulk_lanes: Limit = 1
    """How many connections for the streams of bulk data are opened to one peer."""
    max_lanes: Limit = MAX_LANES
    """How many lanes for pieces of payloads this host dials, to all peers together. How many there are follows what was
    measured on each path."""
    lanes_per_peer: Annotated[int, Count(0)] = 0
    """So many to each peer, whatever was measured, as far as ``max_lanes`` allows; 0: as many as each path needs."""
    max_connections: Limit = 512
    """Of both directions. Incoming ones over this are refused, unless one that is not used, and whose peer can be
    dialed again, can be closed in their favour. For what the host dials itself, any unused one is closed. Half of
    what operating systems let a process open by default."""
    max_connections_per_ip: Limit = 384
    """Of these, incoming ones from one IP address (IPv6: one /64): many peers may share that of a router, but the
    rest stays for others. This machine's own addresses have no such limit."""
    max_upload_rate: Rate = None
    """Bytes of bulk data a second that are sent to all peers together; None: no limit."""
    max_download_rate: Rate = None
    """The same of what is received."""
    congestion_control: Annotated[str, CongestionControl] = CONGESTION_CONTROL
    """Of connections that carry bulk data over long paths, where the system lets this process choose; empty: as the
    system has it."""
    max_connections_per_peer: Annotated[int, Count(1 + LANES_BESIDE_BULK)] = 80
    """Of these, those to one peer, bulk lanes included; the one unused for longest makes room for a new one."""
    max_handshakes: Limit = 256
    """Incoming connections, beyond ``max_connections``, that may be proving who they are."""
    max_handshakes_per_ip: Limit = 64
    """Of these, those from one IP address, as above: a swarm behind one router that starts at once is still let in."""
    idle_timeout: Seconds = 600.0
    """An unused control connection is closed after this, if its peer can be dialed again."""
    idle_lane_timeout: Seconds = 60.0
    """An unused bulk lane is closed after this."""
    max_inbound_streams: Limit = 256
    """Calls and streams that one connection serves at a time; more are refused as ``busy``."""
    max_unread: Annotated[int, Count(MAX_MESSAGE, unit="bytes", reason=_ONE_MESSAGE)] = 8 * MIB
    """Bytes that the streams opened by the peer of one connection may make this side hold: messages that no handler
    has taken, requests being answered, and payloads that no handler has asked for. More is refused as ``busy``."""
    max_stream_timeout: Seconds = 86400.0
    """A longer deadline than this is cut to it; a stream opened without one has none."""

    max_known_peers: Annotated[int, Count(0)] = 4096
    max_addresses_per_peer: Limit = 16

    probe_after: Seconds = 1.5
    """Silence on a connection in use after which its peer is asked for a sign of life, where the round-trip time is
    short."""
    max_probe_after: Seconds = 2.0
    """The same at most: it follows the round-trip time."""
    idle_probe_after: Seconds = 30.0
    """The same on a connection that nothing waits for."""
    min_answer_time: Seconds = 3.0
    """How long a peer may take for a sign of life at least, where the round-trip time is short."""
    max_answer_time: Seconds = 13.0
    """How long a peer may take for a sign of life at most."""

    clock_difference: Seconds = 1.0
    """Seconds by which a peer's clock has to differ for ``Host.on_clock_difference`` to tell."""

    def __post_init__(self) -> None:
        check_options(self)
        most = self.max_connections_per_peer - LANES_BESIDE_BULK
        if self.bulk_lanes > most:
            raise InvalidValueError(
                f"bulk_lanes must be at most {most}, with max_connections_per_peer={self.max_connections_per_peer}, "
                f"got {self.bulk_lanes}"
            )
        if len(self.announce) > MAX_ANNOUNCED:
            raise InvalidValueError(
                f"announce must be at most {MAX_ANNOUNCED} addresses, got {len(self.announce)}"
            )
        object.__setattr__(self, "announce", tuple(address.without_peer_id() for address in self.announce))
