from __future__ import annotations

import pytest

from shoal.cli.addresses import complete_address, listen_address
from shoal.errors import InvalidValueError
from shoal.p2p.identity import Identity


@pytest.mark.parametrize(
    ("host", "port", "address"),
    [("127.0.0.1", 0, "/ip4/127.0.0.1/tcp/0"), ("::1", 65535, "/ip6/::1/tcp/65535")],
)
def test_listen_address(host: str, port: int, address: str) -> None:
    assert str(listen_address(host, port)) == address


@pytest.mark.parametrize(
    ("host", "port"), [("localhost", 0), ("", 0), ("127.0.0.1", -1), ("127.0.0.1", 65536)]
)
def test_bad_listen_addresses_name_the_option(host: str, port: int) -> None:
    with pytest.raises(InvalidValueError, match=r"^--(host|port) "):
        listen_address(host, port)


def test_complete_address_needs_a_peer() -> None:
    text = f"/ip4/127.0.0.1/tcp/5/p2p/{Identity.generate().peer_id}"
    assert str(complete_address("--join", text)) == text
    with pytest.raises(InvalidValueError, match="/p2p/PEERID"):
        complete_address("--join", "/ip4/127.0.0.1/tcp/5")
    with pytest.raises(InvalidValueError, match=r"--join: .*nonsense"):
        complete_address("--join", "nonsense")
