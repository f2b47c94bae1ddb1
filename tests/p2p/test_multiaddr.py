"""Addresses: what is accepted, how it is printed, and that a bad one shows its bad piece."""

from __future__ import annotations

import pickle
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shoal.errors import InvalidTypeError, InvalidValueError
from shoal.p2p.identity import Identity
from shoal.p2p.multiaddr import Multiaddr

PEER = Identity.generate(bytes(32)).peer_id


@pytest.mark.parametrize(
    "text",
    [
        "/ip4/127.0.0.1/tcp/0",
        "/ip4/10.1.2.3/tcp/65535",
        "/ip6/::1/tcp/1337",
        "/ip6/2001:db8::5/tcp/80",
        "/dns4/example.org/tcp/443",
        "/dns/example.org/tcp/443",
        "/dns6/a-b.c_d.example/tcp/1",
        f"/ip4/1.2.3.4/tcp/5/p2p/{PEER}",
        f"/dns4/localhost/tcp/5/p2p/{PEER}",
    ],
)
def test_addresses_are_printed_as_they_were_written(text: str) -> None:
    address = Multiaddr.parse(text)
    assert str(address) == text
    assert Multiaddr.parse(str(address)) == address
    assert Multiaddr.parse(address) is address


def test_the_pieces_of_an_address() -> None:
    address = Multiaddr.parse(f"/ip4/1.2.3.4/tcp/5/p2p/{PEER}")
    assert address == Multiaddr("ip4", "1.2.3.4", 5, str(PEER))
    assert address.without_peer_id() == Multiaddr("ip4", "1.2.3.4", 5)
    assert address.without_peer_id().with_peer_id(PEER) == address
    assert address.with_port(7).port == 7


def test_equal_hosts_are_equal_addresses() -> None:
    assert str(Multiaddr.parse("/ip6/2001:DB8:0:0::0:5/tcp/1")) == "/ip6/2001:db8::5/tcp/1"
    assert Multiaddr.parse("/dns4/Example.ORG/tcp/1") == Multiaddr.parse("/dns4/example.org/tcp/1")


def test_addresses_are_ordered() -> None:
    texts = [
        "/dns4/a/tcp/2",
        "/ip4/1.2.3.4/tcp/5",
        f"/ip4/1.2.3.4/tcp/5/p2p/{PEER}",
        "/ip4/1.2.3.4/tcp/6",
        "/ip6/::1/tcp/1",
    ]
    addresses = [Multiaddr.parse(text) for text in reversed(texts)]
    assert [str(address) for address in sorted(addresses)] == texts
    with pytest.raises(TypeError):
        addresses[0] < "/"  # type: ignore[operator]  # noqa: B015


@pytest.mark.parametrize(
    ("text", "piece"),
    [
        ("", "pieces"),
        ("/", "pieces"),
        ("127.0.0.1:80", "127.0.0.1:80"),
        ("x/ip4/1.2.3.4/tcp/5", "begins with 'x'"),
        ("/ip4/1.2.3.4", "pieces"),
        ("/ip4/1.2.3.4/tcp", "pieces"),
        ("/ip4/1.2.3.4/tcp/5/", "follows the port"),
        ("/ip4/1.2.3.4/tcp/5/p2p", "pieces"),
        (f"/ip4/1.2.3.4/tcp/5/p2p/{PEER}/x", "pieces"),
        (f"/ip4/1.2.3.4/tcp/5/ipfs/{PEER}", "'ipfs'"),
        ("/ip5/1.2.3.4/tcp/5", "'ip5'"),
        ("/dnsx/example.org/tcp/5", "'dnsx'"),
        ("/ip4/1.2.3.4/udp/x/quic", "'udp'"),
        ("/ip4/1.2.3/udp/5/quic", "'udp'"),
        ("/ip4/1.2.3.4/udp", "must be 'tcp', got 'udp'"),
        ("/ip4/1.2.3.4/tcp/5/ws/new", "'ws'"),
        ("/ip4/1.2.3.4/tcp/5/p2p/%/p2p-circuit", "pieces"),
        ("/ip4/1.2.3/tcp/5", "'1.2.3'"),
        ("/ip4/1.2.3.256/tcp/5", "'1.2.3.256'"),
        ("/ip4/01.2.3.4/tcp/5", "'01.2.3.4'"),
        ("/ip4/::1/tcp/5", "'::1'"),
        ("/ip4/example.org/tcp/5", "'example.org'"),
        ("/ip6/1.2.3.4/tcp/5", "'1.2.3.4'"),
        ("/ip6/fe80::1%eth0/tcp/5", "zone"),
        ("/dns4//tcp/5", "''"),
        ("/dns4/1.2.3.4/tcp/5", "/ip4"),
        ("/dns4/a..b/tcp/5", "'a..b'"),
        ("/dns4/-a/tcp/5", "'-a'"),
        ("/dns4/exämple.org/tcp/5", "host name"),
        ("/dns4/" + "a" * 64 + "/tcp/5", "host name"),
        ("/dns4/" + "a." * 127 + "a/tcp/5", "host name"),
        ("/ip4/1.2.3.4/tcp/", "from 0 to 65535, got ''"),
        ("/ip4/1.2.3.4/tcp/-1", "'-1'"),
        ("/ip4/1.2.3.4/tcp/65536", "65536"),
        ("/ip4/1.2.3.4/tcp/123456", "'123456'"),
        ("/ip4/1.2.3.4/tcp/٣", "'٣'"),
        ("/ip4/1.2.3.4/tcp/http", "'http'"),
        ("/ip4/1.2.3.4/tcp/5/p2p/12D3KooW", "12D3KooW"),
        ("/ip4/1.2.3.4/tcp/5/p2p/" + str(PEER)[:-1] + "l", "'l' is not a base58"),
        ("/dns4/" + "a" * 1000 + "/tcp/5", "at most 400"),
    ],
)
def test_a_bad_address_shows_its_bad_piece(text: str, piece: str) -> None:
    with pytest.raises(InvalidValueError, match=re.escape(piece)) as caught:
        Multiaddr.parse(text)
    assert "address" in str(caught.value)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("/ip4/1.2.3.4/udp/5", "TCP alone"),
        ("/ip4/1.2.3.4/udp/5/quic", "TCP alone"),
        ("/ip4/1.2.3.4/udp/5/quic-v1", "TCP alone"),
        ("/ip4/1.2.3.4/tcp/5/ws", "TCP alone"),
        (f"/dns4/example.org/tcp/443/wss/p2p/{PEER}", "TCP alone"),
        (f"/ip4/1.2.3.4/tcp/5/p2p/{PEER}/p2p-circuit", "no relays"),
        (f"/ip4/1.2.3.4/tcp/5/p2p/{PEER}/p2p-circuit/p2p/{PEER}", "no relays"),
        (f"/dnsaddr/bootstrap.example.org/p2p/{PEER}", "TXT"),
        ("/unix/run/peer", "files"),
    ],
)
def test_addresses_of_other_transports_are_kept_as_they_are(text: str, reason: str) -> None:
    address = Multiaddr.parse(text)
    assert reason in address.unspoken
    assert str(address) == text
    assert Multiaddr.parse(str(address)) == address
    assert pickle.loads(pickle.dumps(address)) == address


def test_the_components_of_an_address() -> None:
    address = Multiaddr.parse(f"/ip4/1.2.3.4/udp/5/quic-v1/p2p/QmRelay/p2p-circuit/p2p/{PEER}")
    assert address.components == (
        ("ip4", "1.2.3.4"),
        ("udp", "5"),
        ("quic-v1", None),
        ("p2p", "QmRelay"),
        ("p2p-circuit", None),
        ("p2p", str(PEER)),
    )
    assert (address.host, address.port, address.peer_id) == ("1.2.3.4", 5, str(PEER))
    assert address.without_peer_id().with_peer_id(PEER) == address
    assert Multiaddr.parse("/ip4/1.2.3.4/tcp/5").unspoken == ""


def test_a_name_may_be_that_of_a_protocol() -> None:
    assert Multiaddr.parse("/dns/quic/tcp/5").host == "quic"


def test_an_address_is_made_from_its_text() -> None:
    text = f"/ip4/1.2.3.4/tcp/5/p2p/{PEER}"
    assert Multiaddr(text) == Multiaddr(f" {text}\n") == Multiaddr(Multiaddr(text)) == Multiaddr.parse(text)
    assert str(Multiaddr(text)) == text
    assert pickle.loads(pickle.dumps(Multiaddr(text))) == Multiaddr(text)
    with pytest.raises(InvalidValueError, match="begins with 'ip4'"):
        Multiaddr("ip4")


def test_wrong_types() -> None:
    for value in (None, 5, b"/ip4/1.2.3.4/tcp/5"):
        with pytest.raises(InvalidTypeError):
            Multiaddr.parse(value)  # type: ignore[arg-type]
    with pytest.raises(InvalidTypeError):
        Multiaddr("ip4", "1.2.3.4", True)
    with pytest.raises(InvalidTypeError):
        Multiaddr("ip4", 5, 5)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("text", "loopback", "unspecified"),
    [
        ("/ip4/127.9.9.9/tcp/1", True, False),
        ("/ip4/10.0.0.1/tcp/1", False, False),
        ("/ip4/0.0.0.0/tcp/1", False, True),
        ("/ip6/::1/tcp/1", True, False),
        ("/ip6/::/tcp/1", False, True),
        ("/ip6/::ffff:127.0.0.1/tcp/1", True, False),
        ("/ip6/::ffff:0.0.0.0/tcp/1", False, True),
        ("/dns4/localhost/tcp/1", True, False),
        ("/dns6/example.org/tcp/1", False, False),
    ],
)
def test_kinds_of_hosts(text: str, loopback: bool, unspecified: bool) -> None:
    address = Multiaddr.parse(text)
    assert (address.is_loopback, address.is_unspecified) == (loopback, unspecified)


_NAMES = ["ip4", "ip6", "dns4", "tcp", "udp", "quic", "p2p-circuit", "unix", "p2p"]
_VALUES = ["1.2.3.4", "::1", "5", "a.b", str(PEER), "", "%", "0x1", "\uff11"]
_PIECES = st.sampled_from(_NAMES + _VALUES)


@given(st.one_of(st.text(), st.lists(_PIECES, max_size=8).map(lambda pieces: "/" + "/".join(pieces))))
def test_any_text_is_an_address_or_refused(text: str) -> None:
    try:
        address = Multiaddr.parse(text)
    except InvalidValueError:
        return
    assert Multiaddr.parse(str(address)) == address
