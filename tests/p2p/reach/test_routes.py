"""The routes to a peer, from its addresses."""

from __future__ import annotations

from shoal.p2p.multiaddr import Multiaddr
from shoal.p2p.reach.routes import Route, RouteKind, routes

DIRECT = Multiaddr("/ip4/10.0.0.1/tcp/1")
QUIC = Multiaddr("/ip4/10.0.0.1/udp/1/quic-v1")
RELAYED = Multiaddr("/ip4/10.0.0.2/tcp/1/p2p/QmRelay/p2p-circuit")


def test_the_kind_of_a_route_is_told_by_its_address() -> None:
    assert Route.of(DIRECT).kind is RouteKind.DIRECT
    assert Route.of(RELAYED).kind is RouteKind.RELAYED
    assert Route.of(QUIC).kind is RouteKind.FOREIGN


def test_a_route_says_why_it_cannot_be_taken() -> None:
    assert Route.of(DIRECT).obstacle == ""
    assert "Shoal has no relays" in Route.of(RELAYED).obstacle
    assert "'quic-v1'" in Route.of(QUIC).obstacle


def test_routes_that_can_be_taken_come_first() -> None:
    other = Multiaddr("/ip4/10.0.0.3/tcp/1")
    assert [route.address for route in routes([QUIC, DIRECT, RELAYED, other])] == [
        DIRECT,
        other,
        QUIC,
        RELAYED,
    ]
