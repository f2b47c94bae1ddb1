"""Lists of addresses as users have them: other transports, blanks, one text with commas."""

from __future__ import annotations

import warnings

import pytest

import shoal
from shoal.dht.addresses import parse_addresses
from shoal.p2p.multiaddr import Multiaddr

ONE, TWO = "/ip4/10.0.0.1/tcp/1", "/dns/example.org/tcp/2"
BOTH = (Multiaddr(ONE), Multiaddr(TWO))


@pytest.mark.parametrize(
    "given",
    [
        [ONE, TWO],
        (text for text in (ONE, TWO)),
        f"{ONE},{TWO}",
        f" {ONE}\n{TWO}\n",
        f"{ONE} {TWO}",
        [f"{ONE}, {TWO},", ""],
        [f"  {ONE}", f"{TWO}\r\n"],
        [Multiaddr(ONE), Multiaddr(ONE), TWO, TWO],
    ],
)
def test_one_text_or_several_with_blanks_and_commas(given: object) -> None:
    assert parse_addresses("initial_peers", given) == BOTH


def test_a_single_address_needs_no_list() -> None:
    assert (
        parse_addresses("initial_peers", ONE) == parse_addresses("initial_peers", Multiaddr(ONE)) == BOTH[:1]
    )


def test_addresses_of_the_package_multiaddr_are_taken() -> None:
    class Foreign:
        def __str__(self) -> str:
            return ONE

    Foreign.__module__ = "multiaddr.multiaddr"
    assert parse_addresses("initial_peers", [Foreign()]) == BOTH[:1]


def test_other_transports_are_left_out_with_one_warning_each() -> None:
    others = ["/ip4/10.0.0.1/udp/1/quic", "/ip4/10.0.0.1/tcp/1/ws", "/dnsaddr/example.org"]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert parse_addresses("initial_peers", [others[0], ONE, *others, TWO]) == BOTH
    said = [str(warning.message) for warning in caught]
    assert len(said) == 3
    assert all(
        text in line and line.startswith("initial_peers: ") for text, line in zip(others, said, strict=True)
    )


def test_hivemind_s_list_of_host_maddrs_starts_a_dht() -> None:
    """The warning points at the line that makes the DHT."""
    with pytest.warns(UserWarning, match="host_maddrs: .*quic") as caught:
        dht = shoal.DHT(host_maddrs=["/ip4/127.0.0.1/tcp/0", "/ip4/127.0.0.1/udp/0/quic"], start=True)
    assert [warning.filename for warning in caught] == [__file__]
    with dht:
        (address,) = dht.get_visible_maddrs()
        by_name = str(address).replace("/ip4/127.0.0.1/", "/dns/localhost/")
        with shoal.DHT(f"{by_name}\n", start=True) as other:
            assert other.run_coroutine(_neighbours) == 1


async def _neighbours(dht: object, node: object) -> int:
    return len(node.neighbours)  # type: ignore[attr-defined]
