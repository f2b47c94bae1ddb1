from __future__ import annotations

import pytest

from shoal.p2p.identity import Identity, PeerID


@pytest.fixture(scope="session")
def many_peers() -> list[PeerID]:
    """Peers made from numbers; only their bytes matter."""
    return [PeerID.from_public_key(number.to_bytes(32, "big")) for number in range(400)]


@pytest.fixture(scope="session")
def identities() -> list[Identity]:
    return [Identity.generate(bytes([number]) * 32) for number in range(1, 5)]
